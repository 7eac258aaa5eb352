"""Endpoints, and the parts of the OpenAPI document that FastAPI cannot read off handlers that take their requests apart
themselves: bodies, options, errors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from carso import errors as e
from carso.api.answers import ErrorAnswer
from carso.bundle import InputSpec
from carso.http.exchange import Handler
from carso.http.statuses import STATUS
from carso.images.media_types import IMAGE_TYPES, JSON, MULTIPART, NDJSON, NPY
from carso.options import MAX_DEADLINE_MS, FastOptions

Errors = tuple[type[e.RequestError], ...]

ROBUST_ERRORS: Errors = (e.SeedRefused, e.DeadlineExceeded)
SHOWN_ERRORS: Errors = (e.EvidenceWithheld,)  # for what the votes were, or are
_CLASSIFICATION_ERRORS: Errors = (
    e.UndecodableImage,
    e.UndecodableJson,
    e.UndecodableBase64,
    e.MalformedRequest,
    e.Unauthorized,
    e.RequestTimeout,
    e.BodyTooLarge,
    e.TooManyImages,
    e.TooManyPixels,
    e.UnsupportedMediaType,
    e.HeadTooLarge,
    e.WrongShape,
    e.UntypicalImage,
    e.NearDuplicate,
    e.CannotCertify,
    e.NotFinite,
    e.OutOfRange,
    e.WrongScale,
    e.BlankImage,
    e.EmptyBatch,
    e.RaggedArray,
    e.NotNumbers,
    e.TransparentImage,
    e.AnimatedImage,
    e.UnknownParameter,
    e.InvalidParameter,
    e.Overloaded,
    e.InternalError,
    e.EngineFailed,
    e.NotReady,
)
NATIVE_ERRORS: Errors = (
    *_CLASSIFICATION_ERRORS,
    e.UndecodableNpy,
    e.UndecodableMultipart,
    e.ObjectArray,
    e.UnsupportedDtype,
    e.UnexpectedPart,
    e.MissingImages,
    e.ConflictingParameters,
)
STREAM_ERRORS: Errors = (
    e.MalformedRequest,
    e.Unauthorized,
    e.HeadTooLarge,
    e.UnknownParameter,
    e.InvalidParameter,
    e.ConflictingParameters,
    e.CannotCertify,
    e.Overloaded,
    e.InternalError,
    e.NotReady,
)
INDEX_ERRORS: Errors = (
    e.UndecodableJson,
    e.MalformedRequest,
    e.Unauthorized,
    e.RequestTimeout,
    e.BodyTooLarge,
    e.UnsupportedMediaType,
    e.Overloaded,
    e.InternalError,
)
TENSOR_ERRORS: Errors = (*_CLASSIFICATION_ERRORS, e.InvalidTensor, e.UnknownOutput)

EVENTS = (
    "If Accept begins with text/event-stream. Each image has an event `first_pass` (image, label, class_name, "
    "probabilities), and after each round one `tally` (image, tally, votes, risk_reached, needed). The last event is "
    "`answer`, the same as in JSON, or `error`, the same as an error's JSON with its `status`."
)

_HEADERS = {
    "X-Request-ID": {
        "description": "The id of the request: the caller's own if it is well-formed, or a fresh one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "Retry-After": {
        "description": "Seconds after which the request may be sent again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}
_RETRIED = ("429", "503")


class _DirectRoute(APIRoute):
    """An endpoint that ``carso.http.direct`` calls. FastAPI documents it, and refuses other methods than POST."""


def direct(app: FastAPI) -> dict[str, Handler]:
    """Return the endpoints that are to be called directly, by path."""
    return {route.path: route.endpoint for route in app.routes if isinstance(route, _DirectRoute)}


def add_endpoint(
    app: FastAPI,
    path: str,
    handler: Handler,
    *,
    summary: str,
    answer: type[BaseModel],
    errors: Iterable[type[e.RequestError]],
    extra: dict[str, Any],
    events: str = "",
) -> None:
    """Add a POST endpoint whose handler takes its request apart itself.

    `answer` and `errors` are what it answers with, and `events`, in words, what it streams if it does; `extra` is the
    rest of its `openapi_extra`.
    """
    answered: dict[str, Any] = {"model": answer}
    if events:
        answered["content"] = {"text/event-stream": {"schema": {"type": "string", "description": events}}}
    app.router.add_api_route(
        path,
        handler,
        methods=["POST"],
        summary=summary,
        responses={200: answered, **responses(*errors)},
        openapi_extra=extra,
        route_class_override=_DirectRoute,
    )


def add_stream(
    app: FastAPI,
    path: str,
    handler: Handler,
    *,
    options: type[FastOptions],
    spec: InputSpec,
    lines: dict[str, Any],
) -> None:
    """Add the endpoint of streams. `options` are in its query only; `lines` is the schema of a line of its answer.

    OpenAPI 3.1 has no words for a body of many JSON texts, so an extension holds the schema of one.
    """
    frame = _object(
        {
            "id": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 128}]},
            "image": _image(spec),
            "deadline_ms": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
        },
        required="image",
    )
    text = {"type": "string", "format": "binary"}
    sent = {**text, "description": "Lines of JSON, each a frame.", "x-line": frame}
    answered = {**text, "description": "Lines of JSON, as they become known.", "x-line": _inlined(lines)}
    app.router.add_api_route(
        path,
        handler,
        methods=["POST"],
        summary="Classify frames by the first pass, and those that a policy chooses by vote too",
        description="The same path speaks WebSocket: each message is a line.",
        responses={
            200: {"description": "Successful Response", "content": {NDJSON: {"schema": answered}}},
            **responses(*STREAM_ERRORS),
        },
        openapi_extra={
            "parameters": _parameters(options),
            "requestBody": {"required": True, "content": {NDJSON: {"schema": sent}}},
        },
        route_class_override=_DirectRoute,
    )


def responses(*types: type[e.RequestError]) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that answers with these errors."""
    names: dict[int, list[str]] = defaultdict(list)
    for kind in types:
        names[STATUS[kind]].append(f"- `{kind.name}`: {kind.__doc__}")
    return {status: {"model": ErrorAnswer, "description": "\n".join(lines)} for status, lines in sorted(names.items())}


