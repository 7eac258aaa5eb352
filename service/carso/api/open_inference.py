"""The Open Inference Protocol v2 over HTTP, as clients of KServe, MLServer and Triton speak it.

Two models: the bundle's name is the robust path, and the same with -fast the fast path.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field, RootModel
from pydantic.fields import FieldInfo
from starlette.requests import Request
from starlette.responses import Response

from carso.api import answers, openapi, tensors
from carso.api.classification import Classification, Classified
from carso.api.intake import Intake
from carso.api.statistics import AllStatistics, ModelStatistics, Statistics
from carso.api.tensors import InferRequest, InferResponse, OutputType
from carso.board.whole import Whole
from carso.bundle import InputSpec, Manifest
from carso.choices import Evidence, PathName
from carso.complaints import shown
from carso.errors import ConflictingParameters, InvalidParameter, NotFound, UnknownOutput
from carso.http.exchange import Exchange
from carso.images import json_values
from carso.images.numbers import Source
from carso.options import FastOptions, RobustOptions, parse
from carso.telemetry.probes import LIVE, LIVE_V2, READY, READY_V2, Probes
from carso.version import __version__

JSON_SIZE = "inference-header-content-length"

_INDEX_REQUEST = {
    "type": "object",
    "properties": {"ready": {"type": "boolean", "description": "Only models that take requests."}},
}
_INDEX_VALUES = 1024  # of its JSON

_PREDICTIONS: dict[tuple[PathName, Evidence], type[BaseModel]] = {
    ("fast", "label"): answers.Label,
    ("fast", "full"): answers.FastPrediction,
    ("robust", "label"): answers.RobustLabel,
    ("robust", "full"): answers.RobustPrediction,
}
# What a certificate says of each image, as tensors
_CERTIFIED = {
    "certified_eps": FieldInfo(annotation=float, description="0: nothing is proven, or nothing was asked for."),
    "certified_margin": FieldInfo(annotation=float, description="0: likewise."),
}
_KNOWN = frozenset((*RobustOptions.model_fields, "timeout"))
Asked = Callable[[], tuple[InferRequest, Sequence[Source]]]
"""Takes a request apart: into what it asks for, and its images."""

_DATATYPES: dict[type, OutputType] = {int: "INT64", float: "FP64", bool: "BOOL", str: "BYTES"}


class ServerMetadata(BaseModel):
    """The answer of /v2."""

    name: str = "carso"
    version: str = __version__
    extensions: tuple[str, ...] = ("binary_tensor_data", "model_configuration", "statistics")


class TensorMetadata(BaseModel):
    """One input or output of a model."""

    name: str
    datatype: str
    shape: list[int]  # -1: any


class ModelMetadata(BaseModel):
    """The answer of /v2/models/NAME."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class TensorConfig(BaseModel):
    """One input or output of a model, in Triton's words."""

    name: str
    data_type: str
    dims: list[int] = Field(description="Without the first dimension, which counts the images.")


class ModelConfig(BaseModel):
    """The answer of /v2/models/NAME/config: what Triton's extension for model configuration tells that holds here."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]


class IndexEntry(BaseModel):
    """One model of the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryIndex(RootModel[list[IndexEntry]]):
    """The answer of /v2/repository/index."""


