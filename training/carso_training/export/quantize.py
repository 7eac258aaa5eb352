"""The vote graph in int8, for CPUs: the same function to within a rounding that benchmarks/precision.py measures.

The exported float32 graph is rewritten: its widest matrix products (all but a twentieth of a vote) take 8-bit operands,
with a fixed scale and zero point per layer for activations and a scale per output for weights. Everything else stays
float32. The scales are *static*, set once from calibration codes: with scales taken from the batch at hand, the votes
of one election would depend on what else is in the round, and a seed would no longer give the same answer.

Weights use -63..63 rather than -127..127: two products of them with an unsigned byte then fit into 16 bits, so that
processors without VNNI, which add pairs in 16 bits, cannot saturate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

WEIGHT_MAX = 63
LATENTS_PER_CODE = 8
SHARE = 0.95  # of the multiply-adds of a vote: the widest products up to this share become int8
PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}  # the attributes of x W^T + b
LEAST_RANGE = 1e-6  # of a unit that is hardly ever active


@dataclass(frozen=True)
class Range:
    """The least and the greatest value that each unit of a layer's input took in calibration."""

    low: np.ndarray  # [units]
    high: np.ndarray  # [units]

    def scaled(self, factor: np.ndarray) -> Range:
        """The range of each unit once its values are multiplied by a positive factor."""
        return Range(self.low * factor, self.high * factor)

    def step_and_zero(self) -> tuple[np.float32, np.uint8]:
        """One scale for all units, in which the byte q stands for (q - zero) * step."""
        low, high = min(0.0, float(self.low.min())), max(0.0, float(self.high.max()))
        step = (high - low) / 255 or 1.0
        return np.float32(step), np.uint8(round(-low / step))


def int8_form(vote: onnx.ModelProto, *, codes: np.ndarray, latent: int, seed: int) -> onnx.ModelProto:
    """Return the int8 form of an exported vote graph, with the same inputs and outputs.

    `codes` [M, code] float32, of clean and attacked images, calibrate it, each with a few latents of size `latent`
    that `seed` decides.
    """
    model = onnx.ModelProto()
    model.CopyFrom(vote)
    graph = _Graph(model.graph)
    products = graph.widest_products()
    ranges = _calibrated(model, [product.input[0] for product in products], codes=codes, latent=latent, seed=seed)
    for product in products:
        ranges[product.input[0]] = graph.equalise(product, ranges[product.input[0]])
    for product in products:
        graph.make_int8(product, ranges[product.input[0]])
    graph.drop_unused_constants()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.checker.check_model(model)
    return model


