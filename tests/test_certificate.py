"""Proofs by the bundle's own graphs, in ONNX Runtime: what is proven holds for every image that is tried."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from carso.bundle import BOUNDS, EARLIER_BOUNDS, Bundle
from carso.choices import CPU, CUDA
from carso.inference.abilities import DeviceError
from carso.inference.certificate import BISECTIONS, STEPS, certificate, largest, rounded_up, unproven
from carso.inference.sessions import Sessions
from carso_training.attacks.linf import climb
from carso_training.datasets.examples import Examples
from carso_training.export import weights
from carso_training.export.files import export
from carso_training.export.graphs import BoundsGraph
from carso_training.networks.bounds import UnboundedLayerError, box_of, margins
from carso_training.networks.fcn import FcnClassifier
from carso_training.robustness.certified import certified
from carso_training.robustness.report import as_markdown
from onnx import TensorProto, helper

from tests.bundles import COLOUR, REFERENCE, SMALL, copy_of, random_images, random_system, shared_bundle
from tests.test_bundle import reseal

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = {"small": SMALL, "colour": COLOUR, "reference": REFERENCE}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_the_graph_gives_the_margins_that_the_networks_bounds_give(config):
    bundle = Bundle.load(shared_bundle(config))
    sessions = Sessions(bundle, device="cpu", threads=1)
    images = random_images(20, config, seed=7)
    eps = np.linspace(0, 0.3, 20, dtype=np.float32)
    found, plain = sessions.first_pass_with_bounds(images, eps), sessions.first_pass(images)
    with torch.no_grad():
        graph = BoundsGraph(weights.classifier_of(bundle), weights.purifier_of(bundle)).eval()
        _, _, margins = graph(torch.from_numpy(images), torch.from_numpy(eps))
    np.testing.assert_allclose(found.margins, margins, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, plain.probabilities, atol=1e-6)  # it is the first pass as well
    np.testing.assert_allclose(found.codes, plain.codes, atol=1e-6)


def proven_images(config, *, count: int) -> tuple[Sessions, np.ndarray, np.ndarray, np.ndarray]:
    """Images of which something is proven, with their labels and the largest eps of each."""
    sessions = Sessions(Bundle.load(shared_bundle(config)), device="cpu", threads=1)
    images = random_images(count, config, seed=8)
    labels = sessions.first_pass(images).probabilities.argmax(axis=1)
    eps = np.zeros(count, np.float32)
    for step in range(56):  # finer than `max`: random networks are steep, and little is proven of them
        tried = np.full(count, 2.0 ** (step / 4 - 20), np.float32)
        eps = np.where(sessions.first_pass_with_bounds(images, tried).margins > 0, tried, eps)
    return sessions, images[eps > 0], labels[eps > 0], eps[eps > 0]


def points_of(images: np.ndarray, eps: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random point or a corner of the box of each image."""
    width = eps.reshape(-1, 1, 1, 1)
    low, high = np.clip(images - width, 0, 1), np.clip(images + width, 0, 1)
    share = random.random(images.shape, dtype=np.float32)
    if random.random() < 0.5:
        share = share.round()
    return np.clip(low + share * (high - low), low, high)


def check_points(config, *, count: int, tries: int) -> int:
    """Try random, corner and attacked points of proven boxes; return how many. Fails at one of another label."""
    sessions, images, labels, eps = proven_images(config, count=count)
    assert len(images) > count / 5
    random, tried = np.random.default_rng(9), 0
    for _ in range(tries):
        found = sessions.first_pass(points_of(images, eps, random)).probabilities.argmax(axis=1)
        assert (found == labels).all()
        tried += len(images)
    classifier = weights.classifier_of(Bundle.load(shared_bundle(config)))
    x, y, width = torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(eps).view(-1, 1, 1, 1)
    for other in range(config.classifier.classes):

        def loss(given, other=other):
            scores = classifier(given)
            return scores[:, other] - scores.gather(1, y.unsqueeze(1))[:, 0]

        attacked = climb(loss, x, x, eps=width, steps=20, step_size=width / 8)
        attacked = torch.minimum(torch.maximum(attacked, x - width), x + width).clamp(0, 1)
        found = sessions.first_pass(attacked.numpy()).probabilities.argmax(axis=1)
        assert (found == labels).all()
        tried += len(images)
    return tried


def test_no_point_of_a_proven_box_gets_another_label(config):
    assert check_points(config, count=150, tries=100) > 2000


@pytest.mark.slow
def test_no_point_of_a_million_gets_another_label():
    assert check_points(SMALL, count=4000, tries=1200) > 1_000_000


