"""One training loop for every network: epochs, schedule, averaging, checkpoints that resume, a metrics log.

A run that was cut off at any point goes on from its last finished epoch and ends in the same weights as one that
was not: all randomness of an epoch comes from the seed and the epoch's number, none from what went before.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from carso_training.recipe import Schedule

BatchLoss = Callable[[nn.Module, Tensor, torch.Generator], dict[str, Tensor]]
Validate = Callable[[nn.Module], dict[str, float]]


def fit(
    fabric: Fabric,
    model: nn.Module,
    *,
    title: str,
    folder: Path,
    rows: int,
    schedule: Schedule,
    seed: int,
    batch_loss: BatchLoss,
    validate: Validate,
) -> nn.Module:
    """Train `model` on `rows` examples and return the averaged network, in eval mode.

    `batch_loss(model, indices, generator)` returns a dict whose ``loss`` is minimised and whose every entry (a
    scalar, mean over the batch) is logged; `validate(network)` returns figures on held-out images. In `folder`:
    ``weights.safetensors`` when done, ``checkpoint.pt`` until then, and ``metrics.csv``, a row per epoch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, checkpoint, metrics = (folder / n for n in ("weights.safetensors", "checkpoint.pt", "metrics.csv"))
    if weights.exists():
        model.load_state_dict(load_file(weights))
        return fabric.to_device(model).eval()

    steps = -(-rows // (schedule.batch_size * fabric.world_size))
    optimizer = torch.optim.RAdam(
        model.parameters(), lr=schedule.peak_lr, weight_decay=schedule.weight_decay, decoupled_weight_decay=True
    )
    average = AveragedModel(
        fabric.to_device(model), multi_avg_fn=get_ema_multi_avg_fn(schedule.averaging), use_buffers=True
    )
    trained, optimizer = fabric.setup(model, optimizer)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=schedule.peak_lr,
        total_steps=schedule.epochs * steps,
        pct_start=schedule.warmup,
        cycle_momentum=False,
    )
    first_epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=fabric.device, weights_only=True)
        if state["schedule"] != schedule.model_dump():
            raise ValueError(
                f"{checkpoint} was written under another schedule ({state['schedule']}): "
                "go on with that one, or remove the folder to start afresh"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        rate.load_state_dict(state["rate"])
        first_epoch = state["epoch"]
    _keep_rows(metrics, first_epoch)

    with _progress(enabled=fabric.is_global_zero) as progress:
        task = progress.add_task(title, total=schedule.epochs * steps, completed=first_epoch * steps, figures="")
        for epoch in range(first_epoch, schedule.epochs):
            generator = _generator(fabric, seed, epoch)
            trained.train()
            sums: dict[str, Tensor] = {}
            for indices in _batches(fabric, rows, schedule.batch_size, seed=seed, epoch=epoch):
                losses = batch_loss(trained, indices, generator)
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(losses["loss"])
                fabric.clip_gradients(trained, optimizer, max_norm=5.0, error_if_nonfinite=True)
                optimizer.step()
                rate.step()
                average.update_parameters(model)
                for key, value in losses.items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach().float()
                progress.advance(task)
            if fabric.is_global_zero:
                figures = {key: value.item() / steps for key, value in sums.items()}
                figures |= validate(average.module.eval())
                _log(metrics, {"epoch": epoch + 1, "lr": rate.get_last_lr()[0], **figures})
                progress.update(task, figures=_short(figures))
                _save(
                    checkpoint,
                    {
                        "schedule": schedule.model_dump(),
                        "epoch": epoch + 1,
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rate": rate.state_dict(),
                    },
                )
            fabric.barrier()

    if fabric.is_global_zero:
        part = weights.with_suffix(".part")
        save_file(average.module.state_dict(), part)
        part.replace(weights)
        checkpoint.unlink()
    fabric.barrier()
    return average.module.eval()


def _batches(fabric: Fabric, rows: int, size: int, *, seed: int, epoch: int) -> Iterator[Tensor]:
    """This process's share of one epoch: equal shares, so that no process waits for another at the end."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(_mix(seed, epoch)))
    per_process = rows // fabric.world_size
    mine = order[fabric.global_rank :: fabric.world_size][:per_process]
    steps = -(-rows // (size * fabric.world_size))
    yield from (part.to(fabric.device) for part in mine.tensor_split(steps))


def _generator(fabric: Fabric, seed: int, epoch: int) -> torch.Generator:
    """Randomness of an epoch on this process's device; dropout draws from the global one, seeded alike."""
    mixed = _mix(seed, epoch) + 1 + fabric.global_rank
    torch.manual_seed(mixed)
    return torch.Generator(fabric.device).manual_seed(mixed)


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) * 1024  # room for 1 023 processes between two epochs


def _save(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _log(path: Path, row: dict[str, float]) -> None:
    exists = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if not exists:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()})


def _keep_rows(path: Path, epochs: int) -> None:
    """Drop rows of epochs that a crash lost between the log and the checkpoint."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: epochs + 1]) if epochs else "")
        if not epochs:
            path.unlink()


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
