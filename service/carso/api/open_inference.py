"""The Open Inference Protocol v2 over HTTP, as clients of KServe and Triton speak it.

Two models: the bundle's name is the robust path, and the same with -fast the fast path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from carso.api import tensors
from carso.api.classification import Classified, Classifier
from carso.api.tensors import InferRequest, OutputType
from carso.bundle import InputSpec, Manifest
from carso.complaints import shown
from carso.errors import ConflictingParameters, InvalidParameter, UnknownOutput
from carso.http.offload import Decoder
from carso.images import json_values
from carso.images.reader import Source
from carso.inference.pipeline import Path
from carso.options import FastOptions, RobustOptions, parse
from carso.settings import Evidence
from carso.version import __version__

JSON_SIZE = "inference-header-content-length"

_LABEL: dict[str, OutputType] = {"label": "INT64", "class_name": "BYTES"}
_TYPES: dict[tuple[Path, Evidence], dict[str, OutputType]] = {  # of a prediction's fields
    ("fast", "label"): _LABEL,
    ("fast", "full"): {**_LABEL, "probabilities": "FP64"},
    ("robust", "label"): {**_LABEL, "complete": "BOOL"},
    ("robust", "full"): {
        **_LABEL,
        "share": "FP64",
        "tally": "INT64",
        "votes": "INT64",
        "samples": "INT64",
        "rule": "BYTES",
        "complete": "BOOL",
        "risk": "FP64",
        "seed": "INT64",
        "fast_label": "INT64",
        "agree": "BOOL",
    },
}
_PER_CLASS = ("probabilities", "tally")


class ServerMetadata(BaseModel):
    name: str = "carso"
    version: str = __version__
    extensions: tuple[str, ...] = ("binary_tensor_data",)


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]  # -1: any


class ModelMetadata(BaseModel):
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class Model:
    """One path as a model of the protocol."""

    def __init__(
        self,
        path: Path,
        classifier: Classifier,
        decoder: Decoder,
        manifest: Manifest,
        options: type[FastOptions],
        *,
        provider: str,
        max_images: int,
        evidence: Evidence,
    ) -> None:
        """`options`: RobustOptions with this service's limits for the robust path, else FastOptions."""
        self.name = manifest.name if path == "robust" else f"{manifest.name}-fast"
        self.version = manifest.version
        self.path = path
        self._classifier = classifier
        self._decoder = decoder
        self._provider = provider
        self._max_images = max_images
        self._max_values = json_values.limit(manifest.input.shape)
        self._options = options
        self._types = _TYPES[path, evidence]
        self.metadata = ModelMetadata(
            name=self.name,
            versions=(self.version,),
            platform="onnxruntime_carso",
            inputs=(_input(manifest.input),),
            outputs=tuple(_output(name, kind, classes=len(manifest.classes)) for name, kind in self._types.items()),
        )

    async def infer(self, request: Request) -> Response:
        """Classify. Raises UnknownOutput and the errors of tensors.parse, Decoder.decode, Classifier."""
        self._classifier.check(self.path)
        data = await request.body()
        asked: InferRequest

        def take_apart() -> tuple[list[Source], FastOptions]:
            nonlocal asked
            json_size = request.headers.get(JSON_SIZE)
            asked, sources = tensors.parse(data, json_size, max_images=self._max_images, max_values=self._max_values)
            self._check_outputs(asked)
            return sources, parse(self._options, b"", _options(asked, self.path))

        images, options, decode = await self._decoder.decode(len(data), take_apart, request.receive)
        return self._respond(request, asked, await self._classify(request, images, options, decode=decode))

    async def _classify(
        self, request: Request, images: np.ndarray, options: FastOptions, *, decode: float
    ) -> Classified:
        if isinstance(options, RobustOptions):
            return await self._classifier.robust(request, images, options, decode=decode)
        return await self._classifier.fast(request, images, decode=decode)

    def _check_outputs(self, asked: InferRequest) -> None:
        for output in asked.outputs or ():
            if output.name not in self._types:
                raise UnknownOutput(
                    f"{shown(output.name)} is not an output of {self.name}: {', '.join(self._types)} are"
                )

    def _respond(self, request: Request, asked: InferRequest, classified: Classified) -> Response:
        everything = bool(asked.parameters.get("binary_data_output", False))
        if asked.outputs:
            wanted = {output.name: output.parameters.binary_data for output in asked.outputs}
        else:
            wanted = dict.fromkeys(self._types)
        response: dict[str, Any] = {"model_name": self.name, "model_version": self.version}
        if asked.id is not None:
            response["id"] = asked.id
        response["parameters"] = {"provider": self._provider, "request_id": request.state.exchange.request_id}
        body, json_size = tensors.respond(response, self._tensors(classified, wanted, everything=everything))
        if json_size is None:
            return Response(body, media_type="application/json")
        return Response(body, headers={JSON_SIZE: str(json_size)}, media_type="application/octet-stream")

    def _tensors(
        self, classified: Classified, wanted: dict[str, bool | None], *, everything: bool
    ) -> Iterable[tuple[str, OutputType, list[Any], bool]]:
        for name, binary in wanted.items():
            values = [prediction[name] for prediction in classified.predictions]
            yield name, self._types[name], values, everything if binary is None else binary


def _options(asked: InferRequest, path: Path) -> dict[str, Any]:
    """The parameters that are options. Triton's `timeout`, in microseconds, 0 for none, is the deadline."""
    options = {name: value for name, value in asked.parameters.items() if name != "binary_data_output"}
    if path == "robust" and "timeout" in options:
        timeout = options.pop("timeout")
        if type(timeout) is not int or timeout < 0:
            raise InvalidParameter(
                f"timeout: {shown(timeout)} is not allowed; it must be a number of microseconds, or 0 for no deadline"
            )
        if "deadline_ms" in options:
            raise ConflictingParameters("timeout and deadline_ms are both given, which mean the same: give one")
        if timeout:
            options["deadline_ms"] = -(-timeout // 1000)
    return options


def _input(spec: InputSpec) -> TensorMetadata:
    return TensorMetadata(name=tensors.INPUT, datatype="FP32", shape=[-1, *spec.shape])


def _output(name: str, datatype: OutputType, *, classes: int) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=datatype, shape=[-1, classes] if name in _PER_CLASS else [-1])
