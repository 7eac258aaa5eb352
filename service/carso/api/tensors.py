"""Tensors in the HTTP form of the Open Inference Protocol: read from requests, written to responses.

A tensor's values are in the JSON, or in binary form behind it, in the order of the tensors; the header
Inference-Header-Content-Length then says where the JSON ends. Sources: the protocol
(https://github.com/kserve/open-inference-protocol), its extension for binary data
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import prod
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

from carso.complaints import shown
from carso.errors import (
    EmptyBatch,
    InvalidTensor,
    NotNumbers,
    OutOfRange,
    TooManyImages,
    UndecodableBase64,
)
from carso.images import base64_text, json_values
from carso.images.numbers import Source, from_lists

INPUT = "images"
NOT_OFFERED = frozenset(("shared_memory_region", "classification"))  # extensions of Triton's that change a tensor

FloatType = Literal["FP16", "FP32", "FP64"]
WholeType = Literal["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
InputType = FloatType | WholeType | Literal["BYTES"]
OutputType = Literal["BOOL", "INT64", "FP64", "BYTES"]

_NUMBERS: dict[str, type[np.generic]] = {
    **{"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_},
    **{"UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64},
    **{"INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64},
}
_PACKED = {"BOOL": np.bool_, "INT64": np.int64, "FP64": np.float64}


class _Part(BaseModel):
    """A part of a request. The protocol lets clients add fields and parameters of their own, and many do: what is not
    known here is ignored, and null is as good as nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Parameters(_Part):
    """Parameters of one tensor."""

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, content: Any) -> Any:
        """Refuse what cannot be ignored, because the tensor would be another one."""
        for name in NOT_OFFERED & content.keys() if isinstance(content, dict) else ():
            if content[name]:
                raise ValueError(f"{name} is not offered here: leave it out")
        return content


class InputParameters(_Parameters):
    """Parameters of an input tensor."""

    binary_data_size: int | None = Field(default=None, ge=0, description="Bytes of this tensor behind the JSON.")


class Input(_Part):
    """The input tensor: the images."""

    name: str = Field(max_length=1024, description="There is one input, so any name will do.")
    shape: list[int] = Field(
        min_length=1, max_length=4, description="[N, C, H, W] or what .npy may have; of BYTES, [N] or [N, 1]."
    )
    datatype: InputType = Field(
        description="Floating point in the bundle's range; BOOL: the ends of it; UINT16: scaled to it from 0..65535; "
        "other integers: scaled to it from 0..255; BYTES: encoded images, in JSON as base64."
    )
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(default=None, description="Flat or nested; nothing if it comes in binary form.")

    @property
    def binary_size(self) -> int | None:
        """Bytes of this tensor behind the JSON; None: it is in the JSON."""
        return self.parameters.binary_data_size if self.parameters else None


class OutputParameters(_Parameters):
    """Parameters of an output tensor."""

    binary_data: bool | None = Field(default=None, description="Send this tensor in binary form.")


class Output(_Part):
    """An output tensor that the client asks for."""

    name: str
    parameters: OutputParameters | None = None

    @property
    def binary(self) -> bool | None:
        """Whether this tensor is to be in binary form; None: the request says so."""
        return self.parameters.binary_data if self.parameters else None


class InferRequest(_Part):
    """The JSON of a request."""

    id: str | None = Field(default=None, max_length=1024, description="Given back in the response.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="Options, as of the native API; binary_data_output: send all tensors in binary form."
    )
    inputs: list[Input] = Field(min_length=1, max_length=1)
    outputs: list[Output] | None = Field(
        default=None, max_length=64, description="Tensors to answer with; default: all."
    )


