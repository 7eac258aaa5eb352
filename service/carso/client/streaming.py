"""A stream of frames, without the I/O: what is sent, what comes back, and how a request stays open for both.

Whoever sends and reads (carso.client.clients) writes the `chunk` of each frame, and gives what comes to `answers`.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import httpcore
from pydantic import TypeAdapter, ValidationError

from carso.client.errors import Unavailable, UnexpectedAnswer
from carso.client.images import Image, json_of
from carso.client.results import FastFrame, FrameError, RobustFrame, StreamEnd, StreamStart, Value

StreamAnswer: TypeAlias = FastFrame | RobustFrame | FrameError
T = TypeVar("T")
END_OF_BODY = b"0\r\n\r\n"


@dataclass(frozen=True)
class Frame:
    """An image of a stream, and what its answers are called."""

    image: Image | Any  # as for `classify`, but one: a path, bytes, an image of Pillow's, or an array
    id: str | int | None = None  # None: its number, from 0
    deadline: float | None = None  # seconds from its arrival at the service; None: that of the stream


async def withheld() -> AsyncIterator[bytes]:
    """Make the body of a request whose head is sent at once, and whose body is written later, beside the answer.

    httpx reads no answer before the body was sent. But if the body cannot be written, it goes on to the answer, because
    a service may refuse a request before it has read it. So this body says so at once.
    """
    raise httpcore.WriteError
    yield b""


class Conversation:
    """What goes over one stream."""

    def __init__(self, url: str, request_id: str) -> None:
        self._url = url
        self._request_id = request_id
        self._frames = 0
        self._rest = b""
        self.start: StreamStart | None = None
        self.end: StreamEnd | None = None

    def chunk(self, frame: Frame | Image | Any) -> bytes:
        """Write a frame, as a chunk of the request's body. Raises OSError, TypeError, ValueError for what is none."""
        given = frame if isinstance(frame, Frame) else Frame(frame)
        content: dict[str, Any] = {
            "id": self._frames if given.id is None else given.id,
            "image": json_of(given.image),
        }
        if given.deadline is not None:
            content["deadline_ms"] = max(1, int(1e3 * given.deadline))
        self._frames += 1
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        return b"%x\r\n%s\r\n" % (len(line), line)

    def answers(self, data: bytes) -> Iterator[StreamAnswer]:
        """Yield the answers that `data`, the next bytes of the answer, completes. Raises UnexpectedAnswer."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in filter(None, lines):
            match answer := self._read(line):
                case StreamStart():
                    self.start = answer
                case StreamEnd():
                    self.end = answer
                case FastFrame() | RobustFrame() | FrameError():
                    yield answer

    def over(self, reason: str = "it has no end") -> None:
        """Look at the end, after all that came. Raises Unavailable if not all frames can have been answered.

        `reason`: why no more came.
        """
        if self.end is None:
            raise Unavailable(f"the stream from {self._url} was cut off: {reason}", request_id=self._request_id)
        if self.end.end != "complete":
            raise Unavailable(self.end.message, request_id=self.end.request_id, error=self.end.end)

    def _read(self, line: bytes) -> Value:
        try:
            content = json.loads(line)
            kind = next(kind for name, kind in _KINDS if name in content)
            if kind is FastFrame and content["path"] == "robust":
                kind = RobustFrame
            return TypeAdapter(kind).validate_python(content)
        except (ValueError, ValidationError, StopIteration, KeyError, TypeError) as e:
            raise UnexpectedAnswer(
                f"{self._url} does not answer as a CARSO service does ({e}): is the URL right?",
                request_id=self._request_id,
            ) from None


# by what only lines of this kind have, in the order in which to look
_KINDS: tuple[tuple[str, type[Value]], ...] = (
    ("stream", StreamStart),
    ("end", StreamEnd),
    ("error", FrameError),
    ("path", FastFrame),
)


async def asynchronous(frames: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    """Yield what an iterable of either kind does."""
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame


async def from_thread(frames: Iterable[T]) -> AsyncIterator[T]:
    """Yield what an iterable does that may block, taken in a thread, one at a time. Raises what it raises."""
    loop = asyncio.get_running_loop()
    taken: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()
    room = threading.Semaphore(1)
    left = threading.Event()  # nobody wants more

    def hand_over(item: tuple[T] | Exception | None) -> None:
        room.acquire()
        if not left.is_set():
            loop.call_soon_threadsafe(taken.put_nowait, item)

    def take() -> None:
        try:
            for frame in frames:
                hand_over((frame,))
                if left.is_set():
                    return
            hand_over(None)
        except Exception as e:
            hand_over(e)

    threading.Thread(target=take, name="carso-stream", daemon=True).start()
    try:
        while (item := await taken.get()) is not None:
            room.release()
            if isinstance(item, Exception):
                raise item
            yield item[0]
    finally:
        left.set()
        room.release()


def in_turns(talk: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
    """Yield what an asynchronous iterator does, on an event loop that runs while the caller waits for the next."""
    with asyncio.Runner() as runner:
        answers = talk()

        async def following() -> T | None:
            return await anext(answers, None)

        try:
            while (answer := runner.run(following())) is not None:
                yield answer
        finally:
            runner.run(_closed(answers))


async def _closed(answers: Any) -> None:
    await answers.aclose()
