"""What a model of the Open Inference Protocol did so far, in the form of Triton's extension for statistics.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, Field


class Duration(BaseModel):
    """Of how many requests, and how many nanoseconds together."""

    count: int = 0
    ns: int = 0


class InferenceStatistics(BaseModel):
    """The stages of the requests so far."""

    success: Duration = Field(description="Requests that were answered, from their arrival to the answer.")
    fail: Duration = Field(description="Requests that got an error.")
    queue: Duration = Field(description="Waiting for the first pass.")
    compute_input: Duration = Field(description="From body to array.")
    compute_infer: Duration = Field(description="First pass and vote.")
    compute_output: Duration = Field(description="Writing the answer.")


class ModelStatistics(BaseModel):
    """The statistics of one model, since the process began."""

    name: str
    version: str
    last_inference: int = Field(default=0, description="Milliseconds since 1970; 0: none yet.")
    inference_count: int = Field(default=0, description="Images that were classified.")
    execution_count: int = Field(default=0, description="Requests that were answered.")
    inference_stats: InferenceStatistics | None = Field(
        default=None, description="Null where the operator withholds the evidence, of which timings are a part."
    )
    batch_stats: list[Duration] = Field(default=[], description="Always empty: batches mix the requests in flight.")


class AllStatistics(BaseModel):
    """The answer of every path that ends in /stats."""

    model_stats: list[ModelStatistics]


@dataclass
class Statistics:
    """Counts the requests of one model. For use on the event loop only."""

    _images: int = 0
    _last: int = 0
    _durations: dict[str, Duration] = field(
        default_factory=lambda: {name: Duration() for name in InferenceStatistics.model_fields}
    )

    def succeeded(self, *, images: int, timings: Mapping[str, float]) -> None:
        """Count an answer. `timings`: in milliseconds, as answers.RobustTimings or FastTimings name them."""
        self._images += images
        self._last = int(1e3 * time.time())
        stages = {
            "queue": timings["queue_ms"],
            "compute_input": timings["decode_ms"],
            "compute_infer": timings["first_pass_ms"] + timings.get("vote_ms", 0.0),
        }
        stages["compute_output"] = max(0.0, timings["total_ms"] - sum(stages.values()))
        for name, milliseconds in {**stages, "success": timings["total_ms"]}.items():
            self._add(name, 1e-3 * milliseconds)

    def failed(self, *, seconds: float) -> None:
        """Count a request that got an error."""
        self._add("fail", seconds)

    def of(self, name: str, version: str, *, with_timings: bool) -> ModelStatistics:
        """Return what a client is told of the model."""
        durations = {stage: duration.model_copy() for stage, duration in self._durations.items()}
        return ModelStatistics(
            name=name,
            version=version,
            last_inference=self._last,
            inference_count=self._images,
            execution_count=durations["success"].count,
            inference_stats=InferenceStatistics(**durations) if with_timings else None,
        )

    def _add(self, name: str, seconds: float) -> None:
        duration = self._durations[name]
        duration.count += 1
        duration.ns += round(1e9 * seconds)
