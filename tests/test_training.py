"""The offline half, through its command: real MNIST in, a bundle out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from carso.bundle import Bundle
from carso.inference.pipeline import Ballot
from carso_training import data
from carso_training.__main__ import main
from carso_training.evaluate import pipeline_of

from tests.server import serving

CARSO_TRAIN = (sys.executable, "-m", "training")
InProcess = Callable[..., tuple[int, str]]  # arguments -> exit status, standard error

TINY = {
    "name": "tiny",
    "train_images": 1000,
    "validation_images": 200,
    "test_images": 40,
    "undefended": {"epochs": 1, "peak_lr": 0.01, "averaging": 0.9},
    "adversarial": {"epochs": 4, "peak_lr": 0.01, "averaging": 0.9},
    "training_pgd_steps": 2,
    "purification": {"epochs": 2, "peak_lr": 0.003, "averaging": 0.9},
    "samples": 50,
}


def carso_train(*arguments: object, **environment: str) -> None:
    done = subprocess.run(
        [*CARSO_TRAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=900,
    )
    if done.returncode:
        pytest.fail(f"carso-train {' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    """carso-train without a process of its own, which would take seconds to import torch."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["carso-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def mnist() -> Path:
    return data.ensure()


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def tiny_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory, mnist: Path) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    carso_train("run", tiny_recipe, "--folder", folder)
    return folder


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory, mnist: Path) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    carso_train("run", "mnist-fcn", "--quick", "--folder", folder)
    return folder


def test_a_quick_run_ends_in_a_sound_bundle_that_is_visibly_better_than_chance(quick_run: Path) -> None:
    bundle = Bundle.load(quick_run / "bundle")
    accuracy = {(cell.attack, cell.column): cell.accuracy for cell in bundle.manifest.table}
    assert len(accuracy) == 30
    assert accuracy["clean", "none"] > 85
    assert accuracy["clean", "IAT"] > 80
    assert accuracy["clean", "CARSO"] > 75
    assert accuracy["pgd-0.15", "IAT"] > 40
    assert accuracy["pgd-0.15", "CARSO"] > 40
    assert accuracy["pgd-0.15", "none"] < 30
    assert {cell.kind for cell in bundle.manifest.table if cell.column == "CARSO"} == {"transfer"}
    assert bundle.manifest.recipe["name"] == "mnist-fcn-quick"
    assert "transfer accuracy" in (quick_run / "bundle" / "MODEL_CARD.md").read_text()


def test_the_service_answers_from_a_quick_runs_bundle_as_the_offline_pipeline_does(
    quick_run: Path, mnist: Path, tmp_path: Path
) -> None:
    test = data.load("test")[slice(50)]
    arrays = io.BytesIO()
    np.save(arrays, test.images.numpy())
    with serving(quick_run / "bundle", tmp_path / "log") as server, server.client() as client:
        answer = client.post(
            "/classify",
            params={"samples": 200, "risk": 1e-3, "seed": 5},
            content=arrays.getvalue(),
            headers={"content-type": "application/x-npy"},
        )
    predictions = answer.raise_for_status().json()["predictions"]
    pipeline = pipeline_of(Bundle.load(quick_run / "bundle"))
    outcomes = pipeline.classify(test.pixels().numpy(), Ballot(samples=200, risk=1e-3, seed=5))
    assert [p["tally"] for p in predictions] == [outcome.tally for outcome in outcomes]
    assert np.mean([p["label"] for p in predictions] == test.labels.numpy()) > 0.7


def test_metrics_have_a_row_per_epoch_and_the_loss_falls(quick_run: Path) -> None:
    for stage, epochs in (("undefended", 3), ("adversarial", 5), ("purifier", 3)):
        table = np.genfromtxt(quick_run / stage / "metrics.csv", delimiter=",", names=True)
        assert table["epoch"].tolist() == list(range(1, epochs + 1))
        assert table["loss"][-1] < 0.9 * table["loss"][0]


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [*CARSO_TRAIN, "run", str(tiny_recipe), "--folder", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "adversarial" / "metrics.csv"
    while running.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "adversarial" / "weights.safetensors").exists(), "the run was over before it was killed"

    carso_train("run", tiny_recipe, "--folder", tmp_path)
    for stage in ("undefended", "adversarial", "purifier"):
        same = (tmp_path / stage / "weights.safetensors").read_bytes()
        assert same == (tiny_run / stage / "weights.safetensors").read_bytes(), stage
        assert (
            len((tmp_path / stage / "metrics.csv").read_text().splitlines())
            == 1
            + {
                "undefended": 1,
                "adversarial": 4,
                "purifier": 2,
            }[stage]
        )


def test_a_finished_run_is_not_trained_again(tiny_recipe: Path, tiny_run: Path, in_process: InProcess) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(tiny_run.rglob("*")) if path.is_file()}
    code, _ = in_process("run", tiny_recipe, "--folder", tiny_run)
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in sorted(tiny_run.rglob("*")) if path.is_file()}


def test_attacked_images_are_made_again_if_the_classifier_changes(tiny_run: Path) -> None:
    stamp = json.loads((tiny_run / "purifier" / "attacked" / "made-from.json").read_text())
    assert stamp["sha256"] and stamp["seed"] == 0
    sizes = {path.name: path.stat().st_size for path in (tiny_run / "purifier" / "attacked").glob("*.npy")}
    assert set(sizes) == {"fgsm-0.15.npy", "fgsm-0.30.npy", "pgd-0.15.npy", "pgd-0.30.npy"}
    assert all(size == 128 + 1000 * 784 * 2 for size in sizes.values())


def test_a_folder_of_another_recipe_is_refused_by_name(
    tiny_recipe: Path, tiny_run: Path, in_process: InProcess
) -> None:
    code, said = in_process("run", tiny_recipe, "--seed", 7, "--folder", tiny_run)
    assert code == 1
    assert "seed" in said and "--folder" in said and "Traceback" not in said


def test_two_processes_train_together_and_write_one_bundle(tiny_recipe: Path, tmp_path: Path, mnist: Path) -> None:
    on_two = ("--devices", 2, "--accelerator", "cpu")
    carso_train("run", tiny_recipe, *on_two, "--folder", tmp_path, OMP_WAIT_POLICY="passive")  # they share few cores
    Bundle.load(tmp_path / "bundle")
    assert len((tmp_path / "adversarial" / "metrics.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("name", ["no-such-preset", "no-such-file.json"])
def test_an_unknown_recipe_is_refused_with_what_there_is(name: str, in_process: InProcess) -> None:
    code, said = in_process("run", name)
    assert code == 1
    assert name in said and "Traceback" not in said


def test_validation_images_are_never_trained_on(mnist: Path) -> None:
    whole = data.load("train")
    training, held_out = whole.split(5000, seed=3)
    assert len(training) == 55_000 and len(held_out) == 5000
    rows = {image.numpy().tobytes() for image in held_out.images}
    # MNIST holds no image twice, so identity of pixels is identity of examples
    assert not any(image.numpy().tobytes() in rows for image in training.images)
    with pytest.raises(ValueError, match="held out"):
        whole.split(59_000, seed=0, train=2000)
