"""What the endpoints answer: the models that document it, and the functions that build it.

The answers of /classify and /classify/fast are built as plain dicts: validating what this service has computed itself
would cost more than the first pass does. The tests hold them against the models.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from carso.bundle import Bundle, Cell, InputSpec, Typical
from carso.choices import (
    Certifying,
    Checked,
    DecidedBy,
    Device,
    Duplicates,
    Evidence,
    Precision,
    PrecisionAsked,
    Untypical,
)
from carso.images.rendering import as_png
from carso.inference.jobs import Ending, FirstSeen, Result, Standing, Times, VotePlan
from carso.samples import Sample, Samples


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorAnswer(_Answer):
    """Every answer that is not 2xx."""

    error: str = Field(description="What is wrong, by name.", examples=["wrong_shape"])
    message: str = Field(description="What is wrong, with the value, and what to do.")
    request_id: str = Field(description="As in the header X-Request-ID.")


class BundleName(_Answer):
    """Which bundle is served."""

    name: str
    version: str
    checksum: str = Field(description="SHA-256 of the bundle's manifest, which lists those of all its files.")


class FastTimings(_Answer):
    """In milliseconds."""

    decode_ms: float = Field(description="Body to array.")
    queue_ms: float = Field(description="Waiting for the first pass.")
    first_pass_ms: float
    total_ms: float = Field(description="From the request's arrival to the writing of this answer.")


class RobustTimings(FastTimings):
    """Durations in milliseconds, of the robust path."""

    vote_ms: float = Field(description="From the end of the first pass to the end of the last election.")


class Label(_Answer):
    """A prediction whose evidence is withheld, on the fast path."""

    label: int
    class_name: str
    typical: bool | None = Field(
        default=None,
        description="Whether the image is like those that the bundle knows: excess and contrast are within the "
        "thresholds in /info. False: the label means little. Absent where this is not looked at.",
    )


_EXCESS = Field(
    default=None,
    description="How far the image is from its purified version, beyond what an attacker may change: the mean of "
    "max(|image - purified| - eps, 0). With `typical`.",
)
_CONTRAST = Field(default=None, description="The image's largest value less its smallest. With `typical`.")


CERTIFICATE = (
    "It proves that every image which differs from the one sent by at most eps in every value gets the same label from "
    "the first pass. It does not prove that the label is right, and says nothing of the vote, of other changes or of a "
    "larger eps."
)


class Certified(_Answer):
    """What is proven of one image's first pass."""

    eps: float = Field(description="In units of the image's values.")
    margin: float = Field(description="By how much the label's score stays above all others, at least.")


_CERTIFIED = Field(
    default=None,
    description=f"The certificate of the image. {CERTIFICATE} Null: nothing is proven. Absent where `certify` is off.",
)


_NEAR_DUPLICATE = Field(
    default=None,
    description="Whether the image is nearly one that the same caller sent before. Many of these are the sign of an "
    "attacker who searches by queries. The same image again is none. Absent where this is not looked at.",
)


class FastPrediction(Label):
    """What the first pass says of one image."""

    excess: float | None = _EXCESS
    contrast: float | None = _CONTRAST
    near_duplicate: bool | None = _NEAR_DUPLICATE
    certified: Certified | None = _CERTIFIED
    probabilities: list[float] = Field(description="Of each class, in order.")


class RobustLabel(Label):
    """A prediction whose evidence is withheld, on the robust path."""

    complete: bool = Field(description="False if the deadline ended the count, before it reached `risk`.")