HEALTH = responses(e.InternalError, e.NotReady)
GUARDED = responses(e.InternalError, e.Unauthorized)


def operation(options: type[FastOptions], spec: InputSpec, *, max_images: int) -> dict[str, Any]:
    """Return the `openapi_extra` of an endpoint that classifies images of `spec`."""
    return {
        "parameters": _parameters(options),
        "requestBody": {"required": True, "content": _content(_properties(options), spec, max_images=max_images)},
    }


def operation_id(route: APIRoute) -> str:
    """Name an operation after its path, as generated clients name their functions: /classify/fast is classify_fast."""
    return re.sub(r"[^A-Za-z0-9]+", "_", route.path).strip("_")


def documented(app: FastAPI, *, keys: bool, but: Collection[str]) -> Callable[[], dict[str, Any]]:
    """Return an `app.openapi` that tells of the headers of answers, which the envelope writes.

    `keys`: the service asks for API keys, at all paths but these.
    """
    plain = app.openapi

    def document() -> dict[str, Any]:
        schema = plain()  # made once, and kept
        components = schema["components"]
        components["headers"] = _HEADERS
        if keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for details in operations.values():
                if keys and path not in but:
                    details["security"] = [{"key": []}]
                for status, response in details["responses"].items():
                    names = _HEADERS if status in _RETRIED else ("X-Request-ID",)
                    response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
        return schema

    return document


def operation_on_tensors(request: type[BaseModel]) -> dict[str, Any]:
    """Return the `openapi_extra` of an endpoint of the Open Inference Protocol, whose JSON is a `request`."""
    binary = "The same JSON, and tensors in binary form behind it; the header says where it ends."
    content = {
        JSON: {"schema": _inlined(request.model_json_schema())},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": binary}},
    }
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "description": "Bytes of JSON that the body begins with; default: all.",
        "schema": {"type": "integer", "minimum": 0},
    }
    return {"parameters": [header], "requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without references; it must not refer to itself."""
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(item) for item in part]
        if not isinstance(part, dict):
            return part
        if reference := part.get("$ref"):
            part = {**definitions[reference.rpartition("/")[2]], **part}
            del part["$ref"]
        return {name: resolved(item) for name, item in part.items()}

    inlined: dict[str, Any] = resolved(schema)
    return inlined


def _properties(options: type[FastOptions]) -> dict[str, Any]:
    properties: dict[str, Any] = options.model_json_schema()["properties"]
    for schema in properties.values():
        schema.pop("title", None)
    return properties


def _parameters(options: type[FastOptions]) -> list[dict[str, Any]]:
    return [_parameter(name, schema) for name, schema in _properties(options).items()]


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Describe an option as a query parameter, never a required one: a query string has no null."""
    value = {key: item for key, item in schema.items() if key not in ("description", "anyOf", "default")}
    if alternatives := [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]:
        value |= alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    if schema.get("default") is not None:
        value["default"] = schema["default"]
    return {"name": name, "in": "query", "required": False, "description": schema["description"], "schema": value}


def _content(options: dict[str, Any], spec: InputSpec, *, max_images: int) -> dict[str, Any]:
    encoded = {"type": "string", "format": "binary"}
    images = {"type": "array", "minItems": 1, "maxItems": max_images, "items": _image(spec)}
    files = {"type": "array", "minItems": 1, "maxItems": max_images, "items": encoded}
    return {
        **{kind: {"schema": encoded} for kind in IMAGE_TYPES},
        MULTIPART: {"schema": _object({"file": files}, required="file")},
        JSON: {"schema": _object({"images": images, **options}, required="images")},
        NPY: {"schema": {**encoded, "description": _npy(spec)}},
    }


def _image(spec: InputSpec) -> dict[str, Any]:
    """Describe one image in JSON."""
    entry = {"anyOf": [_nested(spec, spec.shape), {"type": "string", "description": "Base64 of an encoded image."}]}
    if spec.shape[0] == 1:
        entry["anyOf"].insert(0, _nested(spec, spec.shape[1:]))
    return entry


def _object(properties: dict[str, Any], *, required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


def _nested(spec: InputSpec, shape: tuple[int, ...]) -> dict[str, Any]:
    """Describe nested lists of numbers. Their lengths hold unless `resize` is given, so only words state them."""
    schema: dict[str, Any] = {"type": "number", "minimum": spec.low, "maximum": spec.high}
    for _ in shape:
        schema = {"type": "array", "minItems": 1, "items": schema}
    return {**schema, "description": f"Numbers of shape {list(shape)}."}


def _npy(spec: InputSpec) -> str:
    channels, height, width = spec.shape
    shapes = [[channels, height, width], ["N", channels, height, width]]
    if channels == 1:
        shapes += [[height, width], ["N", height, width]]
    listed = ", ".join(str(shape).replace("'", "") for shape in shapes)
    return f"Floating point in [{spec.low:g}, {spec.high:g}], or uint8, which is scaled to it; of shape {listed}."
