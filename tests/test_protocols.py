"""The protocols that measure a bundle: what counts, what is written, how a stopped one resumes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from carso import Client, RequestRefused, Unavailable
from carso.bundle import Bundle, Cell, Threat
from carso_training import command
from carso_training.attacks.apgd import apgd_ce
from carso_training.attacks.rays import rays
from carso_training.datasets import dataset
from carso_training.datasets.examples import Examples
from carso_training.errors import RunError
from carso_training.networks.cost import costs
from carso_training.robustness import controls, figures, plots, report, strip, trials
from carso_training.robustness.blackbox import PATIENCE, Service, ServiceJudge
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
from tests.scripted import LABEL_ONLY, Reply, refusal, scripted

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "models" / "mnist-fcn"
TINY = Effort(
    name="tiny", steps=3, targets=1, restarts=1, pgd_steps=3, queries=5, latents=2, latents_of_square=2, draws=2
)
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
            found[str(path.relative_to(out))] = {name: arrays[name].tolist() for name in ("rows", "survived", "images")}
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
        "adaptive-carso-linf-0.10.json",
        "adaptive-carso-linf-0.30.json",
        "strong-classifier-linf-0.10.json",
    ]
    adaptive = found[0]
    assert adaptive.cell.kind == "adaptive"
    assert adaptive.cell.images == 12
    assert adaptive.cell.threat.settings["latents"] == TINY.latents
    assert adaptive.cell.threat.settings["draws"] == TINY.draws
    assert adaptive.measured.networks == figures.networks(bundle)
    assert adaptive.measured.multiply_adds["vote"] > adaptive.measured.multiply_adds["classifier"]
    assert adaptive.measured.subset == "12 drawn at random, seed 0"
    assert {"torch", "onnxruntime", "python", "carso"} <= set(adaptive.measured.versions)
    assert adaptive.seed == 0
    assert found[2].cell.kind == "white-box"
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


def test_the_controls_are_measured_as_carso_is(bundle, data, tmp_path):
    found = []
    arguments = {"validation": data, "others": [bundle], "report": found.append}
    evaluation(bundle, data, tmp_path).controls([0.1], **arguments)
    by_defence = {figure.cell.defence: figure for figure in found}
    assert list(by_defence) == [
        *(f"votes-{votes}" for votes in controls.VOTES),
        "int8",
        *("one-zero-latent", "noised-votes", "smoothing", "random-classifier"),
    ]
    assert figures.read(tmp_path)[0] == figures.in_order(found)
    assert {figure.cell.kind for figure in found} == {"adaptive"}
    assert {figure.cell.images for figure in found} == {12}
    smoothing, noised = (by_defence[name].cell.threat.settings for name in ("smoothing", "noised-votes"))
    assert noised["samples"] == bundle.manifest.samples
    costs = by_defence["smoothing"].measured.multiply_adds
    assert smoothing["samples"] * costs["classifier"] == pytest.approx(noised["samples"] * costs["vote"], rel=0.01)
    assert smoothing["noise"] in controls.NOISES
    names = {tried.attack for tried in by_defence["noised-votes"].trials}
    assert names >= {"apgd-ce-logits", "apgd-t-logits-1", "square-apgd-logits", "pgd-softmax"}
    before = results(tmp_path)
    evaluation(bundle, data, tmp_path).controls([0.1], **arguments)
    assert results(tmp_path) == before  # nothing is made twice


def test_judging_again_counts_every_image_that_an_attack_made(bundle, data, tmp_path):
    measured = evaluation(bundle, data, tmp_path)
    measured.controls([0.3], validation=data)
    found = {figure.cell.defence: figure for figure in figures.read(tmp_path)[0]}
    made = sum(len(np.load(path)["rows"]) for path in (tmp_path / "work" / "adaptive-0.30").glob("*.npz"))
    (tried,) = found["votes-10"].trials
    assert tried.settings == {"images": made}
    assert found["votes-1"].cell.correct <= found["votes-1500"].cell.correct


def test_the_vote_over_noise_ends_early_as_the_service_does_and_without_noise_says_what_the_fast_path_says(
    bundle, data
):
    sessions, rows = pipeline_of(bundle).sessions, torch.arange(40)
    said = torch.from_numpy(sessions.first_pass(data.pixels().numpy()).probabilities.argmax(axis=1))

    def judge(noise: float, *, risk: float, seed: int = 0) -> controls.NoisedVote:
        counting = Counting(samples=400, draws=1, risk=risk)
        return controls.NoisedVote(sessions, noise=noise, classes=10, counting=counting, seed=seed)

    assert judge(0.0, risk=1e-6)(data.pixels(), said, rows, 0).all()
    early, whole = (judge(0.3, risk=risk)(data.pixels(), said, rows, 0) for risk in (1e-6, 0.0))
    assert torch.equal(early, whole)
    assert torch.equal(judge(0.3, risk=1e-6)(data.pixels(), said, rows, 0), early)
    part = torch.tensor([3, 17, 30])
    assert torch.equal(judge(0.3, risk=1e-6)(data.pixels()[part], said[part], part, 0), early[part])


def test_fixed_latents_are_judged_on_the_graphs_as_they_are_attacked(bundle, data):
    system = system_of(bundle)
    latents = torch.randn(3, system.latent, generator=torch.Generator().manual_seed(0))
    judge = controls.FixedVote(pipeline_of(bundle).sessions, latents.numpy(), classes=10)
    _, scores = system(data.pixels(), latents.repeat_interleave(40, dim=0))
    elected = torch.nn.functional.one_hot(scores.argmax(dim=2), 10).sum(dim=0).argmax(dim=1)
    assert judge(data.pixels(), elected, torch.arange(40), 0).float().mean() >= 0.95  # but for rounding


def test_multiply_adds_are_counted_by_hand():
    system = system_of(Bundle.load(SHIPPED))
    classifier = 784 * 200 + 200 * 80 + 80 * 10
    found = costs(system, shape=(1, 28, 28))
    assert found["classifier"] == classifier
    assert found["image"] == classifier + 290 * 174 + 174 * 58 + 58 * 1244
    assert found["vote"] == 36 * 1244 + 1244 * 1014 + 1014 * 784 + classifier


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
    with np.load(path) as arrays:
        (kept,) = arrays["images"][~arrays["survived"]]
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
    sees = "classifier" if protocol == "strong" else "system"
    threat = Threat(attack=protocol, norm="linf", eps=eps, sees=sees, settings={"steps": 7, "noise": 0.1})
    return Figure(
        protocol=protocol,
        measured=figures.Measured(
            bundle="b", networks="0" * 64, dataset="mnist", split="test", subset="all 200", device="cpu", versions={}
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
    assert "| clean | eps 0.15 | eps 0.30 |" in text
    assert "| 99.0 [96.4, 99.7] | 75.0 [68.6, 80.5] | 50.0 [43.1, 56.9] |" in text
    assert not report.update(page)
    assert run(monkeypatch, "report", str(page), "--check") == 0
    figures.write(folder, figure(eps=0.3, correct=99))
    assert run(monkeypatch, "report", str(page), "--check") == 1
    assert "carso-train report" in capsys.readouterr().err


def test_systems_stand_side_by_side_with_what_their_purifiers_add_or_take(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- compared: one two -->\n<!-- end -->\n")
    for name, whole, alone in (("one", 100, 120), ("two", 150, 120)):
        (tmp_path / "page" / name).mkdir(parents=True)
        for protocol, defence, correct in (("adaptive", "carso", whole), ("strong", "classifier", alone)):
            figures.write(
                tmp_path / "page" / name, figure(eps=0.3, correct=correct, defence=defence, protocol=protocol)
            )
    report.update(page)
    lines = [line for line in page.read_text().splitlines() if line.startswith(("| one", "| two"))]
    assert "| 0.30 | 50.0 [43.1, 56.9] | 60.0 [53.1, 66.5] | -10.0 points | 200 |" in lines[0]
    assert "| +15.0 points |" in lines[1]


def test_rays_finds_a_boundary_from_labels_alone_within_its_queries():
    data, system = dataset("mnist").load("test"), system_of(Bundle.load(SHIPPED))
    images, labels, asked = data.pixels(slice(20)), data.labels[:20], []

    def decisions(x: Tensor) -> Tensor:
        asked.append(len(x))
        return system.classifier_scores()(x).argmax(dim=1)

    found = rays(decisions, images, labels, eps=0.4, queries=300)
    assert len(asked) <= 300
    assert sum(asked) < 20 * 300  # those whose boundary is near ask no more
    assert float((found - images).abs().max()) <= 0.4 + 1e-6
    assert int((decisions(found) != labels).sum()) >= 10
    one = rays(decisions, images, labels, eps=0.4, queries=1)
    assert int((decisions(one) != labels).sum()) < 10


def test_a_running_service_is_attacked_by_labels_alone_and_a_stopped_attack_goes_on(
    bundle, data, server, tmp_path, monkeypatch, capsys
):
    measured = evaluation(bundle, data, tmp_path, images=3)
    found = []

    def attack() -> dict[Path, int]:
        """Attack, and return the files of the images that are done, with the times at which they were written."""
        with Client(server.url, retries=0) as client:
            measured.blackbox([0.3], service=Service(client, bundle), queries=12, report=found.append)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}

    done = attack()
    (seen,) = found
    assert seen == figures.read(tmp_path)[0][0]
    assert seen.cell.kind == "black-box"
    assert seen.cell.threat.settings == {"queries": 12, "draws": TINY.draws}
    assert [tried.attack for tried in seen.trials] == ["clean", "rays-10", "rays-12"]
    assert seen.cell.correct <= seen.clean <= 3
    for tried in seen.trials:
        answers = sum(tried.answers.values())
        assert answers <= tried.attacked * (tried.settings.get("queries", 0) + TINY.draws)
        assert answers >= tried.attacked
        assert tried.answers.keys() <= {"classified", "blank_image", "wrong_scale"}

    last = max(done)
    last.unlink()
    again = attack()
    assert {path: time for path, time in again.items() if path in done.keys() - {last}} == {
        path: time for path, time in done.items() if path != last
    }
    assert again[last] > done[last]
    assert found[1].trials[0].answers == seen.trials[0].answers
    with Client(server.url) as client, pytest.raises(RunError, match="CARSO_BUNDLE"):
        Service(client, Bundle.load(SHIPPED))
    assert run(monkeypatch, "evaluate", str(SHIPPED), "--protocol", "blackbox") == 2
    assert "--url" in capsys.readouterr().err


def test_a_service_that_is_busy_is_asked_again_when_it_says_so_and_other_refusals_end_the_attack(bundle, server):
    info = Reply(200, httpx.get(f"{server.url}/info").json())
    busy, loading = refusal(429, "overloaded", retry_after=7), refusal(503, "not_ready")
    image, slept = torch.rand(1, 1, 8, 8), []
    with (
        scripted(info, busy, loading, LABEL_ONLY, refusal(401, "unauthorized"), busy) as fake,
        Client(fake.url, retries=0) as client,
    ):
        service = Service(client, bundle, sleep=slept.append)
        assert service.labels(image).tolist() == [3]
        assert service.answers() == {"overloaded": 1, "not_ready": 1, "classified": 1}
        assert slept == [7.0, 1.0]
        with pytest.raises(RequestRefused, match="unauthorized"):
            service.labels(image)
        with pytest.raises(Unavailable, match="overloaded"):
            service.labels(image)
    assert sum(slept[2:]) <= PATIENCE
    assert service.answers() == {"overloaded": len(slept[2:])}


def test_an_image_that_is_refused_fools_nobody_but_a_clean_one_was_not_right_either(bundle, server):
    info = Reply(200, httpx.get(f"{server.url}/info").json())
    with scripted(info, refusal(409, "near_duplicate")) as fake, Client(fake.url, retries=0) as client:
        service = Service(client, bundle)
        judge = ServiceJudge(service, draws=1)
        image, label, row = torch.rand(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0])
        assert [judge(image, label, row, trial).item() for trial in (0, 1)] == [False, True]
        assert service.answers() == {"near_duplicate": 2}


def test_the_strip_shows_images_of_the_attacks_those_that_fool_it_too(bundle, data, tmp_path):
    measured = evaluation(bundle, data, tmp_path)
    path = measured.strip(0.3)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert len(first) < 200_000
    assert measured.strip(0.3).read_bytes() == first
    images = np.zeros((1, 8, 8), np.float32)
    columns = [
        strip.Column(label=label, clean=images, attacked=images, fooled=fooled)
        for fooled in (True, False)
        for label in (1, 1, 2, 3, 4, 5, 6)
    ]
    picked = strip.chosen(columns)
    assert [column.fooled for column in picked] == [False] * 5 + [True] * 5
    assert [column.label for column in picked] == [1, 2, 3, 4, 5] * 2


def test_the_plots_are_drawn_from_the_figures_and_the_same_figures_give_the_same_plot(tmp_path):
    assert plots.accuracy({}) is None
    assert plots.cost({"one": [figure(eps=0.15, correct=100)]}) is None  # not of this eps
    systems = {
        "first": [figure(eps=0.15, correct=150), figure(eps=0.3, correct=100)],
        "second": [figure(eps=0.3, correct=60, defence="classifier", protocol="strong")],
    }
    drawn = plots.accuracy(systems)
    assert "first: CARSO, adaptive" in drawn and "second: its classifier alone" in drawn  # text stays text
    assert plots.accuracy(systems) == drawn
    systems["first"][1] = figure(eps=0.3, correct=99)
    assert plots.accuracy(systems) != drawn
    for name, found in systems.items():
        for each in found:
            costly = each.measured.model_copy(update={"multiply_adds": {"vote": 2_000_000}})
            (tmp_path / name).mkdir(exist_ok=True)
            figures.write(tmp_path / name, each.model_copy(update={"measured": costly}))
    assert plots.write(tmp_path) == [tmp_path / "accuracy.svg", tmp_path / "cost.svg"]
    assert (tmp_path / "accuracy.svg").read_text() == plots.accuracy(systems)
    assert "adaptive accuracy at eps 0.30" in (tmp_path / "cost.svg").read_text()


def test_figures_are_recorded_in_the_bundle_with_the_adaptive_ones_first(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(SHIPPED, folder)
    before = Bundle.load(folder)
    mine = figures.networks(before)

    def of(figure: Figure, **changes: object) -> Figure:
        return figure.model_copy(update={"measured": figure.measured.model_copy(update={"networks": mine} | changes)})

    out = tmp_path / "figures"
    out.mkdir()
    for each in (
        figure(eps=0.3, correct=160, defence="classifier", protocol="strong"),
        figure(eps=0.15, correct=180),
        figure(eps=0.3, correct=120),
        figure(eps=0.3, correct=1, defence="smoothing", protocol="controls"),
        figure(eps=0.3, correct=119, defence="votes-1500", protocol="controls"),
        figure(eps=0.3, correct=118, defence="int8", protocol="controls"),
    ):
        figures.write(out, of(each))
    for _ in range(2):  # a second time, nothing is there twice
        assert run(monkeypatch, "record", str(folder), str(out)) == 0
        after = Bundle.load(folder)
        measured = [(cell.threat.attack, cell.threat.eps, cell.correct) for cell in after.manifest.table[:3]]
        assert measured == [("adaptive", 0.15, 180), ("adaptive", 0.3, 120), ("strong", 0.3, 160)]
        kept = [cell for cell in before.manifest.table if cell.threat.attack not in ("adaptive", "strong", "blackbox")]
        assert list(after.manifest.table[3:]) == kept
        recounts = [(each.threat.eps, each.correct_float32, each.correct_int8) for each in after.manifest.recounts]
        assert recounts == [(0, 198, 198), (0.3, 119, 118)]
    assert figures.networks(after) == mine  # so that the figures go on being this bundle's
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "mine"]
    card = (folder / "MODEL_CARD.md").read_text()
    assert card.index("eps 0.15") < card.index("fgsm-0.15")
    assert re.search(r"\| eps 0\.30 \| 60\.00 \[[\d., ]+\] \| 80\.00 \[[\d., ]+\] \|", card)
    figures.write(out, of(figure(eps=0.3, correct=120), split="validation"))
    assert run(monkeypatch, "record", str(folder), str(out)) == 1
    figures.write(out, figure(eps=0.3, correct=120))
    assert run(monkeypatch, "record", str(folder), str(out)) == 1
    said = capsys.readouterr().err
    assert "is of validation images" in said
    assert "was measured on other networks" in said


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


@pytest.mark.parametrize("page", ["README.md", "docs/robustness.md"])
def test_the_tables_of_a_page_are_what_its_figures_say(page):
    assert (ROOT / page).read_text() == report.updated(ROOT / page)


def test_a_headline_has_the_adaptive_figure_first_and_no_other_strengths(tmp_path):
    page, folder = tmp_path / "README.md", tmp_path / "docs" / "mine"
    folder.mkdir(parents=True)
    page.write_text("<!-- headline: docs/mine -->\n<!-- end -->\n")
    figures.write(folder, figure(eps=0.3, correct=150))
    for eps in (0.1, 0.3):
        figures.write(folder, figure(eps=eps, correct=100, defence="classifier", protocol="strong"))
    report.update(page)
    heads, _, *rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert heads.endswith("| clean | eps 0.30 |")
    assert ["adaptive" in row for row in rows] == [True, False]
    assert "75.0 [68.6, 80.5]" in rows[0] and "50.0 [43.1, 56.9]" in rows[1]


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
