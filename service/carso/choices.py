"""The choices that settings, requests, training and the engine have in common, and their bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

PathName = Literal["fast", "robust"]  # fast: the first pass alone; robust: both passes and the vote
Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["float32", "tf32", "int8"]  # of the votes
PrecisionAsked = Literal["auto", "float32", "tf32", "int8"]
Evidence = Literal["full", "label"]  # how much of an answer callers see
Checked = Literal["robust", "all", "off"]  # on which paths images are compared with what the purifier knows
CHECKED: dict[Checked, tuple[PathName, ...]] = {"robust": ("robust",), "all": ("fast", "robust"), "off": ()}
Untypical = Literal["mark", "refuse"]  # what happens to an image that is not like that
Duplicates = Literal["off", "mark", "refuse"]  # what happens to an image that is nearly one that its caller sent before
Fit = Literal["pad", "stretch"]  # how an image of other proportions is made to fit

# What an answer says of a proof (docs/certificate.md). report: what is proven at an eps. decide: the same, and a proven
# label needs no vote. max: the largest eps that is proven
Certifying = Literal["off", "report", "decide", "max"]
CertifyMode = Literal["report", "decide", "max"]  # what Certifying is when it is not off
DecidedBy = Literal["certificate", "vote"]
DEFAULT_EPS = 0.3  # of a proof: that of MNIST's tables. In units of the input's values
LEAST_EPS = 1e-6  # below it, next to nothing is left of a box in float32
BISECTIONS = 7  # of `max`, each a pass
MOST_CERTIFY_ROWS = 2 * BISECTIONS  # rows of work of an image's proof: a pass costs about two first passes

# ONNX Runtime's execution providers
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
PRECISIONS: dict[str, tuple[Precision, ...]] = {CPU: ("float32", "int8"), CUDA: ("float32", "tf32")}  # of the votes

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact

MIN_RISK = 1e-12  # below it, rounding of logarithms would no longer be small beside the stopping rule
MAX_RISK = 0.5


MAX_WORKERS = 64
EngineShare = Literal["auto", "shared", "own"]  # whether all workers have one engine
Workers = Annotated[int, Field(ge=1, le=MAX_WORKERS)] | Literal["auto"]


def _allowed_risk(risk: float) -> float:
    if risk and not MIN_RISK <= risk <= MAX_RISK:
        raise ValueError(f"neither 0 nor from {MIN_RISK} to {MAX_RISK}")
    return risk


Risk = Annotated[
    float,
    AfterValidator(_allowed_risk),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_RISK, "maximum": MAX_RISK}]}),
]

# The least rows that an image of the robust path is priced at: it holds memory however few votes it asks for.
LEAST_PRICE = 64


def price_of(samples: int) -> int:
    """Return the rows of work that an image of the robust path is taken to owe: its first pass and its votes, or
    LEAST_PRICE if that is more."""
    return max(1 + samples, LEAST_PRICE)
