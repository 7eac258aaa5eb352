"""The least that a FastAPI endpoint for images costs: one route that decodes as the service does, and no more.

Run as a process of its own: python -m benchmarks.bare BUNDLE PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from carso.bundle import Bundle
from carso.images.reader import Reader
from fastapi import FastAPI, Request, Response
from pydantic_core import to_json


def create_app(bundle: Bundle) -> FastAPI:
    app = FastAPI()
    reader = Reader(bundle.manifest.input, max_images=1, max_pixels=2**24)

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/decode")
    async def decode(request: Request) -> Response:
        images = reader.read([await request.body()])
        return Response(to_json({"shape": images.shape}), media_type="application/json")

    return app


if __name__ == "__main__":
    uvicorn.run(
        create_app(Bundle.load(Path(sys.argv[1]))),
        port=int(sys.argv[2]),
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
    )
