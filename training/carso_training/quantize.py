"""The vote graph in int8, for CPUs: the same function to within a rounding that benchmarks/precision.py measures.

The three widest matrix products (more than nine tenths of a vote) take 8-bit operands: activations by a fixed scale and
zero point per layer, weights by a scale per output. Everything else stays float32. The scales are *static*, set once
from calibration codes: with scales taken from the batch at hand, the votes of one election would depend on what else is
in the round, and a seed would no longer give the same answer.

Weights use -63..63 rather than -127..127: two products of them with an unsigned byte then fit into 16 bits, so that
processors without VNNI, which add pairs in 16 bits, cannot saturate.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from carso_training.graphs import OPSET, VoteGraph

WEIGHT_MAX = 63
LATENTS_PER_CODE = 8
IR_VERSION = 10


@dataclass(frozen=True)
class Scale:
    """uint8 q stands for (q - zero) * step."""

    step: np.float32
    zero: np.uint8

    @classmethod
    def of(cls, values: Tensor) -> Scale:
        """From the least to the greatest of the values."""
        low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
        step = (high - low) / 255
        return cls(np.float32(step), np.uint8(round(-low / step)))


@dataclass
class _Graph:
    """ONNX nodes and constants, added in the order of computation; each method returns the name of its output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, output: str = "", domain: str = "", **attributes: object) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        return output

    def linear(self, x: str, layer: nn.Linear) -> str:
        bias = [] if layer.bias is None else [self.constant(layer.bias.numpy())]
        return self.node("Gemm", x, self.constant(layer.weight.numpy()), *bias, transB=1)

    def linear_int8(self, x: str, layer: nn.Linear, scale: Scale) -> str:
        weight = layer.weight.numpy()
        steps = (np.abs(weight).max(axis=1) / WEIGHT_MAX).astype(np.float32)
        rounded = np.round(weight / steps[:, None]).astype(np.int8)
        step, zero = self.constant(scale.step), self.constant(scale.zero)
        return self.node(
            "MatMulIntegerToFloat",
            self.node("QuantizeLinear", x, step, zero),
            self.constant(np.ascontiguousarray(rounded.T)),
            step,
            self.constant(steps),
            zero,
            "",  # weights are symmetric: their zero is 0
            self.constant(layer.bias.numpy()),
            domain="com.microsoft",
        )

    def mish(self, x: str) -> str:
        """As carso_training.graphs.mish."""
        s = self.node("Sigmoid", self.node("Neg", x))
        s = self.node("Mul", s, s)
        one = self.constant(np.float32(1))
        return self.node("Div", self.node("Mul", x, self.node("Sub", one, s)), self.node("Add", one, s))


@torch.no_grad()
def quantized(graph: VoteGraph, codes: Tensor, *, seed: int) -> onnx.ModelProto:
    """The int8 form of `graph`, with the same inputs and outputs; calibrated on `codes` [M, code] of images, clean and
    attacked, with a few latents each."""
    generator = torch.Generator().manual_seed(seed)
    codes = codes.repeat_interleave(LATENTS_PER_CODE, dim=0)
    latents = torch.randn(len(codes), graph.from_latent.in_features, generator=generator)
    graph = _equalised(graph, codes, latents)
    scales = [Scale.of(x) for x in _activations(graph, codes, latents)]
    built = _Graph()
    shared = built.node("Gather", built.linear("codes", graph.from_code), "code_index", axis=0)
    x = built.node("Add", built.linear("latents", graph.from_latent), shared)
    for layer, scale in zip(graph.rest, scales, strict=True):
        x = built.linear_int8(built.node("LeakyRelu", x, alpha=graph.slope), layer, scale)
    x = built.node("Sigmoid", x)
    shape = built.constant(np.array([-1, *graph.shape], np.int64))
    built.node("Reshape", x, shape, output="purified")
    first, *rest = graph.classifier.layers
    x = built.mish(built.linear_int8(x, first, Scale(np.float32(1 / 255), np.uint8(0))))
    for layer in rest:
        x = built.mish(built.linear(x, layer))
    built.node("ArgMax", x, output="votes", axis=1, keepdims=0)

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    model = helper.make_model(
        helper.make_graph(
            built.nodes,
            "vote_int8",
            [
                value("codes", TensorProto.FLOAT, "images", graph.from_code.in_features),
                value("code_index", TensorProto.INT64, "rows"),
                value("latents", TensorProto.FLOAT, "rows", graph.from_latent.in_features),
            ],
            [value("votes", TensorProto.INT64, "rows"), value("purified", TensorProto.FLOAT, "rows", *graph.shape)],
            built.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


def _activations(graph: VoteGraph, codes: Tensor, latents: Tensor) -> Iterator[Tensor]:
    """The input of each layer after the first, row by row of `codes` and `latents`."""
    x = graph.from_latent(latents) + graph.from_code(codes)
    for layer in graph.rest:
        x = F.leaky_relu(x, graph.slope)
        yield x
        x = layer(x)


def _equalised(graph: VoteGraph, codes: Tensor, latents: Tensor) -> VoteGraph:
    """The same function with its hidden units rescaled, so that no unit needs most of a layer's 8 bits.

    A unit's activations times s > 0 with the weights that read it over s is the same function, as LeakyReLU is
    positively homogeneous. Batch norm folded into the reading weights makes units whose activations hardly vary have
    huge weights; s evens out the two (cross-layer equalisation: Nagel et al., 2019, arXiv:1906.04721).
    """
    graph = deepcopy(graph)
    before: list[nn.Linear] = [graph.from_latent, graph.from_code]
    for place, layer in enumerate(graph.rest):
        ranges = list(_activations(graph, codes, latents))[place].abs().amax(dim=0)
        scale = (layer.weight.abs().amax(dim=0) / ranges.clamp_min(1e-6)).sqrt().clamp_min(1e-6)
        layer.weight /= scale
        for writer in before:
            writer.weight *= scale[:, None]
            if writer.bias is not None:
                writer.bias *= scale
        before = [layer]
    return graph
