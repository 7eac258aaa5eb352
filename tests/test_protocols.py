"""The protocols that measure a bundle: what counts, what is written, how a stopped one resumes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from carso.bundle import Bundle, Cell, Threat
from carso_training import command
from carso_training.attacks.apgd import apgd_ce
from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.errors import RunError
from carso_training.robustness import figures, report, trials
from carso_training.robustness.campaign import Campaign, Trial
from carso_training.robustness.effort import EFFORTS, Effort
from carso_training.robustness.evaluation import Evaluation, Plan, images_of, subset
from carso_training.robustness.figures import Checked, Figure, Sanity, Tried
from carso_training.robustness.judges import Counting, FastPath, RobustPath
from carso_training.robustness.sanity import Checks
from carso_training.robustness.strong import strong_trials
from carso_training.robustness.system import system_of
from carso_training.robustness.voting import pipeline_of
from torch import Tensor

from tests.bundles import SMALL, random_images, shared_bundle

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models" / "mnist-fcn"
TINY = Effort(steps=3, targets=1, restarts=1, pgd_steps=3, queries=5, latents=2, latents_of_square=2, draws=2)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(shared_bundle(SMALL))


@pytest.fixture(scope="module")
def data(bundle) -> Examples:
    """Random images, labelled by the bundle's own vote."""
    images = torch.from_numpy((random_images(40, SMALL, seed=3) * 255).astype(np.uint8))
    examples = Examples(images, torch.zeros(40, dtype=torch.int64))
    judge = RobustPath(pipeline_of(bundle), counting=Counting(samples=101, draws=1), seed=9, images=40)
    labels = torch.zeros(40, dtype=torch.int64)
    for label in range(10):
        won = judge(examples.pixels(), torch.full((40,), label), torch.arange(40), 0)
        labels[won] = label
    return Examples(images, labels)


def evaluation(bundle: Bundle, data: Examples, out: Path, **plan) -> Evaluation:
    chosen = Plan(**{"split": "test", "images": 12, "seed": 0, "effort": TINY} | plan)
    return Evaluation(bundle, data=data, plan=chosen, out=out, device=CPU, quiet=True)


def results(out: Path) -> dict[str, bytes]:
    """What the batches hold, but for the time that they took."""
    found = {}
    for path in sorted(out.rglob("*.npz")):
        with np.load(path) as arrays:
            found[str(path.relative_to(out))] = {name: arrays[name].tolist() for name in ("rows", "survived", "broken")}
    return found


def test_both_protocols_write_a_figure_per_strength_with_all_that_made_it(bundle, data, tmp_path):
    measured = evaluation(bundle, data, tmp_path)
    seen = []
    measured.strong([0.1], report=seen.append)
    measured.adaptive([0.1, 0.3], report=seen.append)
    found, sanity = figures.read(tmp_path)
    assert found == figures.in_order(seen)
    assert sanity is None
    assert [f.file_name for f in found] == [
        "strong-classifier-linf-0.10.json",
        "adaptive-carso-linf-0.10.json",
        "adaptive-carso-linf-0.30.json",
    ]
    adaptive = found[1]
    assert adaptive.cell.kind == "adaptive"
    assert adaptive.cell.images == 12
    assert adaptive.cell.threat.settings["latents"] == TINY.latents
    assert adaptive.cell.threat.settings["draws"] == TINY.draws
    assert adaptive.measured.checksum == bundle.checksum
    assert adaptive.measured.subset == "12 drawn at random, seed 0"
    assert {"torch", "onnxruntime", "python", "carso"} <= set(adaptive.measured.versions)
    assert adaptive.seed == 0
    assert found[0].cell.kind == "white-box"
    left = [adaptive.cell.images]
    for tried in adaptive.trials:  # each attack is made on what the ones before it left
        assert tried.attacked == left[-1]
        left.append(tried.attacked - tried.broken)
    assert left[-1] == adaptive.cell.correct
    assert left[1] == adaptive.clean


