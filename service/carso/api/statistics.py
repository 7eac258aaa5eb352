"""What a model of the Open Inference Protocol did so far, in the form of Triton's extension for statistics.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import BaseModel, Field

from carso.board.whole import Cell, Numbers


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
    """The statistics of one model, since the service began."""

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


_STAGES = tuple(InferenceStatistics.model_fields)
_NOTHING: Numbers = (0,) * (2 + 2 * len(_STAGES))


class Statistics:
    """Counts the requests of one model, over all workers. For use on the event loop only."""

    def __init__(self, cell: Cell) -> None:
        """`cell`: keeps images, the time of the last answer, and count and nanoseconds of each stage."""
        self._cell = cell

    def succeeded(self, *, images: int, timings: Mapping[str, float]) -> None:
        """Count an answer. `timings`: in milliseconds, as answers.RobustTimings or FastTimings name them."""
        stages = {
            "queue": timings["queue_ms"],
            "compute_input": timings["decode_ms"],
            "compute_infer": timings["first_pass_ms"] + timings.get("vote_ms", 0.0),
        }
        stages["compute_output"] = max(0.0, timings["total_ms"] - sum(stages.values()))
        stages["success"] = timings["total_ms"]
        self._add({name: 1e-3 * milliseconds for name, milliseconds in stages.items()}, images=images)

    def failed(self, *, seconds: float) -> None:
        """Count a request that got an error."""
        self._add({"fail": seconds})

    def of(self, name: str, version: str, *, with_timings: bool) -> ModelStatistics:
        """Return what a client is told of the model."""
        images, last, *stages = map(int, self._cell.read() or _NOTHING)
        durations = {
            stage: Duration(count=count, ns=ns)
            for stage, count, ns in zip(_STAGES, stages[::2], stages[1::2], strict=True)
        }
        return ModelStatistics(
            name=name,
            version=version,
            last_inference=last,
            inference_count=images,
            execution_count=durations["success"].count,
            inference_stats=InferenceStatistics(**durations) if with_timings else None,
        )

    def _add(self, seconds: Mapping[str, float], *, images: int | None = None) -> None:
        """Add to the durations of some stages. `images`: that were classified; None: there was no answer."""

        def added(numbers: Numbers) -> Numbers:
            sums = list(numbers or _NOTHING)
            if images is not None:
                sums[0] += images
                sums[1] = int(1e3 * time.time())
            for stage, took in seconds.items():
                place = 2 + 2 * _STAGES.index(stage)
                sums[place] += 1
                sums[place + 1] += round(1e9 * took)
            return tuple(sums)

        self._cell.change(added)
