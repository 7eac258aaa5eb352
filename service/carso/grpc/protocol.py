"""The protocol's service and its messages.

open_inference.binpb is what protoc makes of open_inference.proto:

    cd service/carso/grpc
    python -m grpc_tools.protoc -I . --descriptor_set_out open_inference.binpb open_inference.proto

The messages are made of it when this is imported. Code that protoc generates would do the same, but each release of it
works with few of protobuf's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request

Message = Any  # a message of protobuf's; its fields are those of open_inference.proto

Method = Callable[[Message, Request, Any], Awaitable[Message]]
"""A message, the request as the application knows it, and gRPC's context of the call -> the answer."""

SERVICE = "inference.GRPCInferenceService"


def _methods() -> dict[str, tuple[type[Message], type[Message]]]:
    pool = Default()
    (file,) = FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes()).file
    pool.AddSerializedFile(file.SerializeToString())
    methods = pool.FindServiceByName(SERVICE).methods
    return {each.name: (GetMessageClass(each.input_type), GetMessageClass(each.output_type)) for each in methods}


METHODS = _methods()
"""The messages of each method's request and response."""
