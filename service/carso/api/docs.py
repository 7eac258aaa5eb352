"""/docs: Swagger UI, which shows the OpenAPI document and tries it out.

The page asks no other host for anything, and its content security policy forbids it to. Every address in it is
relative, so it works below any prefix.
"""

from __future__ import annotations

from pathlib import Path

import fastapi_offline  # for the files of Swagger UI that it holds
from fastapi import FastAPI
from starlette.responses import FileResponse, Response

PAGE = "/docs"
STYLE, SCRIPT, START = f"{PAGE}/swagger-ui.css", f"{PAGE}/swagger-ui-bundle.js", f"{PAGE}/start.js"
DOCUMENT = "/openapi.json"  # FastAPI's own
# A browser cannot send a key before it has a page to type it into, and none of these tells of anybody's images.
PATHS = frozenset((PAGE, STYLE, SCRIPT, START, DOCUMENT))

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_ASSETS = Path(fastapi_offline.__file__).parent / "static"
_HTML = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CARSO</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{STYLE[1:]}">
</head>
<body>
<div id="interface"></div>
<script src="{SCRIPT[1:]}"></script>
<script src="{START[1:]}"></script>
</body>
</html>
"""
# Without validatorUrl, Swagger UI shows a badge that another host draws.
_START = f"""SwaggerUIBundle({{
  url: "{DOCUMENT[1:]}",
  dom_id: "#interface",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
}});
"""


def add_to(app: FastAPI) -> None:
    """Add the page and what it loads to an application."""

    @app.get(PAGE, include_in_schema=False)
    async def page() -> Response:
        return Response(_HTML, headers={"content-security-policy": POLICY}, media_type="text/html")

    @app.get(START, include_in_schema=False)
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    @app.get(STYLE, include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(_ASSETS / Path(STYLE).name)

    @app.get(SCRIPT, include_in_schema=False)
    async def script() -> FileResponse:
        return FileResponse(_ASSETS / Path(SCRIPT).name)
