"""What calls return. Fields that this version does not know are kept, as attributes too, not refused.

A service may withhold its evidence (CARSO_EVIDENCE=label). A prediction then has only `label`, `class_name` and
`typical`, on the robust path also `complete`, and a result has no timings. What is missing is None.

    result = client.classify(["a.png", "b.png"])
    for prediction in result.predictions:
        print(prediction.class_name, prediction.agree)
    print(result.request_id, result.model_dump_json())
"""

from __future__ import annotations

from typing import Any

from pydantic import Base64Bytes, BaseModel, ConfigDict


class Value(BaseModel):
    """A part of an answer. It cannot be changed, and keeps the fields that a later service may add."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)  # each is built when it is first used


class BundleName(Value):
    """Which bundle answered."""

    name: str
    version: str
    checksum: str  # SHA-256 of the bundle's manifest


class Certified(Value):
    """What is proven: every image within `eps` of the one sent gets the same label from the first pass."""

    eps: float  # no value of the image differs by more, in units of its values
    margin: float  # by how much the label's score stays above all others, at least


class FastPrediction(Value):
    """What the fast path says of one image."""

    label: int
    class_name: str
    typical: bool | None = None  # False: not like the images that the bundle knows, so the label means little
    excess: float | None = None  # the figures that tell; see docs/typical.md
    contrast: float | None = None
    near_duplicate: bool | None = None  # whether it is nearly one that you sent before; None: the service does not look
    certified: Certified | None = None  # None: nothing is proven, or `certify` is off
    probabilities: tuple[float, ...] | None = None  # of each class, in order


class ExplainedVote(Value):
    """One of the first votes."""

    label: int
    class_name: str
    image: Base64Bytes  # PNG: the purified image that it was cast on


class ExplainedFirstPass(Value):
    """What the fast path says of the same image."""

    label: int
    class_name: str
    probabilities: tuple[float, ...]  # of each class, in order


class Explanation(Value):
    """What the votes of one image were cast on. Pictures are PNG files."""

    input: Base64Bytes  # the image as the service read it
    purified: Base64Bytes  # the version with which `typical` compares it
    distance: float  # the mean of |image - purified|
    mean: Base64Bytes  # of the purified images of the first votes
    averaged: int  # how many it is the mean of
    votes: tuple[ExplainedVote, ...]  # the first ones
    first_pass: ExplainedFirstPass


class RobustPrediction(Value):
    """What the robust path says of one image, and how the vote came out."""

    label: int  # the class with most votes
    class_name: str
    complete: bool  # False if the deadline ended the count
    typical: bool | None = None  # False: not like the images that the bundle knows, so the label means little
    excess: float | None = None  # the figures that tell; see docs/typical.md
    contrast: float | None = None
    near_duplicate: bool | None = None  # whether it is nearly one that you sent before; None: the service does not look
    certified: Certified | None = None  # of `fast_label`; None: nothing is proven, or `certify` is off
    decided_by: str | None = None  # certificate: `label` is proven, and no vote was cast; vote; None: `certify` is off
    share: float | None = None  # of `label` among the votes cast, from 0 to 1
    tally: tuple[int, ...] | None = None  # votes of each class, in order
    votes: int | None = None  # cast
    samples: int | None = None  # votes asked for
    rule: str | None = None  # what ended the count: exact, risk-limited, deadline; certificate: there was none
    risk: float | None = None  # asked for
    risk_reached: float | None = None  # the bound that this tally gives
    seed: int | None = None  # of this image's latents
    fast_label: int | None = None  # what the fast path says
    agree: bool | None = None  # whether both paths say the same; if not, the image may have been manipulated
    explanation: Explanation | None = None  # with explain=True


class Timings(Value):
    """How long a request took, in milliseconds, as the service measured it."""

    decode_ms: float
    queue_ms: float
    first_pass_ms: float
    total_ms: float
    vote_ms: float | None = None  # of the robust path


class _Result(Value):
    bundle: BundleName
    provider: str  # ONNX Runtime's execution provider
    request_id: str
    timings: Timings | None = None


class FastResult(_Result):
    """The answer of `classify_fast`."""

    predictions: tuple[FastPrediction, ...]  # one per image, in the order sent


class RobustResult(_Result):
    """The answer of `classify`."""

    predictions: tuple[RobustPrediction, ...]  # one per image, in the order sent
    # what `carso verify` counts again with
    images: tuple[str, ...] | None = None  # SHA-256 of each image as the service read it
    options: dict[str, Any] | None = None  # of the request, those that were not given included
    precision: str | None = None  # of the votes


class FirstPass(ExplainedFirstPass):
    """An event of `votes`: what the fast path says of one image."""

    image: int  # its index in the call


class Tally(Value):
    """An event of `votes`: the votes of one image after a round."""

    image: int  # its index in the call
    tally: tuple[int, ...]  # votes of each class, in order
    votes: int  # cast
    risk_reached: float  # the bound that this tally gives
    needed: int  # the fewest further votes that end the count, if all go to the leader; 0: it has ended


class StreamStart(Value):
    """The first line of a stream: what answers, and within which bounds."""

    stream: str  # the id of the request
    bundle: BundleName
    provider: str
    precision: str
    options: dict[str, Any]  # of the stream, those that were not given included
    in_flight: int  # counted frames without their robust answer, at which the service reads no further
    longest_line: int  # bytes
    idle_s: float  # seconds without a frame after which the service ends the stream


class FastFrame(Value):
    """What the fast path says of a frame."""

    id: str | int
    counted: bool  # whether a RobustFrame or a FrameError follows
    prediction: FastPrediction
    chosen: tuple[str, ...] | None = None  # what chose it: rate, load, budget, margin, untypical, uncertified
    timings: Timings | None = None


class RobustFrame(Value):
    """What the robust path says of a frame."""

    id: str | int
    prediction: RobustPrediction
    chosen: tuple[str, ...] | None = None
    image: str | None = None  # SHA-256 of the image as the service read it
    timings: Timings | None = None


class FrameError(Value):
    """In the place of an answer; the stream goes on."""

    id: str | int | None = None
    line: int  # the number of the frame
    path: str  # which answer it does not get: fast or robust
    error: str  # the service's name for what is wrong
    message: str
    retry_after: float | None = None  # seconds


class StreamEnd(Value):
    """The last line of a stream."""

    end: str  # complete, stopping, idle or failed
    message: str
    frames: int
    counted: int
    request_id: str


class InputSpec(Value):
    """What an image has to be."""

    shape: tuple[int, int, int]  # channels, height, width
    low: float  # the range of floating-point values
    high: float
    background: float = 0  # the value round the subject
    expects: str = ""  # for people: what the images show, and how


class Threat(Value):
    """What an attacker did."""

    attack: str  # "adaptive": all that an attacker could do who knows everything
    norm: str
    eps: float


class Cell(Value):
    """One measured accuracy."""

    defence: str  # "carso": the robust path; "classifier": the fast path
    threat: Threat
    correct: int
    images: int


class BundleInfo(BundleName):
    """What is served."""

    dataset: str
    classes: tuple[str, ...]
    input: InputSpec
    samples: int  # votes counted by default
    table: tuple[Cell, ...] = ()  # measured accuracies, those under adaptive attack first


class DeviceInfo(Value):
    """What it is served on."""

    asked: str
    provider: str
    precision: str  # of the votes
    precision_asked: str | None = None  # "auto": the service chose
    precision_because: str | None = None  # why they have it


class Limits(Value):
    """What the service takes in one request."""

    max_samples: int
    max_images: int
    max_body_bytes: int
    max_pixels: int
    allow_seed: bool
    evidence: str  # full or label
    typical: str | None = None  # the paths that say whether an image is typical: robust, all or off
    untypical: str | None = None  # what happens to an image that is not: mark or refuse
    duplicates: str | None = None  # what happens to one that is nearly an earlier one of yours: off, mark or refuse
    certify: str | None = None  # what is proven where a call does not say
    certify_eps: float | None = None  # and at which eps


class Info(Value):
    """The answer of `info`."""

    version: str  # of the service
    bundle: BundleInfo
    device: DeviceInfo
    limits: Limits
    workers: int | None = None  # processes that share the limits
    risk: float  # used where a call gives none
    certifies: bool | None = None  # whether certificates can be given here
    certificate: str | None = None  # what a certificate proves here, or why none can be given
    media_types: tuple[str, ...]


class Health(Value):
    """The answer of a probe."""

    status: str