Png = Annotated[str, WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"})]


class ExplainedVote(_Answer):
    """One of the first votes."""

    label: int
    class_name: str
    image: Png = Field(description="What it was cast on.")


class ExplainedFirstPass(_Answer):
    """What the fast path says of the same image."""

    label: int
    class_name: str
    probabilities: list[float] = Field(description="Of each class, in order.")


class FirstPassEvent(ExplainedFirstPass):
    """The event `first_pass`, which comes once for each image."""

    image: int = Field(description="Its index in the request.")


class TallyEvent(_Answer):
    """The event `tally`: the votes of one image after a round."""

    image: int = Field(description="Its index in the request.")
    tally: list[int] = Field(description="Votes of each class, in order.")
    votes: int = Field(description="Votes cast.")
    risk_reached: float = Field(description="As in an answer, if the count ended here.")
    needed: int = Field(
        description="The fewest further votes that end the count, if all go to the leader; 0: it has ended."
    )


class ErrorEvent(ErrorAnswer):
    """The last event, if the request ended in an error after the first one."""

    status: int = Field(description="The HTTP status that the error would have had.")


class Explanation(_Answer):
    """What the votes of one image were cast on. Pictures are PNG in base64, of the bundle's size."""

    input: Png = Field(description="The image as it was read.")
    purified: Png = Field(
        description="The purified version with which `typical` compares the image: that of the latent 0."
    )
    distance: float = Field(
        description="The mean of |image - purified|; `excess` is the part of it that no allowed change explains."
    )
    mean: Png = Field(description="The mean of the purified images of the first votes.")
    averaged: int = Field(description="How many purified images it is the mean of.")
    votes: list[ExplainedVote] = Field(description="The first votes, and the purified images that they were cast on.")
    first_pass: ExplainedFirstPass


class RobustPrediction(RobustLabel):
    """What the vote says of one image."""

    label: int = Field(
        description="The class with most votes, the lowest among equals; where a certificate decided, the first pass's."
    )
    excess: float | None = _EXCESS
    contrast: float | None = _CONTRAST
    near_duplicate: bool | None = _NEAR_DUPLICATE
    certified: Certified | None = _CERTIFIED
    decided_by: DecidedBy | None = Field(
        default=None,
        description="certificate: the label was proven for all images within eps, and no vote was cast (`certify` is "
        "decide). vote: the votes elected it, and the certificate, if any, is of `fast_label`. Absent where `certify` "
        "is off.",
    )
    share: float = Field(description="The leader's votes / votes cast; 0 where a certificate decided.")
    tally: list[int] = Field(description="Votes of each class, in order.")
    votes: int = Field(description="Votes cast.")
    samples: int = Field(description="Votes asked for.")
    rule: Ending = Field(description="What ended the count.")
    risk: float = Field(description="The risk that was asked for.")
    risk_reached: float = Field(
        description="The bound that this tally gives on the chance that all `samples` votes would elect another class: "
        "0 if the outcome is certain, 1 if the tally says nothing, as where a certificate decided. It is about the "
        "count, not about robustness."
    )
    seed: int = Field(description="Seed of this image's latents.")
    fast_label: int = Field(description="The fast path's answer to the same image.")
    agree: bool = Field(description="Whether both paths give the same label.")


class ExplainedPrediction(RobustPrediction):
    """The same, with what the votes were cast on if that was asked for."""

    explanation: Explanation | None = Field(default=None, description="With explain=true, and absent without.")


class _Trailer(_Answer):
    bundle: BundleName
    provider: str = Field(description="ONNX Runtime's execution provider in use.")
    request_id: str


class FastAnswer(_Trailer):
    """The answer of /classify/fast."""

    predictions: list[FastPrediction] = Field(description="One per image, in the order sent.")
    timings: FastTimings


class RobustAnswer(_Trailer):
    """The answer of /classify. It holds all that its count depends on: `carso verify` counts again."""

    predictions: list[ExplainedPrediction] = Field(description="One per image, in the order sent.")
    images: list[str] = Field(description="SHA-256 of each image as it was read: float32, [C, H, W], little-endian.")
    options: dict[str, Any] = Field(description="Every option of the request, those that were not given included.")
    precision: Precision = Field(description="Of the votes.")
    timings: RobustTimings


class FastLabels(_Trailer):
    """Where the operator withholds the evidence."""

    predictions: list[Label] = Field(description="One per image, in the order sent.")


class RobustLabels(_Trailer):
    """Where the operator withholds the evidence."""

    predictions: list[RobustLabel] = Field(description="One per image, in the order sent.")


class BundleInfo(BundleName):
    """What is served: the data, the sizes, and the accuracies that were measured."""

    dataset: str
    classes: tuple[str, ...]
    input: InputSpec
    code: int = Field(description="Size of the compressed representation.")
    latent: int = Field(description="Size of a latent.")
    samples: int = Field(description="Votes counted per image by default.")
    table: tuple[Cell, ...] = Field(description="Measured accuracies.")
    typical: Typical | None = Field(
        description="The thresholds of typical images, and what they flag; null: this bundle cannot tell."
    )
    signed_by: str | None = Field(
        description="SHA-256 of the public key (PEM) that verified the bundle's signature at the start; null: the "
        "service was not told to verify it."
    )


class Limits(_Answer):
    """How much one request may ask for."""

    max_samples: int
    max_images: int
    max_body_bytes: int
    max_pixels: int
    allow_seed: bool
    evidence: Evidence
    typical: Checked = Field(description="The paths on which images are compared with what the bundle knows.")
    untypical: Untypical = Field(description="What happens to an image that is not like that.")
    duplicates: Duplicates = Field(description="What happens to an image that is nearly an earlier one of its caller.")
    certify: Certifying = Field(description="What is proven where a request does not say.")
    certify_eps: float = Field(description="At which eps, where a request does not say.")


class DeviceInfo(_Answer):
    """On what the bundle runs."""

    asked: Device
    provider: str = Field(description="What is in use, as the built session tells.")
    precision: Precision = Field(description="Of the votes.")
    precision_asked: PrecisionAsked
    precision_because: str = Field(description="Why the votes have this precision.")


class Info(_Answer):
    """The answer of /info."""

    version: str = Field(description="Of the service.")
    bundle: BundleInfo
    device: DeviceInfo
    limits: Limits
    workers: int = Field(description="Processes that share the limits and answer behind this address.")
    risk: float = Field(description="Used where a request gives none.")
    certifies: bool = Field(description="Whether certificates can be given here: what `certify` asks for.")
    certificate: str = Field(description="What a certificate proves; or why none can be given here.")
    media_types: tuple[str, ...] = Field(description="Bodies that are read.")


class SampleImages(_Answer):
    """The answer of /samples: the first images of a split, each followed by its attacked versions."""

    split: str | None = Field(description="Of the data set; null: this bundle ships no samples.")
    risk: float | None = Field(description="Of every count below.")
    images: tuple[Sample, ...] = Field(
        description="`file` is below /samples. `kind` says what the attacker saw: nothing (a clean image), the "
        "classifier alone (transfer), or all of CARSO (adaptive). `fast_label` and `robust_label` are what was "
        "answered when it was made."
    )

    @classmethod
    def of(cls, samples: Samples | None) -> SampleImages:
        """Return what /samples answers."""
        if samples is None:
            return cls(split=None, risk=None, images=())
        return cls(split=samples.split, risk=samples.risk, images=samples.images)


class Health(_Answer):
    """The answer of a probe that succeeds."""

    status: str


def bundle_name(bundle: Bundle) -> dict[str, str]:
    """Return a BundleName."""
    return {"name": bundle.manifest.name, "version": bundle.manifest.version, "checksum": bundle.checksum}


def bundle_info(bundle: Bundle, *, signed_by: str | None) -> BundleInfo:
    """Return what /info tells of a bundle."""
    manifest = bundle.manifest
    return BundleInfo(
        **bundle_name(bundle),
        dataset=manifest.dataset,
        classes=manifest.classes,
        input=manifest.input,
        code=manifest.code,
        latent=manifest.latent,
        samples=manifest.samples,
        table=manifest.table,
        typical=manifest.typical,
        signed_by=signed_by,
    )


def fast_predictions(result: Result, classes: tuple[str, ...], bounds: Typical | None) -> list[dict[str, Any]]:
    """Return a FastPrediction of each image. `bounds`: of typical images; None: nothing is said of that."""
    return [
        {"label": label, "class_name": classes[label], **figures, **near, **proven, "probabilities": probabilities}
        for (label, probabilities), figures, near, proven in zip(
            _first_pass(result), _typical(result, bounds), _near(result), _certified(result), strict=True
        )
    ]


def robust_predictions(
    result: Result, plan: VotePlan, classes: tuple[str, ...], bounds: Typical | None
) -> list[dict[str, Any]]:
    """Return a RobustPrediction of each image; each must have had a vote. `bounds`: as of `fast_predictions`."""
    return [
        {
            "label": outcome.label,
            "class_name": classes[outcome.label],
            **figures,
            **near,
            **proven,
            **({"decided_by": "certificate" if outcome.ending == "certificate" else "vote"} if proven else {}),
            "share": outcome.tally[outcome.label] / max(outcome.votes, 1),
            "tally": outcome.tally,
            "votes": outcome.votes,
            "samples": plan.samples,
            "rule": outcome.ending,
            "complete": outcome.ending != "deadline",
            "risk": plan.risk,
            "risk_reached": outcome.risk_reached,
            "seed": outcome.seed,
            "fast_label": fast_label,
            "agree": outcome.label == fast_label,
        }
        for outcome, (fast_label, _), figures, near, proven in zip(
            result.outcomes,
            _first_pass(result),
            _typical(result, bounds),
            _near(result),
            _certified(result),
            strict=True,
        )
    ]


def explanations(images: np.ndarray, result: Result, classes: tuple[str, ...], spec: InputSpec) -> list[dict[str, Any]]:
    """Return an Explanation of each of `images` [n, *shape], whose votes `result` explains."""
    return [
        {
            "input": _picture(image, spec),
            "purified": _picture(found.purified, spec),
            "distance": found.distance,
            "mean": _picture(found.mean, spec),
            "averaged": found.averaged,
            "votes": [
                {"label": label, "class_name": classes[label], "image": _picture(shown, spec)}
                for label, shown in zip(found.votes, found.shown, strict=True)
            ],
            "first_pass": {"label": label, "class_name": classes[label], "probabilities": probabilities},
        }
        for image, found, (label, probabilities) in zip(
            images, result.explanations or (), _first_pass(result), strict=True
        )
    ]


def _picture(image: np.ndarray, spec: InputSpec) -> str:
    return base64.b64encode(as_png(image, low=spec.low, high=spec.high)).decode()


TYPICAL_FIELDS = frozenset(("typical", "excess", "contrast"))  # absent where nobody asked the purifier
NEAR_FIELDS = frozenset(("near_duplicate",))  # absent where nobody looked at earlier images
CERTIFICATE_FIELDS = frozenset(("certified", "decided_by"))  # absent where nobody asked for a proof


def digests(images: np.ndarray) -> list[str]:
    """Return the SHA-256 of each of some images [n, *shape] float32."""
    return [hashlib.sha256(image.astype("<f4", copy=False).tobytes()).hexdigest() for image in images]


_LABEL_FIELDS = frozenset(RobustLabel.model_fields)


def first_pass_event(news: FirstSeen, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return a FirstPassEvent."""
    probabilities: list[float] = news.probabilities.tolist()
    label = probabilities.index(max(probabilities))
    return {"image": news.image, "label": label, "class_name": classes[label], "probabilities": probabilities}


def tally_event(news: Standing) -> dict[str, Any]:
    """Return a TallyEvent."""
    return {
        "image": news.image,
        "tally": news.tally,
        "votes": news.votes,
        "risk_reached": news.risk_reached,
        "needed": news.needed,
    }


def label_only(prediction: dict[str, Any]) -> dict[str, Any]:
    """Return what is left of a prediction where the evidence is withheld: a Label or a RobustLabel."""
    return {name: value for name, value in prediction.items() if name in _LABEL_FIELDS}


def _typical(result: Result, bounds: Typical | None) -> list[dict[str, Any]]:
    """Return what is said of each image beside what the purifier knows: nothing, where nobody asked."""
    if bounds is None or result.typicalities is None:
        return [{}] * len(result.probabilities)
    return [
        {
            "typical": bounds.admits(excess=found.excess, contrast=found.contrast),
            "excess": found.excess,
            "contrast": found.contrast,
        }
        for found in result.typicalities
    ]


def _near(result: Result) -> list[dict[str, Any]]:
    """Return what is said of each image beside its caller's earlier ones: nothing, where nobody looked."""
    if result.near_duplicates is None:
        return [{}] * len(result.probabilities)
    return [{"near_duplicate": near} for near in result.near_duplicates]


def _certified(result: Result) -> list[dict[str, Any]]:
    """Return what is said of each image's certificate: nothing, where nobody asked."""
    if result.certificates is None:
        return [{}] * len(result.probabilities)
    return [
        {"certified": None if found is None else {"eps": found.eps, "margin": found.margin}}
        for found in result.certificates
    ]


def _first_pass(result: Result) -> Iterator[tuple[int, list[float]]]:
    """Yield the label and the class probabilities of each image."""
    for probabilities in result.probabilities.tolist():
        # not numpy's argmax: it lets go of the interpreter, and the engine's thread then keeps it for a while
        yield probabilities.index(max(probabilities)), probabilities


def fast_timings(times: Times, *, decode: float, total: float) -> dict[str, float]:
    """Return FastTimings of durations in seconds."""
    return {
        "decode_ms": _ms(decode),
        "queue_ms": _ms(times.started - times.submitted),
        "first_pass_ms": _ms(times.first_pass_done - times.started),
        "total_ms": _ms(total),
    }


def robust_timings(times: Times, *, decode: float, total: float) -> dict[str, float]:
    """Return RobustTimings of durations in seconds."""
    return {**fast_timings(times, decode=decode, total=total), "vote_ms": _ms(times.finished - times.first_pass_done)}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
