"""The exported graphs against the torch networks they come from."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from carso.bundle import Bundle, sealed
from carso.inference.sessions import Sessions
from carso_training.export.files import export
from carso_training.export.graphs import FirstPassGraph, VoteGraph
from carso_training.export.weights import classifier_of, purifier_of, second_pass_of
from carso_training.networks.fcn import FcnClassifier, FcnPurifier
from carso_training.networks.folding import fold
from carso_training.networks.interface import Classifier, Purifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.bundles import COLOUR, REFERENCE, SMALL, random_images, random_system, shared_bundle

CONFIGS = {"small": SMALL, "colour": COLOUR, "reference": REFERENCE}
TOLERANCE = 1e-4  # float32, networks whose random weights make steeper functions than trained ones


@cache
def sessions_of(name: str) -> Sessions:
    return Sessions(Bundle.load(shared_bundle(CONFIGS[name])), device="cpu", threads=1)


@cache
def system_of(name: str) -> tuple[FcnClassifier, FcnPurifier]:
    return random_system(CONFIGS[name])


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


def latents_of(name: str, rows: int) -> Tensor:
    return torch.randn(rows, CONFIGS[name].purifier.latent, generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def by_torch(name: str, images: np.ndarray, code_index: np.ndarray, latents: Tensor) -> tuple[np.ndarray, ...]:
    """Probabilities, codes, purified images, and their scores."""
    classifier, purifier = system_of(name)
    first = classifier.represent(torch.from_numpy(images))
    codes = purifier.encode(first.representation)
    purified = purifier.decode(codes[torch.from_numpy(code_index)], latents)
    return tuple(x.numpy() for x in (first.log_probs.exp(), codes, purified, classifier(purified)))


@given(images=st.integers(1, 40), rows=st.integers(1, 200), data=st.data())
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("config", CONFIGS)
def test_both_graphs_compute_what_the_networks_compute_at_any_batch_size(config, images, rows, data):
    x = random_images(images, CONFIGS[config], seed=images)
    seed = data.draw(st.integers(0, 1000))
    code_index = np.random.default_rng(seed).integers(0, images, rows)
    latents = latents_of(config, rows)
    probabilities, codes, purified, scores = by_torch(config, x, code_index, latents)

    sessions = sessions_of(config)
    first = sessions.first_pass(x)
    np.testing.assert_allclose(first.probabilities, probabilities, atol=TOLERANCE)
    np.testing.assert_allclose(first.codes, codes, atol=TOLERANCE)
    np.testing.assert_allclose(sessions.purify(codes, code_index, latents.numpy()), purified, atol=TOLERANCE)
    votes = sessions.vote(codes, code_index, latents.numpy())
    # a vote may differ only where two classes are level within the tolerance
    assert (scores.max(axis=1) - np.take_along_axis(scores, votes[:, None], axis=1)[:, 0] <= 10 * TOLERANCE).all()


def test_a_batch_norm_with_any_statistics_folds_into_the_next_layer():
    torch.manual_seed(0)
    norm, linear = nn.BatchNorm1d(50), nn.Linear(50, 20)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_(std=3)
    norm.running_var.uniform_(0.01, 10)
    x = torch.randn(100, 50)
    with torch.no_grad():
        torch.testing.assert_close(fold(norm.eval(), linear)(x), linear(norm(x)), atol=1e-4, rtol=1e-4)


def test_the_votes_of_a_random_bundle_differ_so_that_their_parity_says_something(name):
    votes = Bundle.load(shared_bundle(CONFIGS[name])).self_test.votes
    assert len(np.unique(votes)) > 1
    assert np.bincount(votes).max() < 0.9 * len(votes)


def test_every_row_dimension_is_dynamic_and_the_others_are_fixed(name):
    config = CONFIGS[name]
    shape, classes = config.classifier.input_shape, config.classifier.classes
    expected = {
        "first_pass.onnx": {
            "images": shape,
            "probabilities": (classes,),
            "codes": (config.purifier.code,),
        },
        "first_pass_with_bounds.onnx": {
            "images": shape,
            "eps": (),
            "probabilities": (classes,),
            "codes": (config.purifier.code,),
            "margins": (),
        },
        "vote.onnx": {
            "codes": (config.purifier.code,),
            "code_index": (),
            "latents": (config.purifier.latent,),
            "votes": (),
            "purified": shape,
        },
    }
    for file, tensors in expected.items():
        graph = onnx.load(shared_bundle(config) / file).graph
        found = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
        assert set(found) == set(tensors)
        for tensor, (rows, *others) in found.items():
            assert rows.dim_param and not rows.dim_value
            assert tuple(dim.dim_value for dim in others) == tensors[tensor]


def test_the_graphs_hold_no_batch_norm_and_no_randomness(name):
    for file in ("first_pass.onnx", "vote.onnx"):
        graph = onnx.load(shared_bundle(CONFIGS[name]) / file).graph
        operators = {node.op_type for node in graph.node}
        assert not {op for op in operators if "BatchNorm" in op or "Dropout" in op or "Random" in op}


def test_the_safetensors_reload_to_the_same_networks(name):
    bundle = Bundle.load(shared_bundle(CONFIGS[name]))
    images = torch.from_numpy(random_images(5, CONFIGS[name]))
    latents = latents_of(name, 5)
    original, original_purifier = system_of(name)
    with torch.no_grad():
        first, expected = classifier_of(bundle).represent(images), original.represent(images)
        torch.testing.assert_close(first.log_probs, expected.log_probs)
        purifier = purifier_of(bundle)
        code, expected_code = purifier.encode(first.representation), original_purifier.encode(expected.representation)
        torch.testing.assert_close(code, expected_code)
        purified = purifier.decode(code, latents)
        torch.testing.assert_close(purified, original_purifier.decode(expected_code, latents))
        torch.testing.assert_close(second_pass_of(bundle)(purified), original(purified))


def test_another_classifier_may_vote_than_the_one_of_the_first_pass(tmp_path):
    (first_pass, purifier), (voter, _) = random_system(SMALL), random_system(SMALL, seed=1)
    images = torch.from_numpy(random_images(8, SMALL))
    export(classifier=first_pass, purifier=purifier, second_pass=voter, images=images, folder=tmp_path)
    manifest = Bundle.load(shared_bundle(SMALL)).manifest.model_dump(exclude={"schema_version", "files"})
    sealed(tmp_path, manifest)

    bundle = Bundle.load(tmp_path)  # its self-test holds the votes of the networks below
    sessions = Sessions(bundle, device="cpu", threads=1)
    code_index = np.arange(200) % 8
    latents = latents_of("small", 200)
    with torch.no_grad():
        first = first_pass.represent(images)
        codes = purifier.encode(first.representation)
        purified = purifier.decode(codes[torch.from_numpy(code_index)], latents)
        expected, of_the_first = voter(purified).argmax(dim=1).numpy(), first_pass(purified).argmax(dim=1).numpy()
        torch.testing.assert_close(second_pass_of(bundle)(purified), voter(purified))
        torch.testing.assert_close(classifier_of(bundle)(images), first.log_probs)
    votes = sessions.vote(codes.numpy(), code_index, latents.numpy())
    assert (votes == expected).mean() > 0.98
    assert (votes == of_the_first).mean() < 0.9


class Unfolded:
    """A network whose architecture gives no cheaper form for export: the interface's own forms are used."""

    folded = Classifier.folded
    folded_encoder = Purifier.folded_encoder
    folded_decoder = Purifier.folded_decoder


