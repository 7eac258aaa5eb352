"""Calls over gRPC as the tests send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from carso.grpc.protocol import METHODS, SERVICE, Message

from tests.server import Server
from tests.waiting import PATIENCE

MODEL = "random"


def address(server: Server) -> str:
    """Where a server listens for gRPC, as its log says."""
    return grpc_addresses(server.log)[0]


def grpc_addresses(log: Path) -> list[str]:
    lines = map(json.loads, log.read_text().splitlines())
    (found,) = (line["grpc"] for line in lines if line["message"] == "listening")
    return found


@contextmanager
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address(server)) as connected:
        yield connected


def method(connected: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    request, response = METHODS[name]
    return connected.unary_unary(f"/{SERVICE}/{name}", request.SerializeToString, response.FromString)


def call(connected: grpc.Channel, name: str, message: Message | None = None, **options: Any) -> Message:
    """Call a method. `options`: timeout, metadata."""
    return method(connected, name)(message or METHODS[name][0](), **{"timeout": PATIENCE, **options})


def inference(array: np.ndarray, *, model: str = MODEL, datatype: str = "FP32", **parameters: Any) -> Message:
    """A request with images in raw form."""
    tensor = {"name": "images", "shape": array.shape, "datatype": datatype}
    message = METHODS["ModelInfer"][0](model_name=model, inputs=[tensor], raw_input_contents=[array.tobytes()])
    for name, value in parameters.items():
        kind = {bool: "bool", int: "int64", str: "string", float: "double"}[type(value)]
        setattr(message.parameters[name], f"{kind}_param", value)
    return message


DTYPES = {"INT64": np.int64, "FP64": np.float64, "BOOL": np.bool_}


def predictions(answer: Message) -> dict[str, list[Any]]:
    """The values of every output, by name."""
    found = {}
    for index, output in enumerate(answer.outputs):
        shape = tuple(output.shape)
        if answer.raw_output_contents:
            raw = answer.raw_output_contents[index]
            if output.datatype == "BYTES":
                values: list[Any] = []
                while raw:
                    size = int.from_bytes(raw[:4], "little")
                    values.append(raw[4 : 4 + size].decode())
                    raw = raw[4 + size :]
                found[output.name] = values
            else:
                found[output.name] = np.frombuffer(raw, DTYPES[output.datatype]).reshape(shape).tolist()
        else:
            field = {"INT64": "int64", "FP64": "fp64", "BOOL": "bool", "BYTES": "bytes"}[output.datatype]
            values = list(getattr(output.contents, f"{field}_contents"))
            if output.datatype == "BYTES":
                found[output.name] = [value.decode() for value in values]
            else:
                found[output.name] = np.array(values).reshape(shape).tolist()
    return found
