"""What the machine can do at best: the matrix products of one full count and nothing else, by each library at hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import torch
from carso.bundle import Bundle
from carso_training.export.weights import classifier_of, purifier_of
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Shape = tuple[int, int]  # inputs, outputs


def shapes(bundle: Bundle) -> list[Shape]:
    """The matrices that every vote is multiplied with, in order: the decoder's, then the classifier's.

    The part of the first one that belongs to the code is left out: it is a product per image, not per vote.
    """
    classifier, purifier = classifier_of(bundle), purifier_of(bundle)
    decoder = [layer for layer in purifier.decoder if isinstance(layer, nn.Linear)]
    layers = [*decoder[1:], *classifier.hidden, classifier.last]
    first = (purifier.config.latent, decoder[0].out_features)
    return [first, *((layer.in_features, layer.out_features) for layer in layers)]


def flop(found: list[Shape], *, rows: int) -> int:
    return 2 * rows * sum(inputs * outputs for inputs, outputs in found)


def with_numpy(found: list[Shape], *, rows: int) -> Callable[[], object]:
    products = [(_random(rows, k), _random(k, n), np.empty((rows, n), np.float32)) for k, n in found]
    return lambda: [np.matmul(left, right, out=out) for left, right, out in products]


def with_torch(found: list[Shape], *, rows: int) -> Callable[[], object]:
    products = [(torch.rand(rows, k), torch.rand(k, n), torch.empty(rows, n)) for k, n in found]

    @torch.inference_mode()
    def run() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return run


def with_onnxruntime(found: list[Shape], *, rows: int, options: ort.SessionOptions) -> Callable[[], object]:
    """One graph of independent products, the weights constant, so that ONNX Runtime may pack them beforehand."""
    names = [str(place) for place in range(len(found))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"left{name}", f"right{name}"], [f"out{name}"]) for name in names],
        "products",
        [
            helper.make_tensor_value_info(f"left{name}", TensorProto.FLOAT, (rows, k))
            for name, (k, _) in zip(names, found, strict=True)
        ],
        [
            helper.make_tensor_value_info(f"out{name}", TensorProto.FLOAT, (rows, n))
            for name, (_, n) in zip(names, found, strict=True)
        ],
        [numpy_helper.from_array(_random(k, n), f"right{name}") for name, (k, n) in zip(names, found, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, (k, n) in zip(names, found, strict=True):
        binding.bind_ortvalue_input(f"left{name}", ort.OrtValue.ortvalue_from_numpy(_random(rows, k)))
        binding.bind_ortvalue_output(f"out{name}", ort.OrtValue.ortvalue_from_numpy(np.empty((rows, n), np.float32)))
    return lambda: session.run_with_iobinding(binding)


def _random(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).random((rows, columns), dtype=np.float32)
