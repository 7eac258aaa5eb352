"""From trained networks to the files of a bundle: ONNX graphs, weights, known answers."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from carso.bundle import FIRST_PASS, SELF_TEST, VOTE, VOTE_INT8
from safetensors.torch import save_file
from torch import Tensor, nn

from carso_training.graphs import OPSET, FirstPassGraph, VoteGraph
from carso_training.networks import Classifier, Purifier
from carso_training.quantize import quantized

SELF_TEST_IMAGES = 8
SELF_TEST_VOTES = 256


def export(classifier: Classifier, purifier: Purifier, images: Tensor, *, folder: Path, seed: int = 0) -> None:
    """Write graphs, weights and known answers into `folder`.

    `images` [>= 8, *shape], clean and attacked, calibrate the int8 graph; the first 8 feed the self-test.
    The known answers are those of the torch networks themselves, so that the service's self-test holds its graphs,
    its runtime and its device against the trained system and not against another run of the same graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    classifier, purifier = deepcopy(classifier).cpu().eval(), deepcopy(purifier).cpu().eval()
    config = purifier.config
    with torch.no_grad():
        _export_graph(
            FirstPassGraph(classifier, purifier).eval(),
            {"images": torch.zeros(2, *config.input_shape)},
            outputs=("probabilities", "codes"),
            rows={"images": "batch"},
            path=folder / FIRST_PASS,
        )
        vote = VoteGraph(classifier, purifier).eval()
        _export_graph(
            vote,
            {
                "codes": torch.zeros(2, config.code),
                "code_index": torch.tensor([0, 1, 1]),
                "latents": torch.zeros(3, config.latent),
            },
            outputs=("votes", "purified"),
            rows={"codes": "images", "code_index": "rows", "latents": "rows"},
            path=folder / VOTE,
        )
        codes = purifier.encode(classifier.represent(images.cpu()).representation)
        (folder / VOTE_INT8).write_bytes(quantized(vote, codes, seed=seed).SerializeToString())
        _write_self_test(classifier, purifier, images[:SELF_TEST_IMAGES].cpu(), folder / SELF_TEST, seed=seed)
    for name, module in (
        ("classifier", classifier),
        ("code_encoder", purifier.code_encoder),
        ("decoder", purifier.decoder),
    ):
        save_file(module.state_dict(), folder / f"{name}.safetensors")


def _export_graph(
    module: nn.Module, inputs: dict[str, Tensor], *, outputs: tuple[str, ...], rows: dict[str, str], path: Path
) -> None:
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
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _write_self_test(classifier: Classifier, purifier: Purifier, images: Tensor, path: Path, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SELF_TEST_VOTES, purifier.config.latent, generator=generator)
    code_index = torch.arange(SELF_TEST_VOTES) % len(images)
    scores = classifier.represent(images)
    codes = purifier.encode(scores.representation)
    votes = classifier(purifier.decode(codes[code_index], latents)).argmax(dim=1)
    np.savez(
        path,
        images=images.numpy(),
        latents=latents.numpy(),
        code_index=code_index.numpy(),
        probabilities=scores.log_probs.exp().numpy(),
        codes=codes.numpy(),
        votes=votes.numpy(),
    )