def test_what_is_proven_at_some_eps_is_proven_at_every_smaller_one(config):
    sessions, images, labels, eps = proven_images(config, count=100)
    for share in (0.0, 0.3, 0.9):
        found = sessions.first_pass_with_bounds(images, eps * np.float32(share))
        assert (found.margins > 0).all() and (found.probabilities.argmax(axis=1) == labels).all()


def test_nothing_is_proven_of_another_label_than_the_first_passs(config):
    _, images, labels, eps = proven_images(config, count=100)
    layers = weights.classifier_of(Bundle.load(shared_bundle(config))).chain()
    other = torch.from_numpy((labels + 1) % config.classifier.classes)
    with torch.no_grad():
        leads = margins(layers, box_of(*map(torch.from_numpy, (images, eps))), other, slack=True)
    assert (leads.amin(dim=1) < 0).all()


def test_max_finds_the_largest_step_that_is_proven_in_seven_passes():
    limits = np.array([0.0, 0.004, 1 / STEPS, 0.3, 0.5, 0.999, 2.0])
    passes = []

    def margins_of(images, eps):
        passes.append(eps)
        return np.where(eps <= limits, limits - eps + 0.5, -1.0).astype(np.float32)

    found = largest(margins_of, np.zeros((7, 1, 2, 2), np.float32))
    assert [None if each is None else each.eps * STEPS for each in found] == [None, None, 1, 38, 64, 127, 127]
    assert len(passes) == BISECTIONS == 7
    assert [each is None or each.margin > 0 for each in found] == [True] * 7


@pytest.mark.parametrize(("margin", "proves"), [(0.25, True), (0.0, False), (-3.0, False), (float("nan"), False)])
def test_only_a_margin_above_0_proves_something(margin, proves):
    found = certificate(0.35, margin)
    assert (found is not None) == proves
    if found is not None:
        assert (found.eps, found.margin) == (0.35, 0.25)


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 8 / 255, 1.0, 1e-9])
def test_an_eps_is_never_rounded_down(eps):
    assert isinstance(rounded_up(eps), np.float32)
    assert eps <= float(rounded_up(eps)) <= eps * (1 + 2**-23)


def test_an_attack_may_take_the_proof_of_an_image_and_never_a_label_that_is_proven(tmp_path):
    bundle, eps = Bundle.load(shared_bundle(SMALL)), 2.0**-9
    images = torch.from_numpy((255 * random_images(200, SMALL, seed=8)).astype(np.uint8))
    labels = Sessions(bundle, device="cpu", threads=1).first_pass(images.numpy() / np.float32(255))
    truth = torch.from_numpy(labels.probabilities.argmax(axis=1))
    truth[::4] = (truth[::4] + 1) % 10  # a quarter is misread
    given = {"data": Examples(images, truth), "split": "test", "out": tmp_path, "threads": 1}
    weak, strong = certified(bundle, **given, strengths=(eps / 2, eps), attacked_at=eps)
    assert (weak.clean, strong.clean) == (150, 150) and len(weak.trials) == 1
    _, half, whole = strong.trials
    assert (half.settings["eps"], whole.settings["eps"]) == (eps / 2, eps)
    proven = strong.cell.threat.settings["proven"]
    assert proven > strong.cell.correct > 20
    assert whole.attacked - whole.broken < proven  # the attack takes proofs
    for trial in (half, whole):
        assert trial.settings["wrong"] > 50  # and labels that were not proven
        assert 0 < trial.settings["proven_and_wrong"] < trial.settings["wrong"]  # a wrong label may be proven, too
        assert trial.settings["wrong_of_right_and_proven"] == 0
    assert "pgd takes the proof" in as_markdown(tmp_path)


# --- where it is not proven -------------------------------------------------------------------------------------------


def test_an_older_bundle_still_runs_and_says_how_to_get_proofs(tmp_path):
    folder = without_bounds(tmp_path)
    sessions = Sessions(Bundle.load(folder), device="cpu", threads=1)
    assert sessions.first_pass(random_images(1)).probabilities.shape == (1, 10)
    assert sessions.unproven == f"bundle random has no {BOUNDS}: add it with `carso-train bounds {folder}`"


def test_a_bundle_with_the_bounds_of_an_earlier_release_is_read_and_says_how_to_get_proofs(tmp_path):
    folder = copy_of(shared_bundle(SMALL), tmp_path / "earlier")
    (folder / BOUNDS).rename(folder / EARLIER_BOUNDS)  # of other inputs and outputs, and no longer asked
    reseal(folder)
    bundle = Bundle.load(folder)
    sessions = Sessions(bundle, device="cpu", threads=1)
    assert bundle.self_test.margins is not None
    assert sessions.unproven == f"bundle random has no {BOUNDS}: add it with `carso-train bounds {folder}`"
    with pytest.raises(DeviceError, match=f"nothing can be proven here: bundle random has no {BOUNDS}"):
        sessions.first_pass_with_bounds(random_images(1), np.zeros(1, np.float32))