class PlainClassifier(Unfolded, FcnClassifier):
    pass


class PlainPurifier(Unfolded, FcnPurifier):
    pass


def test_networks_without_a_folded_form_are_exported_as_they_are():
    classifier, purifier = PlainClassifier(SMALL.classifier).eval(), PlainPurifier(SMALL.purifier).eval()
    classifier.load_state_dict(system_of("small")[0].state_dict())
    purifier.load_state_dict(system_of("small")[1].state_dict())
    first_pass, vote = FirstPassGraph(classifier, purifier), VoteGraph(purifier, second_pass=classifier)
    test = Bundle.load(shared_bundle(SMALL)).self_test
    with torch.no_grad():
        probabilities, codes = first_pass(torch.from_numpy(test.images))
        votes, _ = vote(*map(torch.from_numpy, (test.codes, test.code_index, test.latents)))
    np.testing.assert_allclose(probabilities, test.probabilities, atol=TOLERANCE)
    np.testing.assert_allclose(codes, test.codes, atol=TOLERANCE)
    assert (votes.numpy() == test.votes).mean() > 0.98


def test_the_graphs_say_nothing_of_the_machine_that_exported_them(name):
    for file in ("first_pass.onnx", "first_pass_with_bounds.onnx", "vote.onnx", "vote_int8.onnx"):
        assert b".py" not in (shared_bundle(CONFIGS[name]) / file).read_bytes()