class Model:
    """One path as a model of the protocol."""

    def __init__(
        self,
        path: PathName,
        classification: Classification,
        intake: Intake,
        manifest: Manifest,
        options: type[FastOptions],
        *,
        provider: str,
        max_images: int,
        evidence: Evidence,
        tells_typical: bool,
        tells_near: bool,
        proves: bool,
        whole: Whole,
    ) -> None:
        """`options`: RobustOptions with this service's limits on the robust path, FastOptions on the fast one.
        `tells_typical`: whether answers on this path say if an image is typical. `tells_near`: whether they say
        if it is nearly an earlier one. `proves`: whether labels can be proven. `whole`: keeps the statistics.
        """
        self.name = manifest.name if path == "robust" else f"{manifest.name}-fast"
        self.version = manifest.version
        self.path = path
        fields = {
            name: field
            for name, field in _PREDICTIONS[path, evidence].model_fields.items()
            if (tells_typical or name not in answers.TYPICAL_FIELDS)
            and (tells_near or name not in answers.NEAR_FIELDS)
            and name not in answers.CERTIFICATE_FIELDS
        }
        if proves and evidence == "full":
            fields |= _CERTIFIED
        self._classification = classification
        self._intake = intake
        self.provider = provider
        self.max_images = max_images
        self.max_values = json_values.limit(manifest.input.shape)
        self._options = options
        self._types = {name: _datatype(field.annotation) for name, field in fields.items()}
        self._statistics = Statistics(whole.cell(f"statistics/{path}"))
        self._tells_timings = evidence == "full"
        self.metadata = ModelMetadata(
            name=self.name,
            versions=(self.version,),
            platform="onnxruntime_carso",
            inputs=(_input(manifest.input),),
            outputs=tuple(
                TensorMetadata(
                    name=name,
                    datatype=self._types[name],
                    shape=[-1, len(manifest.classes)] if get_origin(field.annotation) is list else [-1],
                )
                for name, field in fields.items()
            ),
        )
        self.config = ModelConfig(
            name=self.name,
            platform=self.metadata.platform,
            backend="onnxruntime",
            max_batch_size=max_images,
            input=tuple(map(_config, self.metadata.inputs)),
            output=tuple(map(_config, self.metadata.outputs)),
        )

    @property
    def statistics(self) -> ModelStatistics:
        """What the model did since the service began."""
        return self._statistics.of(self.name, self.version, with_timings=self._tells_timings)

    async def infer(self, request: Request) -> Response:
        """Classify what came over HTTP. Raises UnknownOutput, and the errors of tensors.parse, Intake and
        Classification.
        """

        async def body() -> tuple[Asked, int]:
            data = await request.body()
            return partial(
                tensors.parse,
                data,
                request.headers.get(JSON_SIZE),
                max_images=self.max_images,
                max_values=self.max_values,
            ), len(data)

        asked, classified = await self.answer(request, body)
        return self._respond(request, asked, classified)

    async def answer(
        self, request: Request, body: Callable[[], Awaitable[tuple[Asked, int]]], *, deadline_ms: int | None = None
    ) -> tuple[InferRequest, Classified]:
        """Classify. Returns the request as it was understood, and what its caller is told.

        `body` waits for what was sent, and returns what takes it apart, and its size in bytes. `deadline_ms`: after the
        request's arrival, beside what its options say; None: none. Raises UnknownOutput, the errors of `body`, and
        those of Intake and Classification.
        """
        exchange = Exchange.of(request.scope)
        try:
            asked, classified = await self._answer(request, body, deadline_ms)
        except Exception:
            self._statistics.failed(seconds=time.monotonic() - exchange.arrived)
            raise
        self._statistics.succeeded(images=exchange.images or 0, timings=exchange.timings or {})
        return asked, classified

    async def _answer(
        self, request: Request, body: Callable[[], Awaitable[tuple[Asked, int]]], deadline_ms: int | None
    ) -> tuple[InferRequest, Classified]:
        self._classification.check(self.path)
        ask, size = await body()
        began = time.monotonic()
        take_apart = partial(self._take_apart, ask)
        asked, sources, options = await self._intake.parse(take_apart, size=size, receive=request.receive)
        if deadline_ms is not None and isinstance(options, RobustOptions):
            sooner = min(deadline_ms, options.deadline_ms or deadline_ms)
            options = options.model_copy(update={"deadline_ms": sooner})
        images = await self._intake.read(sources, options, size=size, receive=request.receive)
        return asked, await self._classify(request, images, options, decode=time.monotonic() - began)

    def _take_apart(self, ask: Asked) -> tuple[InferRequest, Sequence[Source], FastOptions]:
        asked, sources = ask()
        self._check_outputs(asked)
        return asked, sources, parse(self._options, b"", _options(asked, self.path))

    async def _classify(
        self, request: Request, images: np.ndarray, options: FastOptions, *, decode: float
    ) -> Classified:
        if isinstance(options, RobustOptions):
            return await self._classification.robust(request, images, options, decode=decode)
        return await self._classification.fast(request, images, options, decode=decode)

    def _check_outputs(self, asked: InferRequest) -> None:
        for output in asked.outputs or ():
            if output.name not in self._types:
                raise UnknownOutput(
                    f"{shown(output.name)} is not an output of {self.name}: {', '.join(self._types)} are"
                )

    def _respond(self, request: Request, asked: InferRequest, classified: Classified) -> Response:
        everything = bool((asked.parameters or {}).get("binary_data_output", False))
        response: dict[str, Any] = {"model_name": self.name, "model_version": self.version}
        if asked.id is not None:
            response["id"] = asked.id
        response["parameters"] = {"provider": self.provider, "request_id": Exchange.of(request.scope).request_id}
        body, json_size = tensors.respond(
            response,
            (
                (name, datatype, values, everything if binary is None else binary)
                for name, datatype, values, binary in self.outputs(asked, classified)
            ),
        )
        if json_size is None:
            return Response(body, media_type="application/json")
        return Response(body, headers={JSON_SIZE: str(json_size)}, media_type="application/octet-stream")

    def outputs(
        self, asked: InferRequest, classified: Classified
    ) -> Iterable[tuple[str, OutputType, list[Any], bool | None]]:
        """Yield each output that the request wants: name, datatype, values, and whether it asks for binary form."""
        wanted = {output.name: output.binary for output in asked.outputs or ()} or dict.fromkeys(self._types)
        for name, binary in wanted.items():
            values = [_value(prediction, name) for prediction in classified.predictions]
            yield name, self._types[name], values, binary


