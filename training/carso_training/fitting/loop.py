"""One training loop for every network: epochs, schedule, averaging, checkpoints that resume, a metrics log.

A training that was cut off at any point resumes from its last finished epoch, and ends in the same weights as one that
was not: all randomness of an epoch comes from the seed and the epoch's number, none from what went before.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from carso_training import durable
from carso_training.errors import RunError, TrainingError
from carso_training.fitting.checkpoints import Checkpoints, load_weights, save_weights
from carso_training.fitting.optimizers import optimizers_of, rate_of
from carso_training.recipe import Schedule

WEIGHTS = "weights.safetensors"
METRICS = "metrics.csv"

BatchLoss = Callable[[nn.Module, Tensor, torch.Generator, float], dict[str, Tensor]]
Validate = Callable[[nn.Module], dict[str, float]]


N = TypeVar("N", bound=nn.Module)


def fit(
    fabric: Fabric,
    model: N,
    *,
    title: str,
    folder: Path,
    rows: int,
    schedule: Schedule,
    seed: int,
    batch_loss: BatchLoss,
    validate: Validate,
) -> N:
    """Train `model` on `rows` examples and return the averaged network, in eval mode.

    Parameters that do not require a gradient stay as they are.
    `batch_loss(model, indices, generator, done)` returns a dict whose ``loss`` is minimised and whose every entry (a
    scalar, mean over the batch) is logged; `done` is the share of all steps that lie behind, in [0, 1).
    `validate(network)` returns figures on held-out images. In `folder`:
    ``weights.safetensors`` when done, two checkpoints until then, and ``metrics.csv``, a row per epoch. A network
    whose weights are there is not trained again.

    Raises RunError if a file in `folder` is damaged or of another schedule, TrainingError if the loss is no longer a
    finite number, and OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, metrics, checkpoints = folder / WEIGHTS, folder / METRICS, Checkpoints(folder)
    if weights.exists():
        load_weights(model, weights)
        fabric.to_device(model)  # in place
        return model.eval()

    steps = -(-rows // (schedule.batch_size * fabric.world_size))
    average = AveragedModel(
        fabric.to_device(model), multi_avg_fn=get_ema_multi_avg_fn(schedule.averaging), use_buffers=True
    )
    trained, *optimizers = fabric.setup(model, *optimizers_of(model, schedule))
    rates = [rate_of(optimizer, schedule, steps=schedule.epochs * steps) for optimizer in optimizers]
    first_epoch = 0
    if (state := checkpoints.load(fabric.device)) is not None:
        if state["schedule"] != schedule.model_dump():
            raise RunError(
                f"{folder} was begun under another schedule ({state['schedule']}): go on with that one, or remove the "
                "folder to start again"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for part, kept in zip([*optimizers, *rates], [*state["optimizers"], *state["rates"]], strict=True):
            part.load_state_dict(kept)
        first_epoch = state["epoch"]
    fabric.barrier()  # all processes have read what the first one now writes
    if fabric.is_global_zero:
        _keep_rows(metrics, first_epoch)

    with _progress(enabled=fabric.is_global_zero) as progress:
        task = progress.add_task(title, total=schedule.epochs * steps, completed=first_epoch * steps, figures="")
        for epoch in range(first_epoch, schedule.epochs):
            generator = _generator(fabric, seed, epoch)
            trained.train()
            sums: dict[str, Tensor] = {}
            for step, indices in enumerate(_batches(fabric, rows, schedule.batch_size, seed=seed, epoch=epoch)):
                done = (epoch * steps + step) / (schedule.epochs * steps)
                losses = batch_loss(trained, indices, generator, done)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                fabric.backward(losses["loss"])
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=5.0)  # of all optimizers' together
                if not norm.isfinite():
                    raise TrainingError(
                        f"{title}: the gradient is not finite in epoch {epoch + 1}; try a smaller peak_lr than "
                        f"{schedule.peak_lr}"
                    )
                for part in (*optimizers, *rates):
                    part.step()
                average.update_parameters(model)
                for key, value in losses.items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach().float()
                progress.advance(task)
            if fabric.is_global_zero:
                figures = {key: value.item() / steps for key, value in sums.items()}
                figures |= validate(average.module.eval())
                _log(metrics, {"epoch": epoch + 1, "lr": rates[0].get_last_lr()[0], **figures})
                progress.update(task, figures=_short(figures))
                checkpoints.save(
                    {
                        "schedule": schedule.model_dump(),
                        "epoch": epoch + 1,
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "rates": [rate.state_dict() for rate in rates],
                    }
                )
            fabric.barrier()

    if fabric.is_global_zero:
        save_weights(average.module, weights)
        checkpoints.remove()
    fabric.barrier()
    trained_network: N = average.module.eval()
    return trained_network


def risen_at(done: float, *, rise: float) -> float:
    """Return how far something has risen, in [0, 1], that rises in a straight line to 1 until the share `rise` of a
    training is done. `done`: the share that is done, in [0, 1].
    """
    return min(1.0, done / rise) if rise else 1.0


def _batches(fabric: Fabric, rows: int, size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield this process's share of one epoch: equal shares, so that no process waits for another at the end."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(_mix(seed, epoch)))
    per_process = rows // fabric.world_size
    mine = order[fabric.global_rank :: fabric.world_size][:per_process]
    steps = -(-rows // (size * fabric.world_size))
    yield from (part.to(fabric.device) for part in mine.tensor_split(steps))


def _generator(fabric: Fabric, seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch on this process's device; dropout draws from the global one, seeded alike."""
    mixed = _mix(seed, epoch) + 1 + fabric.global_rank
    torch.manual_seed(mixed)
    return torch.Generator(fabric.device).manual_seed(mixed)


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) * 1024  # room for 1 023 processes between two epochs


def _log(path: Path, row: dict[str, float]) -> None:
    exists = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def _keep_rows(path: Path, epochs: int) -> None:
    """Drop rows of epochs that a crash lost between the log and the checkpoint."""
    if path.exists() and not epochs:
        path.unlink()
    elif path.exists():
        durable.write(path, "".join(path.read_text().splitlines(keepends=True)[: epochs + 1]))


def _progress(*, enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=not enabled,
    )


def _short(figures: dict[str, float]) -> str:
    """The loss, and the first and last validation figure; metrics.csv has them all."""
    names = ["loss", *[name for name in figures if not name.startswith("loss")]]
    return ", ".join(f"{name} {figures[name]:.4g}" for name in dict.fromkeys((names[0], names[1], names[-1])))
