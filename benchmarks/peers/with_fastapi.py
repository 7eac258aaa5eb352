"""FastAPI and ONNX Runtime, as most would begin: no batching, and a process for each processor."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from system import PORT, WORKERS, System

app = FastAPI()
system = System()


@app.get("/health")
async def health() -> str:
    return "ok"


@app.post("/classify")
async def classify(request: Request) -> dict[str, object]:
    file = await request.body()
    return await run_in_threadpool(lambda: system.classify(system.read(file))[0])


if __name__ == "__main__":
    uvicorn.run("with_fastapi:app", host="127.0.0.1", port=PORT, workers=WORKERS, access_log=False, log_level="warning")
