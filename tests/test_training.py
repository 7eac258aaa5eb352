"""The offline half, through its command: real MNIST in, a bundle out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from carso.bundle import BOUNDS, EARLIER_BOUNDS, Bundle, sealed
from carso_training import run as run_module
from carso_training.__main__ import main
from carso_training.attacks import attack_named
from carso_training.datasets import dataset
from carso_training.datasets.files import Folder
from carso_training.fitting import attacked
from carso_training.fitting.classifier import attacked_together
from carso_training.networks import build_classifier
from carso_training.recipe import PRESETS
from carso_training.robustness import typical as typical_module
from carso_training.robustness.figures import networks
from carso_training.robustness.figures import read as read_figures
from carso_training.robustness.published import DEFENCES
from carso_training.robustness.record import rewrite
from carso_training.robustness.report import as_markdown
from carso_training.robustness.voting import pipeline_of, robust_answers, vote_seeds
from lightning_fabric import Fabric

from tests.recipes import SMALL_NETWORKS
from tests.server import serving

pytestmark = pytest.mark.usefixtures("one_thread")

# Small networks and few images, but every stage; its foreseen attacks are not the published ones
TINY = {
    "name": "tiny",
    "train_images": 300,
    "validation_images": 60,
    "test_images": 30,
    **SMALL_NETWORKS,
    "undefended": {"epochs": 1, "peak_lr": 0.01, "batch_size": 64, "averaging": 0.9},
    "adversarial": {"epochs": 3, "peak_lr": 0.01, "batch_size": 64, "averaging": 0.9},
    "foreseen": {"clean": 1.0, "fgsm-0.15": 0.5, "pgd-0.30": 0.5},
    "training_attack_steps": 2,
    "purification": {"epochs": 3, "peak_lr": 0.003, "batch_size": 64, "averaging": 0.9},
    "samples": 50,
}
EPOCHS = {"undefended": 1, "adversarial": 3, "purifier": 3}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums are then in one order everywhere, so weights can be compared bit by bit


@dataclass(frozen=True)
class Said:
    """What a command did."""

    status: int
    out: str
    error: str

    @property
    def one_line(self) -> str:
        """The only line on standard error, without the command's name."""
        (line,) = self.error.splitlines()
        return line.removeprefix("carso-train: ")