def test_the_adaptive_protocol_has_every_kind_of_attack(bundle, data, tmp_path):
    measured = evaluation(bundle, data, tmp_path, images=2)
    measured.adaptive([0.1], surrogate=bundle)
    names = {tried.attack for tried in figures.read(tmp_path)[0][0].trials}
    assert names >= {
        *("clean", "transfer-apgd-ce", "transfer-apgd-t-1", "surrogate-apgd-ce-logits", "random-search"),
        *("apgd-ce-logits", "apgd-ce-softmax", "apgd-ce-log-probabilities", "pgd-softmax"),
        *("apgd-t-logits-1", "apgd-t-softmax-1", "square-apgd-logits"),
    }
    assert EFFORTS["thorough"].latents >= 20
    assert EFFORTS["thorough"].targets == 9


def test_a_stopped_measurement_resumes_and_ends_as_one_that_was_not_stopped(bundle, data, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    evaluation(bundle, data, whole).adaptive([0.2])
    first = evaluation(bundle, data, stopped)
    first.adaptive([0.2])
    batches = sorted(stopped.rglob("*.npz"))
    for path in batches[len(batches) // 2 :]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in batches[: len(batches) // 2]}
    evaluation(bundle, data, stopped).adaptive([0.2])
    assert results(stopped) == results(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing is made twice


def test_results_of_other_settings_or_another_bundle_are_refused_and_the_difference_is_named(bundle, data, tmp_path):
    evaluation(bundle, data, tmp_path).adaptive([0.2])
    with pytest.raises(RunError, match=r"differs in rows, seed\).*--out"):
        evaluation(bundle, data, tmp_path, seed=1, images=40).adaptive([0.2])
    with pytest.raises(RunError, match=r"differs in effort, trials"):
        evaluation(bundle, data, tmp_path, effort=dataclasses.replace(TINY, steps=4)).adaptive([0.2])


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_batch_is_named_with_its_mend(bundle, data, tmp_path, damage):
    evaluation(bundle, data, tmp_path).strong([0.2])
    path = min(tmp_path.rglob("*.npz"))
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"not an archive"}[damage])
    with pytest.raises(RunError, match=rf"{path.name} is damaged.*Remove it"):
        evaluation(bundle, data, tmp_path).strong([0.2])


def campaign(folder: Path, data: Examples, *, judge, eps: float = 0.1) -> Campaign:
    rows = torch.arange(10)
    return Campaign(folder, data=data, rows=rows, eps=eps, judge=judge, seed=0, batch=4, belongs_to={}, device=CPU)


def moving(by: float) -> Trial:
    return Trial(name=f"by-{by}", make=lambda images, labels, generator: images + by * (0.5 - images).sign())


def always(images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
    return torch.ones(len(images), dtype=torch.bool)


def test_an_attack_that_leaves_the_ball_is_a_fault_and_no_figure(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"by-0\.2 left the ball"):
        campaign(tmp_path, data, judge=always).run([moving(0.2)], title="", quiet=True)
    nothing = Trial(name="nan", make=lambda images, labels, generator: images * float("nan"))
    with pytest.raises(RuntimeError, match="nan left the ball"):
        campaign(tmp_path / "nan", data, judge=always).run([nothing], title="", quiet=True)


def test_an_image_counts_only_if_it_withstands_every_attack(data, tmp_path):
    def judge(images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        return rows != trial  # each trial breaks one image

    found = campaign(tmp_path, data, judge=judge).run([moving(0.01), moving(0.02)], title="", quiet=True)
    assert found.survived.tolist() == [False] * 3 + [True] * 7
    assert found.clean.tolist() == [False] + [True] * 9
    assert [tried.broken for tried in found.tried] == [1, 1, 1]
    assert [tried.attacked for tried in found.tried] == [10, 9, 8]


def test_the_images_that_broke_it_are_kept_as_evidence(data, tmp_path):
    def judge(images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        return (rows != 5) | (trial == 0)

    campaign(tmp_path, data, judge=judge).run([moving(0.05)], title="", quiet=True)
    (path,) = [path for path in tmp_path.glob("01-*.npz") if 5 in np.load(path)["rows"]]
    (kept,) = np.load(path)["broken"]
    moved = np.abs(kept - data.pixels(torch.tensor([5]))[0].numpy())
    assert moved.max() == pytest.approx(0.05, abs=1e-6)


def test_when_nothing_is_left_the_rest_is_not_made(data, tmp_path):
    def judge(images: Tensor, labels: Tensor, rows: Tensor, trial: int) -> Tensor:
        return torch.zeros(len(images), dtype=torch.bool)

    found = campaign(tmp_path, data, judge=judge).run([moving(0.05)], title="", quiet=True)
    assert not found.survived.any()
    assert found.tried[1].attacked == 0


def test_the_robust_path_asks_again_over_fresh_latents_and_one_loss_is_enough(bundle, data):
    pipeline = pipeline_of(bundle)
    images, labels, rows = data.pixels(), data.labels, torch.arange(40)
    survived = [
        RobustPath(pipeline, counting=Counting(samples=1, draws=draws), seed=0, images=40)(images, labels, rows, 0)
        for draws in (1, 2, 20)
    ]
    assert not (survived[1] & ~survived[0]).any()
    assert not (survived[2] & ~survived[1]).any()
    assert survived[2].sum() < survived[0].sum()
    again = RobustPath(pipeline, counting=Counting(samples=1, draws=1), seed=0, images=40)
    assert torch.equal(again(images, labels, rows, 0), survived[0])
    assert not torch.equal(again(images, labels, rows, 1), survived[0])  # another trial, other latents
    part = torch.tensor([3, 17, 30])
    assert torch.equal(again(images[part], labels[part], part, 0), survived[0][part])  # whatever the batch


def test_the_fast_path_is_the_first_pass_of_the_graph(bundle, data):
    sessions = pipeline_of(bundle).sessions
    found = sessions.first_pass(data.pixels().numpy()).probabilities.argmax(axis=1)
    right = FastPath(pipeline_of(bundle))(data.pixels(), torch.from_numpy(found), torch.arange(40), 0)
    assert right.all()


def test_the_images_are_the_same_for_every_system_and_strength():
    rows = subset(10_000, images=100, seed=0)
    assert torch.equal(rows, subset(10_000, images=100, seed=0))
    assert not torch.equal(rows, subset(10_000, images=100, seed=1))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(subset(5, images=None, seed=0), torch.arange(5))
    assert torch.equal(subset(5, images=9, seed=0), torch.arange(5))


def test_validation_images_are_those_that_the_recipe_held_out():
    bundle = Bundle.load(SHIPPED)
    recipe = bundle.manifest.recipe
    held_out = dataset("mnist").load("train").split(held_out=recipe["validation_images"], seed=recipe["seed"])[1]
    assert torch.equal(images_of(bundle, "validation").images, held_out.images)


def test_square_with_gradients_after_it_breaks_more_of_the_shipped_classifier_than_gradients_alone():
    bundle = Bundle.load(SHIPPED)
    data, box = dataset("mnist").load("test"), system_of(bundle)
    images, labels, raw = data.pixels(slice(60)), data.labels[:60], box.classifier_scores()
    generator = torch.Generator().manual_seed(0)
    alone = apgd_ce(raw, images, labels, eps=0.3, steps=100, generator=generator)
    both = trials.squares_and_gradients(
        "both", lambda g: box.classifier_scores(raw=False), lambda g: raw, eps=0.3, queries=1000, steps=100
    ).make(images, labels, generator)
    standing = [int((raw(x).argmax(dim=1) == labels).sum()) for x in (alone, both)]
    assert standing[1] < standing[0]


def test_every_sanity_check_is_made_and_the_planted_defences_are_caught(bundle, data, tmp_path):
    found = Checks(evaluation(bundle, data, tmp_path), images=6, eps=0.3).run()
    assert figures.read(tmp_path)[1] == found
    names = [check.name for check in found.checks]
    assert len(names) == len(set(names)) == 15
    by_name = {check.name: check for check in found.checks}
    assert by_name["Gradients agree with finite differences in float64"].passed
    assert by_name["Gradients are not zero"].passed
    assert next(check for name, check in by_name.items() if "rounded" in name).passed


@pytest.mark.slow
def test_the_sanity_checks_fail_on_the_shipped_bundle_only_where_a_small_budget_shows(tmp_path):
    """An attack with a quick budget has not converged, and three checks say so: docs/robustness.md shows them too."""
    shipped = Bundle.load(SHIPPED)
    measured = Evaluation(
        shipped,
        data=dataset("mnist").load("test"),
        plan=Plan(split="test", images=40, seed=0, effort=EFFORTS["quick"]),
        out=tmp_path,
        device=CPU,
        quiet=True,
    )
    checks = Checks(measured, images=40, eps=0.3).run().checks
    of_the_budget = {f"Twice the {what} break hardly more" for what in ("steps", "restarts", "latents")}
    assert of_the_budget < {check.name for check in checks}
    assert {check.name for check in checks if not check.passed} <= of_the_budget


def figure(*, eps: float, correct: int, defence: str = "carso", protocol: str = "adaptive") -> Figure:
    threat = Threat(attack=protocol, norm="linf", eps=eps, sees="system", settings={"steps": 7})
    return Figure(
        protocol=protocol,
        measured=figures.Measured(
            bundle="b", checksum="0" * 64, dataset="mnist", split="test", subset="all 200", device="cpu", versions={}
        ),
        cell=Cell(defence=defence, threat=threat, correct=correct, images=200, published=None),
        clean=198,
        trials=(Tried(attack="apgd", settings={"steps": 7}, attacked=198, broken=198 - correct, seconds=1.0),),
        seed=0,
        seconds=61.0,
    )


def test_a_page_is_written_from_its_figures_and_says_when_it_is_not(tmp_path, monkeypatch, capsys):
    page, folder = tmp_path / "page.md", tmp_path / "page" / "mine"
    folder.mkdir(parents=True)
    page.write_text("before\n<!-- measured: mine -->\nold\n<!-- end -->\nafter\n")
    figures.write(folder, figure(eps=0.3, correct=100))
    figures.write(folder, figure(eps=0.15, correct=150))
    assert report.update(page)
    text = page.read_text()
    assert text.startswith("before\n<!-- measured: mine -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| eps 0.30 | 50.0 [43.1, 56.9] |" in text
    assert "| clean | 99.0 [96.4, 99.7] |" in text
    assert not report.update(page)
    assert run(monkeypatch, "report", str(page), "--check") == 0
    figures.write(folder, figure(eps=0.3, correct=99))
    assert run(monkeypatch, "report", str(page), "--check") == 1
    assert "carso-train report" in capsys.readouterr().err


def test_a_failed_check_stands_out_on_a_page():
    checks = tuple(Checked(name=name, passed=name == "one", evidence="e", rule="r") for name in ("one", "two"))
    sanity = Sanity(
        measured=figure(eps=0.3, correct=1).measured, eps=0.3, images=5, settings={}, checks=checks, seed=0, seconds=1
    )
    text = report.checks(sanity)
    assert "1 of 2 pass" in text
    assert "| two | **FAIL** |" in text


def test_a_folder_without_figures_and_a_file_that_is_none_are_named(tmp_path):
    with pytest.raises(RunError, match=r"holds no figures.*carso-train evaluate"):
        report.as_markdown(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RunError, match=r"x\.json is not a figure"):
        figures.read(tmp_path)


def test_the_tables_of_the_robustness_page_are_what_its_figures_say():
    page = ROOT / "docs" / "robustness.md"
    assert page.read_text() == report.updated(page)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["carso-train", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_the_command_measures_a_bundle_and_resumes(tmp_path, monkeypatch, capsys):
    arguments = [
        "evaluate",
        str(SHIPPED),
        "--protocol",
        "strong",
        "--images",
        "20",
        "--eps",
        "0.1",
        "--effort",
        "quick",
    ]
    arguments += ["--steps", "3", "--seed", "1", "--accelerator", "cpu", "--out", str(tmp_path)]
    monkeypatch.setitem(command.EFFORTS, "quick", dataclasses.replace(TINY, queries=20))
    assert run(monkeypatch, *arguments) == 0
    first = capsys.readouterr().out
    assert "strong classifier eps 0.10" in first
    content = json.loads((tmp_path / "strong-classifier-linf-0.10.json").read_text())
    assert content["cell"]["images"] == 20
    assert content["seed"] == 1
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == first


def test_the_published_table_needs_a_recipe(monkeypatch, capsys):
    assert run(monkeypatch, "evaluate", str(SHIPPED), "--protocol", "published") == 1
    assert "does not hold the undefended classifier" in capsys.readouterr().err


def test_the_strong_protocol_restarts_pgd_and_aims_at_every_target():
    scores = system_of(Bundle.load(shared_bundle(SMALL))).classifier_scores()
    names = [t.name for t in strong_trials(raw=scores, scores=scores, classes=10, eps=0.1, effort=EFFORTS["thorough"])]
    assert sum(name.startswith("pgd") for name in names) == 5
    assert sum(name.startswith("apgd-t") for name in names) == 9
    assert len(set(names)) == len(names)