def _value(prediction: dict[str, Any], name: str) -> Any:
    """Return what a tensor holds of one prediction: a tensor has a number for every image, so 0 is `not proven`."""
    if name in _CERTIFIED:
        return (prediction.get("certified") or {}).get(name.removeprefix("certified_"), 0.0)
    return prediction[name]


def _options(asked: InferRequest, path: PathName) -> dict[str, Any]:
    """Return the parameters that are options, of either path; all others are the client's own, and are ignored.

    Triton's `timeout`, in microseconds, 0 for none, is the deadline.
    """
    options = {name: value for name, value in (asked.parameters or {}).items() if name in _KNOWN and value is not None}
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


def _config(tensor: TensorMetadata) -> TensorConfig:
    data_type = {"BYTES": "STRING"}.get(tensor.datatype, tensor.datatype)
    return TensorConfig(name=tensor.name, data_type=f"TYPE_{data_type}", dims=tensor.shape[1:])


def _datatype(annotation: Any) -> OutputType:
    """Return the datatype of a prediction's field, or of the items of its list."""
    if get_origin(annotation) is UnionType:
        annotation, _ = get_args(annotation)  # or None, where the output is not there at all
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    return "BYTES" if get_origin(annotation) is Literal else _DATATYPES[annotation]


def add_to(app: FastAPI, models: Sequence[Model], probes: Probes) -> None:
    """Add the protocol's endpoints to an application.

    Every path is spelt out, so that metrics can name it. The protocol's clients learn of all others why they fail.
    """
    guarded, health = openapi.GUARDED, openapi.HEALTH

    @app.get("/v2", summary="The server, in the Open Inference Protocol", responses=guarded)
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata()

    @app.get(LIVE_V2, summary=f"As {LIVE}", responses=health)
    async def live() -> dict[str, bool]:
        probes.live()
        return {"live": True}

    @app.get(READY_V2, summary=f"As {READY}", responses=health)
    async def ready() -> dict[str, bool]:
        probes.ready()
        return {"ready": True}

    async def index(request: Request) -> Response:
        content = json_values.parse(await request.body() or b"{}", max_values=_INDEX_VALUES)
        entries = [
            IndexEntry(
                name=model.name,
                version=model.version,
                state="READY" if probes.is_ready else "UNAVAILABLE",
                reason="" if probes.is_ready else "this process is stopping, or its engine is dead",
            )
            for model in models
            if probes.is_ready or not (isinstance(content, dict) and content.get("ready"))
        ]
        return Response(RepositoryIndex(entries).model_dump_json(), media_type="application/json")

    openapi.add_endpoint(
        app,
        "/v2/repository/index",
        index,
        summary="The models, in Triton's and MLServer's extension for repositories",
        answer=RepositoryIndex,
        errors=openapi.INDEX_ERRORS,
        extra={"requestBody": {"content": {"application/json": {"schema": _INDEX_REQUEST}}}},
    )

    @app.get("/v2/models/stats", summary="What the models did so far", responses=guarded)
    async def all_statistics() -> AllStatistics:
        return AllStatistics(model_stats=[model.statistics for model in models])

    for model in models:
        for at in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
            _add_model(app, probes, model, at)

    @app.api_route("/v2/models/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    async def no_such_model(rest: str) -> None:
        names = " and ".join(model.name for model in models)
        raise NotFound(f"there is nothing at this path: the models here are {names}")


def _add_model(app: FastAPI, probes: Probes, model: Model, at: str) -> None:
    async def metadata() -> ModelMetadata:
        return model.metadata

    async def ready() -> dict[str, Any]:
        probes.ready()
        return {"name": model.name, "ready": True}

    async def config() -> ModelConfig:
        return model.config

    async def statistics() -> AllStatistics:
        return AllStatistics(model_stats=[model.statistics])

    both = openapi.GUARDED | openapi.HEALTH
    app.get(f"{at}/config", summary=f"The configuration of {model.name}", responses=openapi.GUARDED)(config)
    app.get(f"{at}/stats", summary=f"What {model.name} did so far", responses=openapi.GUARDED)(statistics)
    app.get(at, summary=f"The model {model.name}", responses=openapi.GUARDED)(metadata)
    app.get(f"{at}/ready", summary=f"Whether {model.name} takes requests", responses=both)(ready)
    of_the_path = (*openapi.ROBUST_ERRORS, ConflictingParameters) if model.path == "robust" else ()
    openapi.add_endpoint(
        app,
        f"{at}/infer",
        model.infer,
        summary=f"Classify, as the model {model.name} of the Open Inference Protocol",
        answer=InferResponse,
        errors=(*openapi.TENSOR_ERRORS, *of_the_path),
        extra=openapi.operation_on_tensors(InferRequest),
    )