def carso_train(*arguments: object) -> Said:
    """Run carso-train in this process: one of its own would take seconds to import torch."""
    out, error = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["carso-train", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as exited:
            main()
    finally:
        sys.argv = before
    return Said(exited.value.code or 0, out.getvalue(), error.getvalue())


def process(*arguments: object, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run carso-train in a process of its own; `before` is Python code that it runs first."""
    code = f"{before}\nfrom carso_training.__main__ import main\nmain()"
    program = ("-c", code) if before else ("-m", "carso_training")
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD | environment)


@pytest.fixture(scope="module", autouse=True)
def mnist() -> Path:
    return dataset("mnist").ensure()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def tiny_run(tiny: Path, one_thread: None, mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    said = carso_train("run", tiny, "--folder", folder, "--accelerator", "cpu")
    assert said.status == 0, said
    return folder


@pytest.fixture
def damaged(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def weights(folder: Path) -> dict[str, bytes]:
    return {stage: (folder / stage / "weights.safetensors").read_bytes() for stage in EPOCHS}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_ends_in_a_bundle_that_says_what_it_is_and_what_was_measured(tiny_run: Path) -> None:
    manifest = Bundle.load(tiny_run / "bundle").manifest
    assert (manifest.name, manifest.dataset, manifest.samples) == ("tiny", "mnist", 50)
    assert manifest.classes == tuple("0123456789")
    assert manifest.recipe["foreseen"] == TINY["foreseen"]
    assert [cell.defence for cell in manifest.table] == [*DEFENCES] * 10
    assert {cell.kind for cell in manifest.table if cell.defence == "carso"} == {"clean", "transfer"}
    assert {cell.images for cell in manifest.table} == {30}
    assert all(cell.published is not None for cell in manifest.table)
    assert "transfer accuracy" in (tiny_run / "bundle" / "MODEL_CARD.md").read_text()


def test_a_bundle_tells_which_images_are_typical_and_the_command_measures_it_again(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = damaged / "bundle", damaged / "figures/typical.json"
    exported = Bundle.load(bundle).manifest.typical
    assert exported is not None
    assert exported.eps == 0.30
    assert {row.images for row in exported.table if row.kind == "clean"} == {30}
    assert "| clean | 30 |" in (bundle / "MODEL_CARD.md").read_text()

    monkeypatch.setattr(typical_module, "TEST_IMAGES", 30)  # of the whole test set, which a bundle is measured on
    said = carso_train("typical", bundle, "--write", "--out", out, "--accelerator", "cpu")
    assert said.status == 0, said
    again = Bundle.load(bundle).manifest.typical
    assert again == exported
    assert json.loads(out.read_bytes()) == json.loads(exported.model_dump_json())
    assert "| clean | 30 |" in said.out


def test_a_bundle_tells_how_near_a_near_duplicate_is_and_the_command_measures_it_again(damaged: Path) -> None:
    bundle = damaged / "bundle"
    exported = Bundle.load(bundle).manifest.near_duplicates
    assert exported is not None
    assert exported.images == Bundle.load(bundle).manifest.disagreement.images
    rewrite(Bundle.load(bundle), near_duplicates=None)
    said = carso_train("duplicates", bundle)
    assert said.status == 0, said
    assert Bundle.load(bundle).manifest.near_duplicates == exported
    assert f"within {exported.distance:g}" in said.out


def test_metrics_have_a_row_per_epoch(tiny_run: Path) -> None:
    for stage, epochs in EPOCHS.items():
        table = np.genfromtxt(tiny_run / stage / "metrics.csv", delimiter=",", names=True)
        assert np.atleast_1d(table["epoch"]).tolist() == list(range(1, epochs + 1))


def test_only_the_attacks_that_the_recipe_foresees_are_made(tiny_run: Path) -> None:
    made = {path.name: path.stat().st_size for path in (tiny_run / "purifier" / "attacked").glob("*.npy")}
    assert made == dict.fromkeys(("fgsm-0.15.npy", "pgd-0.30.npy"), 128 + 300 * 784 * 2)
    assert "loss_pgd-0.30" in (tiny_run / "adversarial" / "metrics.csv").read_text().splitlines()[0]


def test_nothing_is_left_of_checkpoints_and_unfinished_files(tiny_run: Path) -> None:
    assert not [path for path in tiny_run.rglob("*") if "checkpoint" in path.name or path.suffix == ".part"]


def test_a_finished_run_is_not_trained_again(tiny: Path, tiny_run: Path) -> None:
    before = times(tiny_run)
    said = carso_train("run", tiny, "--folder", tiny_run)
    assert said.status == 0
    assert said.out.strip() == str(tiny_run / "bundle")
    assert times(tiny_run) == before


def test_a_measurement_can_be_reproduced_vote_for_vote(tiny: Path, damaged: Path) -> None:
    before = json.loads((damaged / "table-test.json").read_text())
    (damaged / "table-test.json").unlink()
    assert carso_train("evaluate", tiny, "--folder", damaged, "--split", "test").status == 0
    assert json.loads((damaged / "table-test.json").read_text()) == before


def test_every_image_has_latents_of_its_own_and_a_seed_gives_them_again() -> None:
    seeds = vote_seeds(10_000, seed=0, part=3)
    assert len(np.unique(seeds)) == len(seeds)
    assert seeds.min() >= 0 and seeds.max() < 2**53
    assert np.array_equal(seeds[:100], vote_seeds(100, seed=0, part=3))
    for other in (vote_seeds(10_000, seed=1, part=3), vote_seeds(10_000, seed=0, part=4)):
        assert not np.isin(seeds, other).any()


def test_answers_do_not_depend_on_the_images_beside_them(tiny_run: Path) -> None:
    pipeline = pipeline_of(Bundle.load(tiny_run / "bundle"))
    images = dataset("mnist").load("test").pixels(slice(40)).numpy()
    seeds = vote_seeds(40, seed=0, part=0)
    together = robust_answers(pipeline, images, samples=30, risk=0.0, seeds=seeds)
    alone = [
        robust_answers(pipeline, images[i : i + 1], samples=30, risk=0.0, seeds=seeds[i : i + 1]) for i in range(8)
    ]
    assert together[:8].tolist() == np.concatenate(alone).tolist()


def test_the_measured_table_of_another_split_is_kept_beside_the_first(tiny: Path, damaged: Path) -> None:
    before = weights(damaged)
    said = carso_train("evaluate", tiny, "--folder", damaged, "--split", "validation")
    assert said.status == 0
    assert "pgd-0.30" in said.out and "71.26" in said.out
    assert len(json.loads((damaged / "table-validation.json").read_text())["cells"]) == 30
    assert weights(damaged) == before


# --- the attacks in training ------------------------------------------------------------------------------------------


def test_attacks_of_one_method_are_made_in_one_batch_and_come_in_the_order_asked_for() -> None:
    torch.manual_seed(0)
    classifier = build_classifier(PRESETS["mnist-fcn"].classifier).eval().requires_grad_(False)
    data = dataset("mnist").load("test")[slice(20)]
    names = ("fgsm-0.30", "pgd-0.15", "fgsm-0.05")
    together = attacked_together(
        classifier,
        [attack_named(name) for name in names],
        data.pixels(),
        data.labels,
        steps=3,
        generator=torch.Generator().manual_seed(1),
    )
    for name, images in zip(names, together.split(20), strict=True):
        attack = attack_named(name)
        moved = (images - data.pixels()).abs()
        assert moved.amax(dim=(1, 2, 3)).min() > 0.5 * attack.eps
        assert moved.max() <= attack.eps + 1e-6
        if attack.method.name == "fgsm":
            assert torch.equal(images, attack.images(classifier, data.pixels(), data.labels))


@pytest.fixture
def versions(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Make attacked versions of 40 images in one folder; returns the files' content."""
    fabric, data = Fabric(accelerator="cpu"), dataset("mnist").load("test")[slice(40)]
    attacks = [attack_named("fgsm-0.15"), attack_named("fgsm-0.30")]

    def make(classifier: torch.nn.Module, *, seed: int = 0) -> dict[str, bytes]:
        made = attacked.make(fabric, classifier, attacks, data, folder=tmp_path, seed=seed)
        batch = made.batch(torch.tensor([3, 1]))
        assert torch.equal(batch[0], data.pixels(torch.tensor([3, 1])))
        for versions, attack in zip(batch[1:], attacks, strict=True):
            expected = attack.images(classifier, data.pixels(), data.labels)[[3, 1]]
            assert (versions - expected).abs().max() < 2**-11  # float16
        return {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}

    return make


def random_classifier(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_classifier(PRESETS["mnist-fcn"].classifier).eval().requires_grad_(False)


def test_attacked_images_are_made_again_if_the_classifier_changes(versions, tmp_path: Path) -> None:
    first = versions(random_classifier(0))
    before = times(tmp_path)
    assert versions(random_classifier(0)) == first
    assert times(tmp_path) == before  # the same classifier: they are not made again
    assert versions(random_classifier(1)) != first


def test_attacked_images_are_made_again_if_the_seed_changes(versions, tmp_path: Path) -> None:
    versions(random_classifier(0))
    before = times(tmp_path)
    versions(random_classifier(0), seed=1)
    assert not set(times(tmp_path).items()) & set(before.items())


@pytest.mark.parametrize("kept", [0, 50, 1000], ids=["empty", "half a header", "cut short"])
def test_a_file_of_attacked_images_that_is_cut_short_is_made_again(versions, tmp_path: Path, kept: int) -> None:
    first = versions(random_classifier(0))
    path = tmp_path / "fgsm-0.15.npy"
    path.write_bytes(path.read_bytes()[:kept])
    assert versions(random_classifier(0)) == first


# --- crashes ----------------------------------------------------------------------------------------------------------

# The process kills itself at its nth fsync: after a file is written, before it takes the place of the old one
KILLED = """
import os, signal
fsync, left = os.fsync, [{moment}]
def fatal(descriptor):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = fatal
"""


def killed_and_resumed(tiny: Path, folder: Path, moment: int) -> bool:
    """Whether the run was killed before its end; then it was resumed to its end."""
    killed = process("run", tiny, "--folder", folder, "--accelerator", "cpu", before=KILLED.format(moment=moment))
    if killed.returncode != -signal.SIGKILL:
        assert killed.returncode == 0, killed.stderr
        return False
    said = carso_train("run", tiny, "--folder", folder, "--accelerator", "cpu")
    assert said.status == 0, said
    return True


def differing(folder: Path, other: Path) -> list[Path]:
    files = [Path(stage) / name for stage in EPOCHS for name in ("weights.safetensors", "metrics.csv")]
    return [file for file in files if (folder / file).read_bytes() != (other / file).read_bytes()]


def test_a_killed_run_resumes_and_ends_in_the_same_weights(tiny: Path, tiny_run: Path, tmp_path: Path) -> None:
    moment = random.randint(1, 25)
    assert killed_and_resumed(tiny, tmp_path, moment), moment
    assert differing(tmp_path, tiny_run) == [], moment


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 40, 3))
def test_a_run_killed_at_any_moment_resumes_and_ends_in_the_same_weights(
    tiny: Path, tiny_run: Path, tmp_path: Path, moment: int
) -> None:
    killed_and_resumed(tiny, tmp_path, moment)
    assert differing(tmp_path, tiny_run) == []


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_by_the_clock_ends_in_the_same_weights(
    tiny: Path, tiny_run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "carso_training", "run", tiny, "--folder", tmp_path, "--accelerator", "cpu"]
    kills = 0
    for _ in range(100):
        # longer each time: on a slow machine, too, it lasts at some time for what is not done in parts
        allowed = random.uniform(2, 6) * 1.1**kills
        with subprocess.Popen(command, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL) as running:
            try:
                assert running.wait(timeout=allowed) == 0
                break
            except subprocess.TimeoutExpired:
                running.kill()
                kills += 1
    assert kills
    assert differing(tmp_path, tiny_run) == []


def test_ctrl_c_says_how_to_go_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train_adversarial", interrupted)
    said = carso_train("run", tiny, "--folder", tmp_path)
    assert said.status == 130
    assert said.error.splitlines()[-1].endswith("Run the same command again to resume from the last finished epoch")


# --- what is refused --------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "not what it was": lambda content: b"something else entirely",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recipe_file_is_refused_by_name(tiny: Path, tmp_path: Path, tiny_run: Path, damage: str) -> None:
    (tmp_path / "recipe.json").write_bytes(DAMAGES[damage]((tiny_run / "recipe.json").read_bytes()))
    said = carso_train("run", tiny, "--folder", tmp_path)
    assert said.status == 1
    assert str(tmp_path / "recipe.json") in said.one_line
    assert "remove this file" in said.one_line


def test_a_recipe_file_that_is_a_list_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("[]")
    said = carso_train("run", tiny, "--folder", tmp_path)
    assert said.status == 1
    assert "not a JSON object" in said.one_line


FLIPPED = {"one bit flipped": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]}


