"""The bundles that are shipped, and the samples that the README shows the one with that is served by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from carso.bundle import Bundle, Cell
from carso.inference.sessions import Sessions
from carso.settings import REFERENCE_BUNDLE
from carso_training.datasets import dataset
from carso_training.recipe import PRESETS, Recipe
from carso_training.robustness.card import model_card
from carso_training.robustness.published import PUBLISHED_ACCURACIES, RISK
from carso_training.robustness.table import wilson

from tests.server import serving

ROOT = Path(__file__).parents[1]
PUBLISHED_SIZES = ROOT / "models" / "mnist-fcn"  # the published networks, hardened
SAMPLES = ROOT / "docs" / "samples"

# Every cell that must beat the published one: CARSO and IAT at eps <= 0.30, and CARSO on clean images
HELD = [
    *(("carso", attack) for attack in ("clean",)),
    *(
        (defence, f"{kind}-{eps}")
        for defence in ("classifier", "carso")
        for kind in ("fgsm", "pgd", "deepfool")
        for eps in ("0.15", "0.30")
    ),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("reference") / "log"
    with serving(REFERENCE_BUNDLE, log) as server, server.client() as connected:
        yield connected


def test_the_bundle_that_is_served_by_default_is_intact_complete_and_small() -> None:
    manifest = Bundle.load(REFERENCE_BUNDLE).manifest
    weights = {"classifier.safetensors", "code_encoder.safetensors", "decoder.safetensors", "second_pass.safetensors"}
    assert weights | {"MODEL_CARD.md", "samples/samples.json"} <= set(manifest.files)
    assert sum(path.stat().st_size for path in REFERENCE_BUNDLE.rglob("*") if path.is_file()) < 15e6
    assert manifest.name == manifest.recipe["name"] == "mnist-conv"
    assert manifest.samples == 1500
    assert len(list(SAMPLES.glob("*.png"))) == 6


@pytest.mark.parametrize("folder", [REFERENCE_BUNDLE, PUBLISHED_SIZES], ids=lambda folder: folder.name)
def test_the_shipped_tables_are_of_the_whole_test_set_and_above_the_published_numbers(folder: Path) -> None:
    table = Bundle.load(folder).manifest.table
    cells = {(c.defence, c.threat.name): c for c in table if c.threat.name in PUBLISHED_ACCURACIES}
    assert len(cells) == 30
    assert {cell.images for cell in cells.values()} == {10_000}
    short = [place for place in HELD if cells[place].accuracy <= cells[place].published]
    assert not short
    assert cells["classifier", "clean"].accuracy >= 97.0


@pytest.mark.parametrize("folder", [REFERENCE_BUNDLE, PUBLISHED_SIZES], ids=lambda folder: folder.name)
def test_the_shipped_tables_lead_with_an_attacker_who_knows_all_of_it(folder: Path) -> None:
    table = Bundle.load(folder).manifest.table
    assert [(cell.defence, cell.threat.name, cell.images) for cell in table[:2]] == [
        ("carso", "adaptive-0.15", 1000),
        ("carso", "adaptive-0.30", 1000),
    ]


def test_with_the_published_sizes_the_purifier_adds_to_its_classifier() -> None:
    table = Bundle.load(PUBLISHED_SIZES).manifest.table
    alone = {cell.threat.eps: cell for cell in table if cell.threat.attack == "strong"}
    for cell in table[:2]:
        assert cell.accuracy > alone[cell.threat.eps].accuracy


def test_no_bundle_that_ships_withstands_more_than_the_one_that_is_served_by_default() -> None:
    (best,) = _cells(REFERENCE_BUNDLE.name, "carso", "adaptive", eps=0.30)
    for folder in REFERENCE_BUNDLE.parent.iterdir():
        (cell,) = _cells(folder.name, "carso", "adaptive", eps=0.30)
        assert cell.accuracy <= best.accuracy


@pytest.mark.parametrize("folder", sorted(REFERENCE_BUNDLE.parent.iterdir()), ids=lambda folder: folder.name)
def test_a_bundles_recipe_is_the_preset_of_its_name_and_its_card_is_written_from_what_it_says(folder: Path) -> None:
    bundle = Bundle.load(folder)
    manifest = bundle.manifest
    recipe = Recipe.model_validate(manifest.recipe)
    assert recipe == PRESETS[folder.name]
    assert (folder / "MODEL_CARD.md").read_text() == model_card(
        recipe, manifest.table, risk=RISK, typical=manifest.typical, samples=bundle.samples
    )


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*-clean.png")), ids=lambda path: path.stem)
def test_a_clean_sample_is_classified_by_both_paths(client: httpx.Client, path: Path) -> None:
    (robust,) = _post(client, "/classify", path)
    (fast,) = _post(client, "/classify/fast", path)
    assert robust["class_name"] == fast["class_name"] == path.stem[0]
    assert robust["agree"]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*-pgd-0.30.png")), ids=lambda path: path.stem)
def test_an_attacked_sample_fools_the_fast_path_and_not_the_robust_one(client: httpx.Client, path: Path) -> None:
    (robust,) = _post(client, "/classify", path)
    (fast,) = _post(client, "/classify/fast", path)
    assert robust["class_name"] == path.stem[0]
    assert fast["class_name"] != path.stem[0]
    assert not robust["agree"]


def test_int8_votes_agree_with_float32_ones_but_for_a_few_in_a_thousand() -> None:
    bundle = Bundle.load(REFERENCE_BUNDLE)
    plain, int8 = (Sessions(bundle, device="cpu", precision=precision) for precision in ("float32", "int8"))
    codes = plain.first_pass(dataset("mnist").load("test").pixels(slice(400)).numpy()).codes
    ballots = (codes, np.repeat(np.arange(400), 20), np.random.default_rng(0).standard_normal((8000, 36), np.float32))
    assert (plain.vote(*ballots) != int8.vote(*ballots)).mean() < 0.005


def _post(client: httpx.Client, endpoint: str, path: Path) -> list[dict]:
    answer = client.post(endpoint, content=path.read_bytes(), headers={"content-type": "image/png"})
    return answer.raise_for_status().json()["predictions"]


def test_the_readme_says_of_the_other_bundles_what_was_measured() -> None:
    said = " ".join((ROOT / "README.md").read_text().split())
    for name, defence, attack in (
        ("mnist-fcn", "carso", "adaptive"),
        ("mnist-fcn", "classifier", "strong"),
        ("mnist-certified", "carso", "adaptive"),
    ):
        (cell,) = _cells(name, defence, attack, eps=0.30)
        low, high = wilson(cell.correct, cell.images)
        assert f"{cell.accuracy:.1f} % [{low:.1f}, {high:.1f}]" in said
    (proven,) = _cells("mnist-certified", "classifier", "certified", eps=0.30)
    assert f"for {proven.accuracy:.1f} % of the 10 000 test images" in said
    for name, defence in (("mnist-conv", "carso"), ("mnist-certified", "carso"), ("mnist-certified", "classifier")):
        (clean,) = _cells(name, defence, "none", eps=0)
        assert clean.images == 10_000 and f"{clean.accuracy:.2f} %" in said


def test_the_page_on_certificates_says_what_is_proven_by_the_bundle_that_ships() -> None:
    page = (ROOT / "docs" / "certificate.md").read_text()
    cells = [
        c for c in Bundle.load(ROOT / "models" / "mnist-certified").manifest.table if c.threat.attack == "certified"
    ]
    right = [100 * cell.correct / cell.images for cell in cells]
    wrong = [100 * (cell.threat.settings["proven"] - cell.correct) / cell.images for cell in cells]
    for what, row in (("right", right), ("wrong", wrong)):
        assert f"| {what} and proven, % | {' | '.join(f'{share:.1f}' for share in row)} |" in page


def _cells(bundle: str, defence: str, attack: str, *, eps: float) -> list[Cell]:
    table = Bundle.load(ROOT / "models" / bundle).manifest.table
    return [c for c in table if (c.defence, c.threat.attack, c.threat.eps) == (defence, attack, eps)]
