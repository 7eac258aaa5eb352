"""The frames of a stream: how one is written on a line, and what the lines of the answer are.

A line of the request is a Frame. The answer begins with a StreamStart. It has a FastFrame for each frame in the order
sent, a RobustFrame for each that is counted, as soon as it is, and a FrameError for each that cannot be answered. It
ends with a StreamEnd. An empty line is no frame: it shows that the other side is still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from carso.api.answers import (
    BundleName,
    FastPrediction,
    FastTimings,
    Label,
    RobustLabel,
    RobustPrediction,
    RobustTimings,
)
from carso.choices import Precision
from carso.complaints import shown
from carso.errors import InvalidParameter, MalformedFrame, RequestError
from carso.images import base64_text, json_values
from carso.images.numbers import Source
from carso.inference.thinning import Reason
from carso.options import MAX_DEADLINE_MS

LONGEST_ID = 128  # characters: it is repeated in up to three lines
_MOST = 2**53 - 1  # the largest integer that every JSON reader keeps exact
_NAMES = frozenset(("id", "image", "deadline_ms"))

Id = str | int
End = Literal["complete", "stopping", "idle", "failed"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stream."""

    id: Id
    source: Source = None
    deadline_ms: int | None = None  # None: that of the stream
    fault: RequestError | None = None  # what is wrong with the rest of the line


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamStart(_Line):
    """The first line: what answers, and the bounds that it keeps."""

    stream: str = Field(description="The id of the request, as in the header X-Request-ID.")
    bundle: BundleName
    provider: str = Field(description="ONNX Runtime's execution provider in use.")
    precision: Precision = Field(description="Of the votes.")
    options: dict[str, Any] = Field(description="Every option of the stream, those that were not given included.")
    in_flight: int = Field(description="Counted frames without their robust answer, at which no more lines are read.")
    longest_line: int = Field(description="Bytes that a line may have.")
    idle_s: float = Field(description="Seconds without a line, or without taking one, after which the stream ends.")


class _OfFrame(_Line):
    id: Id = Field(description="As the frame gave it; otherwise the number of its line, from 0.")


class FastFrame(_OfFrame):
    """What the first pass says of a frame, at once."""

    path: Literal["fast"]
    counted: bool = Field(description="Whether the robust answer, or an error, follows.")
    chosen: list[Reason] | None = Field(
        default=None,
        description="What chose the frame, if anything did. If it is not counted nevertheless, the budget was spent. "
        "Absent where the evidence is withheld.",
    )
    prediction: FastPrediction | Label
    timings: FastTimings | None = None


class RobustFrame(_OfFrame):
    """What the vote says of a frame."""

    path: Literal["robust"]
    chosen: list[Reason] | None = Field(default=None, description="As in the frame's fast answer.")
    prediction: RobustPrediction | RobustLabel
    image: str | None = Field(default=None, description="SHA-256 of the image as it was read, as of /classify.")
    timings: RobustTimings | None = None


class FrameError(_Line):
    """In the place of an answer. The stream goes on."""

    id: Id | None = Field(description="Of the frame; null: the line does not tell.")
    line: int = Field(description="The number of the frame's line, from 0; empty lines are not counted.")
    path: Literal["fast", "robust"] = Field(description="Which of its answers the frame does not get.")
    error: str = Field(description="What is wrong, by name.")
    message: str = Field(description="What is wrong, with the value, and what to do.")
    retry_after: int | None = Field(default=None, description="Seconds after which the frame may be sent again.")


class StreamEnd(_Line):
    """The last line. Frames that were sent and have no answer by then were not looked at."""

    end: End = Field(
        description="complete: there are no more frames. stopping: the service does; go on with another stream. idle: "
        "no line came for too long. failed: the engine did."
    )
    message: str
    frames: int = Field(description="Lines that were read, malformed ones included.")
    counted: int = Field(description="Frames that got the robust answer.")
    request_id: str


Line = StreamStart | FastFrame | RobustFrame | FrameError | StreamEnd


def schema() -> dict[str, Any]:
    """Return the JSON schema of a line of the answer."""
    return TypeAdapter(Line).json_schema()


def parse(line: bytes, number: int, *, max_values: int) -> Frame:
    """Return the frame on a line, the number of which is its id unless it has one. No image is decoded yet.

    Raises MalformedFrame, and the errors of json_values.parse, for a line that does not tell an id. What else is wrong,
    MalformedFrame, InvalidParameter or UndecodableBase64, is the frame's fault.
    """
    content = json_values.parse(line, max_values=max_values)
    if not isinstance(content, dict):
        raise MalformedFrame(f'a frame is an object such as {{"id": 1, "image": ...}}, and this is {shown(content)}')
    frame_id = content.get("id", number)
    is_id = isinstance(frame_id, str) and len(frame_id) <= LONGEST_ID
    is_id |= isinstance(frame_id, int) and not isinstance(frame_id, bool) and abs(frame_id) <= _MOST
    if not is_id:
        raise MalformedFrame(
            f"id {shown(frame_id)} is neither an integer of at most 2^53 - 1 nor a string of at most {LONGEST_ID} "
            "characters"
        )
    try:
        return _frame(content, frame_id)
    except RequestError as e:
        return Frame(frame_id, fault=e)


def _frame(content: dict[str, Any], frame_id: Id) -> Frame:
    if unknown := content.keys() - _NAMES:
        raise MalformedFrame(
            f"{shown(min(unknown))} is not part of a frame, which has an image, and may have an id and a deadline_ms: "
            "options are given once, in the query"
        )
    if "image" not in content:
        raise MalformedFrame('the frame has no "image": give nested numbers, or base64 of an encoded image')
    deadline_ms = content.get("deadline_ms")
    if deadline_ms is not None and (type(deadline_ms) is not int or not 1 <= deadline_ms <= MAX_DEADLINE_MS):
        raise InvalidParameter(
            f"deadline_ms: {shown(deadline_ms)} is not allowed; it must be an integer from 1 to {MAX_DEADLINE_MS}"
        )
    image = content["image"]
    return Frame(frame_id, base64_text.decoded(image, 0) if isinstance(image, str) else image, deadline_ms)