@pytest.mark.parametrize("damage", DAMAGES | FLIPPED)
def test_damaged_weights_are_refused_by_name(tiny: Path, damaged: Path, damage: str) -> None:
    path = damaged / "purifier" / "weights.safetensors"
    path.write_bytes((DAMAGES | FLIPPED)[damage](path.read_bytes()))
    said = carso_train("run", tiny, "--folder", damaged)
    assert said.status == 1
    assert f"{path} is damaged" in said.one_line
    assert f"Remove {path.parent}, then run the same command again" in said.one_line


def test_weights_of_another_network_are_refused_by_name(tiny: Path, damaged: Path) -> None:
    path = damaged / "purifier" / "weights.safetensors"
    path.write_bytes((damaged / "adversarial" / "weights.safetensors").read_bytes())
    said = carso_train("run", tiny, "--folder", damaged)
    assert said.status == 1
    assert f"{path} is damaged" in said.one_line


def test_a_damaged_table_is_measured_again(tiny: Path, damaged: Path) -> None:
    path = damaged / "table-test.json"
    before = path.read_bytes()
    path.write_bytes(DAMAGES["cut short"](before))
    assert carso_train("evaluate", tiny, "--folder", damaged, "--split", "test").status == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", [("evaluate", "--split", "test"), ("showcase", "--out", "images")])
