"""The training loop on a network of one layer: resuming, damaged checkpoints, weights that are what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from carso_training import durable
from carso_training.errors import RunError, TrainingError
from carso_training.fitting.checkpoints import Checkpoints, load_weights, save_weights
from carso_training.fitting.loop import fit
from carso_training.recipe import Schedule
from lightning_fabric import Fabric
from torch import Tensor, nn

SCHEDULE = Schedule(epochs=6, peak_lr=0.1, batch_size=10, averaging=0.5)
X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


class CrashError(Exception):
    """The process ends here."""


def train(folder: Path, *, schedule: Schedule = SCHEDULE, crash_in: int | None = None, scale: float = 1.0) -> nn.Module:
    """Train until the end, or until the epoch `crash_in`, which is then not finished."""
    torch.manual_seed(0)
    epochs = iter(range(schedule.epochs))

    def batch_loss(model: nn.Module, rows: Tensor, generator: torch.Generator, done: float) -> dict[str, Tensor]:
        noise = torch.randn(len(rows), 5, generator=generator)
        return {"loss": (model(X[rows] + 0.1 * noise) * scale - X[rows].sum(dim=1, keepdim=True)).square().mean()}

    def validate(model: nn.Module) -> dict[str, float]:
        if next(epochs) == crash_in:
            raise CrashError
        return {"weight": model.weight.sum().item()}

    return fit(
        Fabric(accelerator="cpu"),
        nn.Linear(5, 1),
        title="line",
        folder=folder,
        rows=len(X),
        schedule=schedule,
        seed=3,
        batch_loss=batch_loss,
        validate=validate,
    )


def crashed(folder: Path) -> Checkpoints:
    """A training that ended in its fifth epoch."""
    with pytest.raises(CrashError):
        train(folder, crash_in=4)
    checkpoints = Checkpoints(folder)
    assert checkpoints.newest.exists() and checkpoints.previous.exists()
    return checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def same(folder: Path, other: Path) -> bool:
    return all((folder / n).read_bytes() == (other / n).read_bytes() for n in ("weights.safetensors", "metrics.csv"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


DAMAGES = (cut_short, empty, flip_a_bit, overwrite, Path.unlink)


def test_a_training_that_crashed_resumes_and_ends_in_the_same_weights(whole: Path, tmp_path: Path) -> None:
    crashed(tmp_path)
    train(tmp_path)
    assert same(tmp_path, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = crashed(tmp_path).newest
    damage(newest)
    train(tmp_path)
    assert same(tmp_path, whole)
    if damage is not Path.unlink:  # a crash between the two renames, which is no damage
        assert f"{newest} is damaged: going on from checkpoint-previous.pt" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES[:-1])
def test_damaged_checkpoints_without_an_intact_one_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoints = crashed(tmp_path)
    damage(checkpoints.newest)
    damage(checkpoints.previous)
    with pytest.raises(RunError, match=rf"{checkpoints.newest} is damaged.*Remove {tmp_path}, then run the same"):
        train(tmp_path)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    crashed(tmp_path)
    with pytest.raises(RunError, match=r"begun under another schedule .*remove the folder to start again"):
        train(tmp_path, schedule=SCHEDULE.model_copy(update={"epochs": 7}))


def test_a_loss_that_is_no_longer_finite_ends_the_training_with_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"line: the gradient is not finite in epoch 1; try a smaller peak_lr"):
        train(tmp_path, scale=float("inf"))


def test_a_trained_network_is_not_trained_again(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    network = train(whole, crash_in=0)
    assert not network.training
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("damage", DAMAGES[:-1])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_weights(nn.Linear(50, 50), tmp_path / "weights.safetensors")
    damage(tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match=rf"{tmp_path / 'weights.safetensors'} is damaged \(.+\). Remove {tmp_path}"):
        load_weights(nn.Linear(50, 50), tmp_path / "weights.safetensors")


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved, loaded = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    saved(torch.randn(30, 4))
    save_weights(saved, tmp_path / "weights")
    load_weights(loaded, tmp_path / "weights")
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, "old")
    with pytest.raises(CrashError), durable.replacing(path) as file:
        file.write(b"ne")
        raise CrashError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, durable.replacing(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")
