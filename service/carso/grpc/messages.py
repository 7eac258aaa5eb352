"""Messages of the protocol -> requests as carso.api.tensors knows them, and answers -> messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from carso.api import tensors
from carso.api.tensors import InferRequest, OutputType
from carso.complaints import shown
from carso.errors import BodyTooLarge, InvalidTensor
from carso.grpc.protocol import METHODS, Message
from carso.images.numbers import Source

_FIELDS = {  # where the values of each datatype are, unless they are in raw form
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def request_of(message: Message, *, max_images: int, max_values: int) -> tuple[InferRequest, list[Source]]:
    """Return what a ModelInferRequest asks for, and its images.

    `max_values`: how many numbers it may hold that are not in raw form. Raises BodyTooLarge, InvalidTensor, and the
    errors of values.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidTensor(f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs: send one for each")
    packed = b""
    inputs = []
    for index, tensor in enumerate(message.inputs):
        parameters, data = _parameters(tensor.parameters), None
        if raw:
            if tensor.HasField("contents"):
                raise InvalidTensor("the tensor has both contents and raw_input_contents: send one of them")
            packed = raw[index]
        elif tensor.datatype == "BYTES":
            packed = tensors.packed_elements(_contents(tensor))
        else:
            data = _contents(tensor)
            if len(data) > max_values:
                raise BodyTooLarge(
                    f"the tensor holds {len(data)} values, and at most {max_values} are read unless they are in "
                    "raw_input_contents: send them there"
                )
        parameters["binary_data_size"] = len(packed) if data is None else None
        inputs.append(
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "parameters": parameters,
                "data": None if data is None else list(data),
            }
        )
    outputs = [{"name": output.name, "parameters": _parameters(output.parameters)} for output in message.outputs]
    content = {
        "id": message.id or None,
        "parameters": _parameters(message.parameters),
        "inputs": inputs,
        "outputs": outputs or None,
    }
    return tensors.understood(content, packed, max_images=max_images)


def response_of(
    outputs: Iterable[tuple[str, OutputType, list[Any], bool | None]],
    *,
    model: str,
    version: str,
    id: str | None,  # noqa: A002  the protocol's word
    parameters: dict[str, str],
    raw: bool,
) -> Message:
    """Return a ModelInferResponse. `outputs`: see Model.outputs. `raw`: put values into raw_output_contents."""
    response = METHODS["ModelInfer"][1](model_name=model, model_version=version, id=id or "")
    for name, value in parameters.items():
        response.parameters[name].string_param = value
    for name, datatype, values, _ in outputs:
        output = response.outputs.add(name=name, datatype=datatype)
        if raw:
            shape, packed = tensors.pack(datatype, values)
            response.raw_output_contents.append(packed)
        else:
            shape, elements = tensors.flat(datatype, values)
            encoded = [element.encode() for element in elements] if datatype == "BYTES" else elements
            getattr(output.contents, _FIELDS[datatype]).extend(encoded)
        output.shape.extend(shape)
    return response


def _contents(tensor: Message) -> Sequence[Any]:
    """Return a tensor's values. Raises InvalidTensor if they are not where its datatype has them."""
    field = _FIELDS.get(tensor.datatype)
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if field is None and filled:
        raise InvalidTensor(f"the values of {shown(tensor.datatype)} go into raw_input_contents, not {filled[0]}")
    if filled and filled != [field]:
        raise InvalidTensor(
            f"the values of {tensor.datatype} go into {field}, or into raw_input_contents, not {filled[0]}"
        )
    return getattr(tensor.contents, field) if field else ()


def _parameters(given: Any) -> dict[str, Any]:
    found = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found