@pytest.mark.parametrize("missing", ["purifier/weights.safetensors", "bundle", "recipe.json"])
def test_what_needs_a_finished_run_does_not_train_but_says_how_to_finish_it(
    tiny: Path, damaged: Path, command: tuple[str, ...], missing: str
) -> None:
    path = damaged / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = times(damaged)
    said = carso_train(*command, tiny, "--folder", damaged)
    assert said.status == 1
    assert "is not finished" in said.one_line
    assert f"Finish it with: carso-train run RECIPE --folder {damaged}" in said.one_line
    assert times(damaged) == before


def test_what_needs_a_finished_run_makes_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = carso_train("evaluate", "mnist-fcn", "--quick", "--split", "test", "--folder", folder)
    assert said.status == 1
    assert said.one_line.startswith(f"{folder} holds no run")
    assert said.one_line.endswith(f"carso-train run mnist-fcn-quick --folder {folder}")
    assert not folder.exists()


def test_a_folder_of_another_recipe_is_refused_by_name(tiny: Path, tiny_run: Path) -> None:
    said = carso_train("run", tiny, "--seed", 7, "--folder", tiny_run)
    assert said.status == 1
    assert "it differs in seed" in said.one_line and "--folder" in said.one_line


def test_a_folder_of_a_release_whose_recipes_had_fewer_fields_is_still_the_same_recipes(
    tiny: Path, damaged: Path
) -> None:
    path = damaged / "recipe.json"
    earlier = json.loads(path.read_bytes())
    del earlier["certified_training"]
    path.write_text(json.dumps(earlier))
    assert carso_train("evaluate", tiny, "--folder", damaged, "--split", "test").status == 0