def without_bounds(tmp_path: Path) -> Path:
    """A bundle as earlier releases exported it."""
    folder = copy_of(shared_bundle(SMALL), tmp_path / "older")
    with np.load(folder / "self_test.npz") as arrays:
        kept = {name: array for name, array in arrays.items() if name != "margins"}
    np.savez(folder / "self_test.npz", **kept)
    (folder / BOUNDS).unlink()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["unbounded"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    reseal(folder)
    return folder


def test_tf32_and_whatever_else_cuda_computes_with_is_refused_by_name():
    bundle = Bundle.load(shared_bundle(SMALL))
    assert unproven(bundle, provider=CPU) is None
    why = unproven(bundle, provider=CUDA)
    assert "float32 products" in why and "CUDAExecutionProvider, where products may be TF32" in why
    assert "CARSO_DEVICE=cpu" in why


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_votes_in_int8_change_no_proof_since_first_passes_are_float32(precision):
    sessions = Sessions(Bundle.load(shared_bundle(SMALL)), device="cpu", threads=1, precision=precision)
    assert sessions.unproven is None


class Smooth(FcnClassifier):
    """A classifier with a layer that bounds cannot be taken through."""

    def chain(self):
        return [*super().chain(), torch.nn.Softsign()]


def test_a_network_with_another_layer_is_exported_without_bounds_and_the_bundle_says_why(tmp_path):
    classifier, purifier = random_system(SMALL)
    classifier.__class__ = Smooth
    images = torch.from_numpy(random_images(8))
    because = export(classifier=classifier, purifier=purifier, images=images, folder=tmp_path)
    assert because.startswith("bounds cannot be taken through Softsign; they can be through Conv2d")
    assert not (tmp_path / BOUNDS).exists() and (tmp_path / "self_test.npz").exists()
    manifest = json.loads((shared_bundle(SMALL) / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"unbounded": because}))
    reseal(tmp_path)
    assert Sessions(Bundle.load(tmp_path), device="cpu", threads=1).unproven == (
        f"bundle random has no {BOUNDS}, since {because}"
    )


def test_a_network_that_is_no_chain_is_told_so():
    classifier, purifier = random_system(SMALL)
    classifier.chain = lambda: None
    with pytest.raises(UnboundedLayerError, match="the network fcn is not a chain of layers"):
        BoundsGraph(classifier, purifier)


def test_a_network_whose_bounds_overflow_is_told_so():
    classifier, purifier = random_system(SMALL)
    with torch.no_grad():
        for layer in (*classifier.hidden, classifier.last):
            layer.weight *= 1e15
    with pytest.raises(UnboundedLayerError, match="its bounds overflow float32"):
        BoundsGraph(classifier, purifier)


def test_bounds_of_other_weights_are_refused_at_the_start(tmp_path):
    folder = copy_of(shared_bundle(SMALL), tmp_path / "bundle")
    classifier, purifier = random_system(SMALL, seed=5)
    export(classifier=classifier, purifier=purifier, images=torch.from_numpy(random_images(8)), folder=tmp_path / "b")
    (folder / BOUNDS).write_bytes((tmp_path / "b" / BOUNDS).read_bytes())
    reseal(folder)
    with pytest.raises(
        DeviceError, match=f"margins are off by .*, and scores by .*{BOUNDS} was exported from other weights"
    ):
        Sessions(Bundle.load(folder), device="cpu", threads=1)


# --- what the proof takes for granted ---------------------------------------------------------------------------------


def by_onnx_runtime(operator: str, x: np.ndarray, **attributes: int) -> np.ndarray:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=[CPU]).run(None, {"x": x})[0]


def test_onnx_runtimes_sigmoid_is_as_near_to_the_exact_one_as_the_proof_needs():
    x = np.linspace(-90, 90, 3_000_000, dtype=np.float32).reshape(3, -1)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(by_onnx_runtime("Sigmoid", x) - exact).max() <= 2.0**-21


def test_onnx_runtimes_exponential_is_as_near_to_the_exact_one_as_the_proof_needs():
    lead = np.linspace(0, 20, 1_000_000, dtype=np.float32)
    probabilities = by_onnx_runtime("Softmax", np.stack([np.zeros_like(lead), -lead], axis=1), axis=1)
    ratio = probabilities[:, 1].astype(np.float64) / probabilities[:, 0].astype(np.float64)
    assert np.abs(ratio / np.exp(-lead.astype(np.float64)) - 1).max() <= 2.0**-20
