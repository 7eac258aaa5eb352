"""The parts of the OpenAPI document that FastAPI cannot read off the handlers, which take their requests apart
themselves: bodies, options, errors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

from fastapi import FastAPI

from carso.api.answers import ErrorAnswer
from carso.api.tensors import InferRequest
from carso.bundle import InputSpec
from carso.errors import ClientGone, RequestError
from carso.images.bodies import IMAGE_TYPES, JSON, MULTIPART, NPY
from carso.options import FastOptions


def responses(*types: type[RequestError]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with these errors."""
    names: dict[int, list[str]] = defaultdict(list)
    for kind in types:
        names[kind.status].append(f"- `{kind.name}`: {kind.__doc__}")
    return {status: {"model": ErrorAnswer, "description": "\n".join(lines)} for status, lines in sorted(names.items())}


def all_errors(*, but: Iterable[type[RequestError]] = ()) -> list[type[RequestError]]:
    """Every error that a caller can get to see, without those in `but`."""
    return [kind for kind in RequestError.__subclasses__() if kind is not ClientGone and kind not in but]


def operation(options: type[FastOptions], spec: InputSpec, *, max_images: int) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that classifies images of `spec`."""
    properties = options.model_json_schema()["properties"]
    for schema in properties.values():
        schema.pop("title", None)
    return {
        "parameters": [_parameter(name, schema) for name, schema in properties.items()],
        "requestBody": {"required": True, "content": _content(properties, spec, max_images=max_images)},
    }


def guarded(app: FastAPI, *, but: Collection[str]) -> Callable[[], dict[str, Any]]:
    """`app.openapi` of a service that asks for API keys, at all paths but these."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        schema = plain()  # made once, and kept
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            if path not in but:
                for details in operations.values():
                    details["security"] = [{"key": []}]
        return schema

    return document


def operation_on_tensors() -> dict[str, Any]:
    """`openapi_extra` of an endpoint of the Open Inference Protocol."""
    binary = "The same JSON, and tensors in binary form behind it; the header says where it ends."
    content = {
        JSON: {"schema": _inlined(InferRequest.model_json_schema())},
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
    """A schema without references; it must not refer to itself."""
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


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A query string has no null, so an option that may be left out is simply not required."""
    value = {key: item for key, item in schema.items() if key not in ("description", "anyOf", "default")}
    if alternatives := [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]:
        value |= alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    if schema.get("default") is not None:
        value["default"] = schema["default"]
    return {"name": name, "in": "query", "required": False, "description": schema["description"], "schema": value}


def _content(options: dict[str, Any], spec: InputSpec, *, max_images: int) -> dict[str, Any]:
    encoded = {"type": "string", "format": "binary"}
    entry = {"anyOf": [_nested(spec, spec.shape), {"type": "string", "description": "Base64 of an encoded image."}]}
    if spec.shape[0] == 1:
        entry["anyOf"].insert(0, _nested(spec, spec.shape[1:]))
    images = {"type": "array", "minItems": 1, "maxItems": max_images, "items": entry}
    files = {"type": "array", "minItems": 1, "maxItems": max_images, "items": encoded}
    return {
        **{kind: {"schema": encoded} for kind in IMAGE_TYPES},
        MULTIPART: {"schema": _object({"file": files}, required="file")},
        JSON: {"schema": _object({"images": images, **options}, required="images")},
        NPY: {"schema": {**encoded, "description": _npy(spec)}},
    }


def _object(properties: dict[str, Any], *, required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


def _nested(spec: InputSpec, shape: tuple[int, ...]) -> dict[str, Any]:
    """Nested lists of numbers; their lengths hold unless `resize` is given, so they are said in words only."""
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
