"""The page at /: an attack that fails before your eyes, and how the service fares.

It is plain HTML, CSS and JavaScript modules in `carso/page`, which nothing has to build. It asks this service alone,
and its content security policy forbids it to ask another. Every address in it is relative, so it works below any
prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from carso import errors
from carso.api import openapi
from carso.api.answers import SampleImages
from carso.bundle import Bundle
from carso.errors import NotFound

PAGE, FILES = "/", "/page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"content-security-policy": POLICY}
_FOLDER = Path(__file__).parents[1] / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def paths() -> frozenset[str]:
    """Return the paths of the page and its files. They tell of nobody's images, and a browser has no key before it has
    a page to type one into."""
    return frozenset((PAGE, *(path for path, _ in _files())))


def add_to(app: FastAPI) -> None:
    """Add the page and what it loads to an application."""
    for path, file in ((PAGE, _FOLDER / "index.html"), *_files()):
        _serve(app, path, file.read_bytes(), _TYPES[file.suffix])


def add_samples_to(app: FastAPI, bundle: Bundle) -> None:
    """Add the bundle's samples to an application."""

    @app.get("/samples", summary="The samples that the bundle ships", responses=openapi.GUARDED)
    async def samples() -> SampleImages:
        return SampleImages.of(bundle.samples)

    @app.get(
        "/samples/{file}",
        summary="One of these samples",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **openapi.GUARDED,
            **openapi.responses(errors.NotFound),
        },
    )
    async def sample(file: str) -> Response:
        return _sample(file, bundle.sample_files)


def _sample(file: str, files: Mapping[str, bytes]) -> Response:
    if file not in files:
        raise NotFound("this bundle has no such sample; GET /samples lists those that it has")
    return Response(files[file], media_type="image/png")


def _files() -> Iterator[tuple[str, Path]]:
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in (".css", ".js"):
            yield f"{FILES}/{file.name}", file


def _serve(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    async def serve() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    app.add_api_route(path, serve, methods=["GET"], include_in_schema=False)
