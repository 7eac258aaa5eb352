"""The differentiable form of a system against the graphs that ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from carso.bundle import Bundle
from carso.choices import CPU
from carso.inference.sessions import VOTE_TOLERANCE, Sessions
from carso_training.networks.system import AVERAGES, System, averaged
from carso_training.robustness.system import system_of

from tests.bundles import COLOUR, SMALL, shared_bundle

SHIPPED = Path(__file__).parents[1] / "models" / "mnist-fcn"
EXACT = 1e-5  # of scores, in float32 arithmetic of two libraries


@pytest.fixture(scope="module", params=["shipped", "small", "colour"])
def bundle(request) -> Bundle:
    folders = {"shipped": SHIPPED, "small": shared_bundle(SMALL), "colour": shared_bundle(COLOUR)}
    return Bundle.load(folders[request.param])


@pytest.fixture(scope="module")
def system(bundle) -> System:
    return system_of(bundle)


def test_it_gives_the_codes_probabilities_and_votes_of_the_self_test(bundle, system):
    test = bundle.self_test
    raw, codes = system.encode(torch.from_numpy(test.images))
    scores = system.classifier_scores(raw=False)(torch.from_numpy(test.images))
    assert np.abs(codes.numpy() - test.codes).max() < EXACT
    assert np.abs(torch.softmax(scores, dim=1).numpy() - test.probabilities).max() < EXACT
    assert raw.shape == scores.shape
    own = codes[torch.from_numpy(test.code_index)]
    _, votes = system.vote(own, torch.from_numpy(test.latents))
    assert votes.shape == (1, len(own), len(bundle.manifest.classes))
    assert (votes[0].argmax(dim=1).numpy() != test.votes).mean() <= VOTE_TOLERANCE[CPU, "float32"]


def test_it_votes_as_the_graphs_do_on_fresh_images_and_latents(bundle, system):
    sessions = Sessions(bundle, device="cpu", threads=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, *bundle.manifest.input.shape, generator=generator)
    latents = torch.randn(40 * 6, bundle.manifest.latent, generator=generator)
    codes = sessions.first_pass(images.numpy()).codes
    theirs = sessions.vote(codes, np.tile(np.arange(6), 40), latents.numpy()).reshape(40, 6)
    _, scores = system(images, latents)
    assert (scores.argmax(dim=2).numpy() != theirs).mean() <= VOTE_TOLERANCE[CPU, "float32"]


def test_raw_scores_are_those_before_the_last_activation(bundle, system):
    images = torch.rand(4, *bundle.manifest.input.shape)
    raw, scores = (system.classifier_scores(raw=raw)(images) for raw in (True, False))
    assert torch.allclose(torch.nn.functional.mish(raw), scores, atol=EXACT)


@pytest.mark.parametrize("average", AVERAGES)
def test_gradients_reach_the_image_through_everything(bundle, system, average):
    double = system.double_copy()
    shape = bundle.manifest.input.shape
    generator = torch.Generator().manual_seed(0)
    scores = double.held(average, votes=3, generator=generator)
    images = torch.rand(2, *shape, generator=generator).double().requires_grad_(True)
    way = torch.randn(2, *shape, generator=generator).double()
    (gradient,) = torch.autograd.grad(scores(images)[:, 0].sum(), images)
    with torch.no_grad():
        slope = (scores(images + 1e-6 * way)[:, 0] - scores(images - 1e-6 * way)[:, 0]).sum() / 2e-6
    assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-3, abs=1e-7)
    assert next(system.parameters()).dtype == torch.float32  # the copy alone is in float64


def test_fresh_latents_differ_from_call_to_call_and_held_ones_do_not(bundle, system):
    images = torch.rand(2, *bundle.manifest.input.shape)
    fresh = system.fresh("softmax", votes=2, generator=torch.Generator().manual_seed(0))
    held = system.held("softmax", votes=2, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(fresh(images), fresh(images))
    assert torch.equal(held(images), held(images))
    one_by_one = torch.cat([held(image[None]) for image in images])
    assert torch.allclose(held(images), one_by_one, atol=EXACT)  # every image meets the same latents


def test_the_stand_ins_for_the_vote_are_means_of_what_they_are_named_after():
    raw = torch.tensor([[[2.0, -1.0]], [[0.0, 1.0]]])
    scores = torch.tensor([[[3.0, 1.0]], [[0.5, 0.0]]])
    assert averaged(raw, scores, average="logits").tolist() == [[1.0, 0.0]]
    expected = torch.softmax(scores, dim=2).mean(dim=0).log()
    assert torch.allclose(averaged(raw, scores, average="softmax"), expected)
    expected = torch.log_softmax(raw, dim=2).mean(dim=0)
    assert torch.allclose(averaged(raw, scores, average="log-probabilities"), expected)


def test_the_weights_are_frozen(system):
    assert not any(parameter.requires_grad for parameter in system.parameters())
    assert not any(module.training for module in system.modules())