def test_the_reference_networks_have_the_published_sizes():
    classifier, purifier = FcnClassifier(REFERENCE.classifier), FcnPurifier(REFERENCE.purifier)
    assert sum(p.numel() for p in classifier.parameters()) == 174_450
    assert REFERENCE.classifier.representation == REFERENCE.purifier.representation == 290
    assert sum(p.numel() for p in purifier.code_encoder.parameters()) == pytest.approx(61_000, rel=0.01)
    assert sum(p.numel() for p in purifier.decoder.parameters()) == pytest.approx(2_180_000, rel=0.01)


def test_the_widest_products_are_in_int8_and_their_float_weights_are_gone(name):
    plain, int8 = (onnx.load(shared_bundle(CONFIGS[name]) / file).graph for file in ("vote.onnx", "vote_int8.onnx"))
    made = [node for node in int8.node if node.op_type == "MatMulIntegerToFloat"]
    sizes = {
        tensor.name: np.prod(tensor.dims) for tensor in int8.initializer if tensor.data_type == onnx.TensorProto.INT8
    }
    assert len(made) == len(sizes) == (3 if name == "reference" else 4)
    whole = sum(np.prod(tensor.dims) for tensor in plain.initializer if len(tensor.dims) == 2)
    assert sum(sizes.values()) > 0.85 * whole
    assert sum(np.prod(tensor.dims) for tensor in int8.initializer if len(tensor.dims) == 2) == whole
    assert [(i.name, o.name) for i, o in zip(int8.input, int8.output, strict=False)] == [
        (i.name, o.name) for i, o in zip(plain.input, plain.output, strict=False)
    ]


def test_int8_votes_are_the_same_in_a_batch_as_alone(name):
    int8 = Sessions(Bundle.load(shared_bundle(CONFIGS[name])), device="cpu", precision="int8")
    codes = int8.first_pass(random_images(10, CONFIGS[name], seed=1)).codes
    code_index = np.arange(500) % 10
    latents = latents_of(name, 500).numpy()
    whole = int8.vote(codes, code_index, latents)
    parts = [int8.vote(codes, code_index[i : i + 7], latents[i : i + 7]) for i in range(0, 500, 7)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_int8_purified_images_are_close_to_float32_ones(name):
    int8 = Sessions(Bundle.load(shared_bundle(CONFIGS[name])), device="cpu", precision="int8")
    codes = int8.first_pass(random_images(10, CONFIGS[name], seed=1)).codes
    ballots = (codes, np.arange(100) % 10, latents_of(name, 100).numpy())
    plain, coarse = sessions_of(name).purify(*ballots), int8.purify(*ballots)
    assert plain.shape == coarse.shape
    assert np.abs(plain - coarse).mean() < 0.05  # random weights are steeper than trained ones