class OutputTensor(BaseModel):
    """An output tensor as it is sent."""

    name: str
    datatype: OutputType
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    """The JSON of a response."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[OutputTensor]


def parse(data: bytes, json_size: str | None, *, max_images: int, max_values: int) -> tuple[InferRequest, list[Source]]:
    """A body and its header Inference-Header-Content-Length -> the request, without values, and its images.

    `max_values`: see json_values. Raises BodyTooLarge, UndecodableJson, InvalidTensor, and the errors of values.
    """
    if json_size is not None and not (json_size.isdecimal() and len(json_size) < 20 and int(json_size) <= len(data)):
        raise InvalidTensor(
            f"Inference-Header-Content-Length {shown(json_size)} is not a number from 0 to {len(data)}, the body's size"
        )
    size = len(data) if json_size is None else int(json_size)
    return understood(json_values.parse(data[:size], max_values=max_values), data[size:], max_images=max_images)


def understood(content: Any, packed: bytes, *, max_images: int) -> tuple[InferRequest, list[Source]]:
    """The content of a request, as its JSON has it, and the tensor in binary form -> the request, and its images.

    `packed` is empty if the values are in `content`. Raises InvalidTensor, and the errors of values.
    """
    try:
        request = InferRequest.model_validate(content)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidTensor(f"{where}: {message} (found {shown(first['input'])})") from None
    tensor = request.inputs[0]
    return request, _images(tensor, packed, max_images=max_images)


def _images(tensor: Input, packed: bytes, *, max_images: int) -> list[Source]:
    if min(tensor.shape) < 0:
        raise InvalidTensor(f"shape {tensor.shape} has a negative entry")
    if not prod(tensor.shape):
        raise EmptyBatch(f"a tensor of shape {tensor.shape} holds no image")
    due = tensor.binary_size or 0
    if len(packed) != due:
        raise InvalidTensor(f"{len(packed)} bytes follow the JSON, and its tensor has a binary_data_size of {due}")
    if (tensor.data is None) != (tensor.binary_size is not None):
        raise InvalidTensor("the tensor must have either data or a binary_data_size, and not both")
    if tensor.datatype == "BYTES":
        return _encoded_images(tensor, packed, max_images=max_images)
    return [_packed_array(tensor, packed) if tensor.data is None else _listed_array(tensor, tensor.data)]


def _packed_array(tensor: Input, packed: bytes) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[tensor.datatype])
    if (due := prod(tensor.shape) * dtype.itemsize) != len(packed):
        raise InvalidTensor(f"shape {tensor.shape} of {tensor.datatype} is {due} bytes, and {len(packed)} were sent")
    return np.frombuffer(packed, dtype.newbyteorder("<")).reshape(tensor.shape).astype(dtype, copy=False)


def _listed_array(tensor: Input, data: list[Any]) -> np.ndarray:
    array = from_lists(data)
    if array.size != prod(tensor.shape):
        raise InvalidTensor(f"shape {tensor.shape} takes {prod(tensor.shape)} values, and data holds {array.size}")
    dtype = np.dtype(_NUMBERS[tensor.datatype])
    array = array.astype(np.float64) if dtype.kind == "f" else _whole(tensor.datatype, array, dtype)
    return array.reshape(tensor.shape)


def _whole(datatype: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return numbers of JSON as integers or bool. Raises NotNumbers, OutOfRange."""
    if not np.isfinite(array).all() or (array != np.floor(array)).any():
        raise NotNumbers(f"data of a {datatype} tensor holds numbers with a fraction: send whole numbers, or FP32")
    least, most = (0, 1) if dtype.kind == "b" else (0, 65535 if dtype == np.uint16 else 255)
    if array.min() < least or array.max() > most:
        raise OutOfRange(f"data of a {datatype} tensor holds a value outside {least} to {most}: scale the values")
    return array.astype(dtype)


def _encoded_images(tensor: Input, packed: bytes, *, max_images: int) -> list[Source]:
    count = tensor.shape[0]
    if tensor.shape[1:] not in ([], [1]):
        raise InvalidTensor(f"shape {tensor.shape} of a BYTES tensor is neither [N] nor [N, 1]")
    if count > max_images:
        raise TooManyImages(f"{count} images, at most {max_images} are taken: send several requests")
    if tensor.data is None:
        images = _unpacked(packed)
    else:
        images = [_decoded(entry, index) for index, entry in enumerate(_flat(tensor.data))]
    if len(images) != count:
        raise InvalidTensor(f"shape {tensor.shape} takes {count} images, and there are {len(images)}")
    return list(images)


def _unpacked(packed: bytes) -> list[bytes]:
    """Elements of a BYTES tensor: the size of each in four bytes, little-endian, then the element."""
    elements: list[bytes] = []
    start = 0
    while start < len(packed):
        (size,) = struct.unpack_from("<I", packed, start) if start + 4 <= len(packed) else (len(packed),)
        start += 4 + size
        if start > len(packed):
            raise InvalidTensor(f"the BYTES tensor ends within its element {len(elements)}")
        elements.append(packed[start - size : start])
    return elements


def _flat(data: list[Any]) -> list[Any]:
    return [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in data]


def _decoded(entry: Any, index: int) -> bytes:
    if not isinstance(entry, str):
        raise UndecodableBase64(f"image {index} is {shown(entry)}, not base64 of an encoded image")
    return base64_text.decoded(entry, index)


def respond(response: dict[str, Any], tensors: Iterable[tuple[str, OutputType, Any, bool]]) -> tuple[bytes, int | None]:
    """The body of a response, and the size of its JSON if tensors in binary form follow it, else None.

    `tensors`: of each its name, datatype, values (nested lists, the first dimension the batch), and whether it is to be
    in binary form.
    """
    outputs: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for name, datatype, values, binary in tensors:
        array = _as_array(datatype, values)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            behind.append(_pack(datatype, array))
            output["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    content = to_json({**response, "outputs": outputs})
    return b"".join((content, *behind)), len(content) if behind else None


def pack(datatype: OutputType, values: list[Any]) -> tuple[list[int], bytes]:
    """Values (nested lists, the first dimension the batch) -> the shape of their tensor, and its binary form."""
    array = _as_array(datatype, values)
    return list(array.shape), _pack(datatype, array)


def flat(datatype: OutputType, values: list[Any]) -> tuple[list[int], list[Any]]:
    """Values (nested lists, the first dimension the batch) -> the shape of their tensor, and its elements in order."""
    array = _as_array(datatype, values)
    elements: list[Any] = array.ravel().tolist()
    return list(array.shape), elements


def _as_array(datatype: OutputType, values: list[Any]) -> np.ndarray:
    return np.array(values, _PACKED.get(datatype, np.object_))


def packed_elements(elements: Iterable[bytes]) -> bytes:
    """The binary form of a BYTES tensor: the size of each element in four bytes, little-endian, then the element."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _pack(datatype: OutputType, array: np.ndarray) -> bytes:
    if datatype != "BYTES":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return packed_elements(text.encode() for text in array.ravel())
