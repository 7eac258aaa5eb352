"""From trained networks to the files of a bundle: ONNX graphs, weights, known answers."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxscript  # noqa: F401  (torch.onnx.export needs it: better to miss it before training than after)
import torch
from carso.bundle import BOUNDS, FIRST_PASS, SELF_TEST, SELF_TEST_EPS, VOTE, VOTE_INT8
from torch import Tensor, nn

from carso_training import durable
from carso_training.export import weights
from carso_training.export.graphs import BoundsGraph, FirstPassGraph, VoteGraph
from carso_training.export.quantize import int8_form
from carso_training.networks import Classifier, Purifier
from carso_training.networks.bounds import UnboundedLayerError

OPSET = 20
SELF_TEST_IMAGES = 8
SELF_TEST_VOTES = 256


def export(
    *,
    classifier: Classifier,
    purifier: Purifier,
    second_pass: Classifier | None = None,
    images: Tensor,
    folder: Path,
    seed: int = 0,
) -> str | None:
    """Write the graphs, the weights and the known answers of a system into `folder`.

    Return why there is no graph of bounds among them; None: there is one.

    `classifier` makes the first pass. `second_pass` votes on the purified images; None: the same classifier, as in the
    published system. `images` [>= 8, *shape] float32 in [0, 1], clean and attacked, calibrate the int8 graph, and the
    first 8 feed the self-test. `seed` decides the latents of both.

    The known answers are those of the torch networks themselves, so that the service's self-test holds its graphs,
    its runtime and its device against the trained system and not against another run of the same graph. Raises
    OSError if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classifier, purifier = deepcopy(classifier).cpu().eval(), deepcopy(purifier).cpu().eval()
    voter = classifier if second_pass is None else deepcopy(second_pass).cpu().eval()
    images, config = images.cpu(), purifier.config
    with torch.no_grad():
        first_pass = _exported(
            FirstPassGraph(classifier, purifier).eval(),
            {"images": torch.zeros(2, *config.input_shape)},
            outputs=("probabilities", "codes"),
            rows={"images": "batch"},
        )
        vote = _exported(
            VoteGraph(purifier, voter).eval(),
            {
                "codes": torch.zeros(2, config.code),
                "code_index": torch.tensor([0, 1, 1]),
                "latents": torch.zeros(3, config.latent),
            },
            outputs=("votes", "purified"),
            rows={"codes": "images", "code_index": "rows", "latents": "rows"},
        )
        codes = purifier.encode(classifier.represent(images).representation)
        int8 = int8_form(vote, codes=codes.numpy(), latent=config.latent, seed=seed)
        answers = _known_answers(classifier, purifier, voter, images[:SELF_TEST_IMAGES], seed=seed)
    for name, graph in ((FIRST_PASS, first_pass), (VOTE, vote), (VOTE_INT8, int8)):
        durable.write(folder / name, graph.SerializeToString())
    unbounded = None
    try:
        bounds = bounds_of(classifier, purifier, answers)
    except UnboundedLayerError as e:
        unbounded = str(e)
        durable.write(folder / SELF_TEST, _packed(answers))
    else:
        for name, content in bounds.items():
            durable.write(folder / name, content)
    weights.save(folder, classifier=classifier, purifier=purifier, second_pass=second_pass)
    return unbounded


@torch.no_grad()
def bounds_of(classifier: Classifier, purifier: Purifier, answers: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Return the files by which a bundle can prove labels: its first pass with bounds, and its self-test with margins.

    `classifier` and `purifier`: of the first pass, on the CPU and in eval mode. `answers`: the self-test's arrays
    without margins. Raises UnboundedLayerError if bounds cannot be taken through the classifier.
    """
    graph, images = BoundsGraph(classifier, purifier).eval(), torch.from_numpy(answers["images"])
    _, _, margins = graph(images, torch.full((len(images),), SELF_TEST_EPS))
    inputs, rows = {"images": images[:2], "eps": torch.zeros(2)}, {"images": "batch", "eps": "batch"}
    exported = _exported(graph, inputs, outputs=("probabilities", "codes", "margins"), rows=rows)
    return {BOUNDS: exported.SerializeToString(), SELF_TEST: _packed({**answers, "margins": margins.numpy()})}


def _packed(answers: Mapping[str, np.ndarray]) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **dict(answers))
    return packed.getvalue()


def _exported(
    module: nn.Module, inputs: dict[str, Tensor], *, outputs: tuple[str, ...], rows: dict[str, str]
) -> onnx.ModelProto:
    dims = {name: torch.export.Dim(name, min=1) for name in set(rows.values())}
    # the exporter speaks of operators of torchvision, which are not used here, and of its own deprecations
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamic_shapes=tuple({0: dims[rows[name]]} for name in inputs),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # paths and lines of this machine's source files
    onnx.checker.check_model(model, full_check=True)
    return model


def _known_answers(
    classifier: Classifier, purifier: Purifier, voter: Classifier, images: Tensor, *, seed: int
) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SELF_TEST_VOTES, purifier.config.latent, generator=generator)
    code_index = torch.arange(SELF_TEST_VOTES) % len(images)
    first = classifier.represent(images)
    codes = purifier.encode(first.representation)
    votes = voter(purifier.decode(codes[code_index], latents)).argmax(dim=1)
    answers = {
        "images": images,
        "latents": latents,
        "code_index": code_index,
        "probabilities": first.log_probs.exp(),
        "codes": codes,
        "votes": votes,
    }
    return {name: tensor.numpy() for name, tensor in answers.items()}