def test_the_graph_by_which_labels_are_proven_can_be_added_to_a_bundle_that_lacks_it(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")
    before = Bundle.load(folder)
    with np.load(folder / "self_test.npz") as arrays:
        np.savez(folder / "self_test.npz", **{name: array for name, array in arrays.items() if name != "margins"})
    (folder / BOUNDS).rename(folder / EARLIER_BOUNDS)
    sealed(folder, before.manifest.model_dump(mode="json", exclude={"schema_version", "files"}))
    older = Bundle.load(folder)
    assert older.bounds is None and older.self_test.margins is None

    assert carso_train("bounds", folder).out.strip() == str(folder / BOUNDS)
    after = Bundle.load(folder)
    assert after.bounds == before.bounds
    assert EARLIER_BOUNDS not in after.manifest.files and not (folder / EARLIER_BOUNDS).exists()
    np.testing.assert_allclose(after.self_test.margins, before.self_test.margins, rtol=1e-5)
    assert networks(after) == networks(older) == networks(before)


def test_the_images_that_are_proven_are_counted_at_the_export_and_by_command(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")
    exported = Bundle.load(folder).manifest.proofs
    assert exported is not None and (exported.eps, exported.images) == (0.3, TINY["validation_images"])
    said = carso_train("bounds", folder, "--clean-rate", "--eps", "0.01")
    assert said.status == 0, said.error
    found = Bundle.load(folder).manifest.proofs
    assert found is not None and exported.proven <= found.proven <= found.images == exported.images
    assert f"{found.proven} of {found.images} validation images are proven at eps 0.01" in said.out
    refused = carso_train("bounds", folder, "--clean-rate", "--eps", "1.5")
    assert refused.status == 2 and "--eps" in refused.error


def test_what_is_proven_is_counted_on_all_images_of_the_split(tiny_run: Path, tmp_path: Path) -> None:
    command = ("evaluate", tiny_run / "bundle", "--protocol", "certified", "--eps", "0.01", "--eps", "0.4")
    said = carso_train(*command, "--out", tmp_path)
    assert said.status == 0, said.error
    weak, strong = read_figures(tmp_path)[0]
    assert weak.file_name == "certified-classifier-linf-0.01.json"
    assert (weak.cell.images, weak.cell.kind, weak.measured.subset) == (10_000, "white-box", "all 10000")
    assert weak.clean >= weak.cell.correct >= strong.cell.correct
    assert weak.cell.threat.settings["proven"] >= weak.cell.correct
    assert "the classifier alone, right and proven" in as_markdown(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = carso_train("run", tiny, "--folder", tmp_path / "file" / "run")
    assert said.status == 1
    assert str(tmp_path / "file") in said.one_line


def test_a_full_disk_ends_the_run_with_a_line_and_the_run_resumes_once_there_is_room(
    tiny: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """The limit of a file's size stands for a disk: beyond it a write fails in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # less than the attacked images of one attack
    try:
        said = carso_train("run", tiny, "--folder", tmp_path, "--accelerator", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said.status == 1
    assert said.error.splitlines()[-1].endswith("then run the same command again to resume")
    assert str(tmp_path / "purifier" / "attacked" / "fgsm-0.15.npy") in said.error
    assert not list(tmp_path.rglob("*.part"))
    assert carso_train("run", tiny, "--folder", tmp_path, "--accelerator", "cpu").status == 0
    assert differing(tmp_path, tiny_run) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tiny: Path, tmp_path: Path) -> None:
    said = carso_train("run", tiny, "--folder", tmp_path / "run", "--accelerator", "cuda")
    assert said.status == 1
    assert "finds no usable GPU" in said.one_line and "--accelerator cpu" in said.one_line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["no-such-preset", "no-such-file.json"])
def test_an_unknown_recipe_is_refused_with_what_there_is(name: str) -> None:
    said = carso_train("run", name)
    assert said.status == 1
    assert name in said.one_line


RECIPE_MISTAKES = {
    "an unknown data set": ({"dataset": "cifar"}, "there is no 'cifar'. There are: fashion-mnist, mnist"),
    "an unknown network": ({"classifier": {"network": "cnn"}}, "there is no network 'cnn'. There are: conv, fcn"),
    "a misspelt field of a network": ({"classifier": {"hiden": [3]}}, "hiden: Extra inputs are not permitted"),
    "a misspelt field": ({"smaples": 3}, "smaples: Extra inputs are not permitted"),
    "another number of classes": ({"classifier": {"classes": 9}}, "classifier.classes is 9; it must be 10 for MNIST"),
    "another representation": ({"purifier": {"representation": 3}}, "purifier.representation is 3; it must be 50"),
    "an unknown attack": ({"foreseen": {"clean": 1, "foo-0.15": 1}}, "foreseen: there is no attack 'foo-0.15'"),
    "no attack": ({"foreseen": {"clean": 1}}, "foreseen: give `clean` and at least one attack"),
    "no weight": ({"foreseen": {"clean": 0, "fgsm-0.15": 0}}, "foreseen: the weights add up to 0"),
    "no epochs": ({"undefended": {"epochs": 0, "peak_lr": 1}}, "undefended.epochs: Input should be greater than 0"),
    "too many images": ({"train_images": 60_000}, "60000 images cannot give 60 held out and 60000 to train on"),
}


@pytest.mark.parametrize("mistake", RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_is_named_by_field(tmp_path: Path, mistake: str) -> None:
    change, reason = RECIPE_MISTAKES[mistake]
    (tmp_path / "mine.json").write_text(json.dumps(TINY | change))
    said = carso_train("run", tmp_path / "mine.json", "--folder", tmp_path / "run")
    assert said.status == 1
    assert reason in said.one_line


def test_the_recipe_of_a_bundle_is_a_recipe(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "again.json").write_text(json.dumps(Bundle.load(tiny_run / "bundle").manifest.recipe))
    assert carso_train("run", tmp_path / "again.json", "--folder", tiny_run).status == 0


# --- the command ------------------------------------------------------------------------------------------------------


def without(package: str) -> subprocess.CompletedProcess[str]:
    # a module that is None in sys.modules is one that is not installed
    return process("presets", before=f"import sys; sys.modules[{package!r}] = None")


def told(package: str) -> list[str]:
    return [
        f"carso-train: {package} is not installed, and training needs it: pip install 'carso[cpu,train]', or "
        "pip install 'carso[gpu,train]' for NVIDIA GPUs"
    ]


def test_without_the_extra_one_line_names_it() -> None:
    done = without("torch")
    assert (done.returncode, done.stderr.splitlines()) == (1, told("torch"))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning_fabric", "onnx", "onnxscript", "safetensors", "onnxruntime"])
def test_every_package_of_the_extra_is_missed_before_any_training(package: str) -> None:
    done = without(package)
    assert (done.returncode, done.stderr.splitlines()) == (1, told(package))


def test_the_version_is_told_without_any_package_of_the_extra() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'onnx', 'lightning_fabric']))"
    done = process("--version", before=blocked)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("carso-train ")


@pytest.mark.parametrize("name", ["mnist", None])
def test_the_folder_of_a_data_set_is_printed(name: str | None, mnist: Path) -> None:
    said = carso_train("data", *([name] if name else []))
    assert (said.status, said.out.strip()) == (0, str(mnist))


def test_an_unknown_data_set_is_refused() -> None:
    said = carso_train("data", "cifar")
    assert said.status == 1
    assert "fashion-mnist, mnist" in said.one_line


def test_every_preset_is_printed_as_a_recipe() -> None:
    said = carso_train("presets")
    assert said.status == 0
    assert set(json.loads(said.out)) == set(PRESETS)


# --- long by nature ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_at_a_real_training_ends_it_with_130(tiny: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.json"
    long.write_text(json.dumps(TINY | {"adversarial": TINY["adversarial"] | {"epochs": 100_000}}))
    command = [sys.executable, "-m", "carso_training", "run", long, "--folder", tmp_path / "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        while not (tmp_path / "run/adversarial/checkpoint.pt").exists():
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, error = running.communicate()
    assert running.returncode == 130
    assert "Run the same command again to resume" in error and "Traceback" not in error


@pytest.mark.slow
def test_two_processes_train_together_and_write_one_bundle(tiny: Path, tmp_path: Path) -> None:
    done = process("run", tiny, "--devices", 2, "--accelerator", "cpu", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    Bundle.load(tmp_path / "bundle")
    assert len((tmp_path / "adversarial" / "metrics.csv").read_text().splitlines()) == 1 + EPOCHS["adversarial"]


FASHION = dataset("fashion-mnist")
DEBIAN = next(source for source in FASHION.sources if isinstance(source, Folder))


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.path.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_another_data_set_needs_nothing_but_its_name_in_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "fashion.json").write_text(json.dumps(TINY | {"dataset": "fashion-mnist"}))
    assert carso_train("run", tmp_path / "fashion.json", "--folder", tmp_path / "run").status == 0
    manifest = Bundle.load(tmp_path / "run" / "bundle").manifest
    assert manifest.classes == FASHION.classes
    assert manifest.recipe["classifier"]["mean"] == FASHION.mean
    assert {cell.published for cell in manifest.table} == {None}
    assert "Ankle boot" in (tmp_path / "run" / "bundle" / "MODEL_CARD.md").read_text()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    done = process("run", "mnist-fcn", "--quick", "--folder", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_quick_run_ends_in_a_bundle_that_is_visibly_better_than_chance(quick_run: Path) -> None:
    table = Bundle.load(quick_run / "bundle").manifest.table
    accuracy = {(cell.threat.name, cell.defence): cell.accuracy for cell in table}
    assert accuracy["clean", "undefended"] > 85
    assert accuracy["clean", "classifier"] > 80
    assert accuracy["clean", "carso"] > 75
    assert accuracy["pgd-0.15", "classifier"] > 40
    assert accuracy["pgd-0.15", "carso"] > 40
    assert accuracy["pgd-0.15", "undefended"] < 30


@pytest.mark.slow
def test_the_loss_of_a_quick_run_falls(quick_run: Path) -> None:
    for stage in EPOCHS:
        table = np.genfromtxt(quick_run / stage / "metrics.csv", delimiter=",", names=True)
        assert table["loss"][-1] < 0.9 * table["loss"][0]


@pytest.mark.slow
def test_the_service_answers_from_a_quick_runs_bundle_as_the_offline_pipeline_does(
    quick_run: Path, tmp_path: Path
) -> None:
    test = dataset("mnist").load("test")[slice(50)]
    arrays = io.BytesIO()
    np.save(arrays, test.images.numpy())
    with serving(quick_run / "bundle", tmp_path / "log") as server, server.client() as client:
        answer = client.post(
            "/classify",
            params={"samples": 200, "risk": 1e-3, "seed": 5},
            content=arrays.getvalue(),
            headers={"content-type": "application/x-npy"},
        )
    labels = [p["label"] for p in answer.raise_for_status().json()["predictions"]]
    pipeline = pipeline_of(Bundle.load(quick_run / "bundle"))
    seeds = np.full(len(test), 5)
    expected = robust_answers(pipeline, test.pixels().numpy(), samples=200, risk=1e-3, seeds=seeds)
    assert labels == expected.tolist()
    assert np.mean(labels == test.labels.numpy()) > 0.7


@pytest.mark.slow
def test_the_showcase_of_a_quick_run_shows_the_difference(quick_run: Path, tmp_path: Path) -> None:
    said = carso_train("showcase", "mnist-fcn", "--quick", "--folder", quick_run, "--out", tmp_path, "--count", 1)
    assert said.status == 0, said
    clean, attacked_image = sorted(path.name for path in tmp_path.glob("*.png"))
    assert clean.endswith("-clean.png") and attacked_image.endswith("-pgd-0.30.png")