def _calibrated(
    model: onnx.ModelProto, tensors: Sequence[str], *, codes: np.ndarray, latent: int, seed: int
) -> dict[str, Range]:
    """The ranges of tensors of the float32 graph, unit by unit."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    rows = np.repeat(np.arange(len(codes)), LATENTS_PER_CODE)
    latents = np.random.default_rng(seed).standard_normal((len(rows), latent), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the evaluator computes both branches of a sigmoid
        found = ReferenceEvaluator(observed).run(None, {"codes": codes, "code_index": rows, "latents": latents})
    return {
        name: Range(values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64))
        for name, values in zip(tensors, found, strict=True)
    }


class _Graph:
    """A graph that is rewritten in place."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._maker = {output: node for node in graph.node for output in node.output}
        self._constants = {constant.name: constant for constant in graph.initializer}

    def widest_products(self) -> list[onnx.NodeProto]:
        """The fewest products of an activation with constant weights that make up SHARE of all, in graph order."""
        inputs = {value.name for value in self._graph.input}
        products = [node for node in self._graph.node if self._is_product(node) and node.input[0] not in inputs]
        sizes = [self._weight(node).size for node in products]
        chosen: list[int] = []
        for place in sorted(range(len(products)), key=lambda place: -sizes[place]):
            if sum(sizes[one] for one in chosen) < SHARE * sum(sizes):
                chosen.append(place)
        return [products[place] for place in sorted(chosen)]

    def equalise(self, product: onnx.NodeProto, seen: Range) -> Range:
        """Rescale the units between `product` and what writes them, so that no unit needs most of the 8 bits.

        A unit's activations times s > 0 with the weights that read it over s is the same function, as LeakyReLU is
        positively homogeneous. Batch norm folded into the reading weights makes units whose activations hardly vary
        have huge weights; s evens out the two (cross-layer equalisation: Nagel et al., 2019, arXiv:1906.04721).
        Returns the range of the rescaled input. Where something else than LeakyReLU stands between, nothing changes.
        """
        writers = list(self._writers(product))
        if not writers:
            return seen
        weight = self._weight(product)
        widths = np.maximum(np.maximum(-seen.low, seen.high), LEAST_RANGE)
        scale = np.maximum(np.sqrt(np.abs(weight).max(axis=0) / widths), LEAST_RANGE)
        self._set(product.input[1], weight / scale)
        for writer in writers:
            self._set(writer.input[1], self._weight(writer) * scale[:, None])
            if len(writer.input) > 2:
                self._set(writer.input[2], self._value(writer.input[2]) * scale)
        return seen.scaled(scale)

    def make_int8(self, product: onnx.NodeProto, seen: Range) -> None:
        """Put an 8-bit product in the place of a float32 one."""
        weight = self._weight(product)
        steps = np.maximum(np.abs(weight).max(axis=1) / WEIGHT_MAX, np.finfo(np.float32).tiny).astype(np.float32)
        rounded = np.round(weight / steps[:, None]).astype(np.int8)
        step, zero = seen.step_and_zero()
        name = product.output[0]
        operands = {
            f"{name}_step": step,
            f"{name}_zero": zero,
            f"{name}_weight": np.ascontiguousarray(rounded.T),
            f"{name}_weight_steps": steps,
        }
        self._graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in operands.items())
        step_name, zero_name, weight_name, steps_name = operands
        quantize = helper.make_node("QuantizeLinear", [product.input[0], step_name, zero_name], [f"{name}_quantized"])
        multiply = helper.make_node(
            "MatMulIntegerToFloat",
            [
                *(f"{name}_quantized", weight_name, step_name, steps_name, zero_name),
                "",  # weights are symmetric: their zero is 0
                *product.input[2:],
            ],
            [name],
            domain="com.microsoft",
        )
        place = next(place for place, node in enumerate(self._graph.node) if node is product or node == product)
        self._graph.node.remove(product)
        self._graph.node.insert(place, multiply)
        self._graph.node.insert(place, quantize)

    def drop_unused_constants(self) -> None:
        """Remove the float32 weights that nothing reads any more."""
        read = {name for node in self._graph.node for name in node.input}
        for constant in [constant for constant in self._graph.initializer if constant.name not in read]:
            self._graph.initializer.remove(constant)

    def _writers(self, product: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The products whose outputs, added up or picked by row, go through a LeakyReLU into `product`, and nowhere
        else."""
        activation = self._maker.get(product.input[0])
        if activation is None or activation.op_type != "LeakyRelu" or not self._has_one_reader(product.input[0]):
            return
        found: list[onnx.NodeProto] = []
        names = [activation.input[0]]
        while names:
            name = names.pop()
            node = self._maker.get(name)
            if node is None or not self._has_one_reader(name):
                return
            if node.op_type == "Add":
                names += node.input
            elif node.op_type == "Gather" and not any(a.name == "axis" and a.i for a in node.attribute):
                names.append(node.input[0])
            elif self._is_product(node):
                found.append(node)
            else:
                return
        yield from found

    def _has_one_reader(self, name: str) -> bool:
        return sum(name in node.input for node in self._graph.node) == 1

    def _is_product(self, node: onnx.NodeProto) -> bool:
        """Whether a node is x W^T + b with constant W [outputs, inputs] and b."""
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        return (
            node.op_type == "Gemm"
            and {"alpha": 1.0, "beta": 1.0, "transA": 0} | attributes == PLAIN_GEMM
            and all(name in self._constants and self._has_one_reader(name) for name in node.input[1:])
        )

    def _value(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._constants[name])

    def _weight(self, product: onnx.NodeProto) -> np.ndarray:
        return self._value(product.input[1])

    def _set(self, name: str, value: np.ndarray) -> None:
        self._constants[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
