"""/classify/stream: a fast answer to every frame at once, and the robust one to those that a policy chooses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from carso.api import answers, frames, openapi
from carso.api.classification import Classification, Classified
from carso.api.frames import End, Frame, Id
from carso.api.intake import Intake
from carso.board.whole import Whole
from carso.bundle import InputSpec
from carso.choices import Evidence, PathName
from carso.errors import ClientGone, EngineFailed, InternalError, InvalidParameter, NotReady, Overloaded, RequestError
from carso.http.exchange import Exchange
from carso.http.lines import BodyLines, Lines, gone
from carso.http.messages import MessageLines
from carso.http.refusals import as_request_error
from carso.images import json_values
from carso.inference.jobs import Certificate
from carso.inference.thinning import Choice, Policy, Thinning
from carso.options import RobustOptions, StreamOptions, parse
from carso.telemetry.metrics import Metrics
from carso.telemetry.probes import Lifecycle

log = logging.getLogger(__name__)

PATH = "/classify/stream"
_COUNT = {"samples", "risk", "deadline_ms", "certify", "certify_eps"}  # options of a count
BUSY = 1.0  # seconds of work that the robust path owes, from which on a stream takes it for busy
HEARTBEAT = 15.0  # seconds of silence after which an empty line is sent: proxies close what is silent for 60
_ENDS: dict[End, str] = {
    "complete": "there are no more frames",
    "stopping": "the service is stopping: send the frames that have no answer over another stream",
    "idle": "no frame came for too long: open another stream when there is one",
    "failed": "the engine takes no more work: send the frames that have no answer over another stream, to another "
    "replica if any",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What one stream, and all of them, may hold."""

    streams: int  # open at once
    in_flight: int  # counted frames of one stream that have no robust answer yet
    longest_line: int  # bytes
    idle: float  # seconds without a line, or without one being taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """What all streams of a service have in common."""

    classification: Classification
    intake: Intake
    metrics: Metrics
    lifecycle: Lifecycle
    wait: Callable[[], float]  # seconds of work that the robust path owes
    spec: InputSpec
    served: dict[str, object]  # bundle, provider and precision, as of frames.StreamStart
    evidence: Evidence
    tells_typical: bool  # whether the fast path says if an image is typical
    bounds: Bounds
    whole: Whole


class Streams:
    """The endpoint, and how many streams are open."""

    def __init__(self, answering: Answering, options: type[StreamOptions]) -> None:
        """`options` holds this service's defaults and limits."""
        self._answering = answering
        self._options = options
        self._open = answering.whole.part("streams")
        answering.metrics.watch_streams(self._open)

    def add_to(self, app: FastAPI) -> None:
        """Add the endpoint and its documentation to an application."""
        openapi.add_stream(
            app, PATH, self.stream, options=self._options, spec=self._answering.spec, lines=frames.schema()
        )
        app.router.routes.append(WebSocketRoute(PATH, self.talk))

    async def stream(self, request: Request) -> Response:
        """Answer with a stream. Raises the errors of its options, CannotCertify, NotReady, and Overloaded."""
        asked = self._asked(request.scope["query_string"])
        return _Streamed(partial(self._run, *asked), longest=self._answering.bounds.longest_line)

    async def talk(self, websocket: WebSocket) -> None:
        """Answer with a stream over a WebSocket. Raises what `stream` does, before the handshake is answered."""
        asked = self._asked(websocket.scope["query_string"])
        await self._run(*asked, Exchange.of(websocket.scope), MessageLines(websocket))

    def _asked(self, query: bytes) -> tuple[StreamOptions, Policy]:
        options = parse(self._options, query, {})
        policy = self._policy(options)
        self._answering.classification.certify(options)
        if self._answering.lifecycle.draining:
            raise NotReady("the service is stopping: open this stream again, at another replica if any")
        return options.model_copy(update={"max_rate": policy.max_rate}), policy

    async def _run(self, options: StreamOptions, policy: Policy, exchange: Exchange, lines: Lines) -> None:
        """Answer the frames on `lines` until they end. Raises Overloaded before anything is answered."""
        self._open_one_more()
        try:
            async with lines:
                await Stream(self._answering, options, Thinning(policy), exchange, lines).run()
        except* ClientGone:
            exchange.error = ClientGone.name
            self._answering.metrics.cancellation("client_gone")
        finally:
            self._open.mine -= 1

    def _open_one_more(self) -> None:
        with self._answering.whole.exclusive():
            if (found := int(sum(self._open.each()))) >= (most := self._answering.bounds.streams):
                raise Overloaded(
                    f"{found} streams are open, and at most {most} are allowed: end one, or open this one at another "
                    "replica"
                )
            self._open.mine += 1

    def _policy(self, options: StreamOptions) -> Policy:
        if options.untypical and not self._answering.tells_typical:
            raise InvalidParameter(
                "untypical: True is not allowed here, where the fast path does not look at it: leave it out, or ask "
                "the operator for CARSO_TYPICAL=all and a bundle that can tell"
            )
        if options.uncertified and options.certify == "off":
            raise InvalidParameter(
                "uncertified: True is not allowed with certify=off, which proves nothing: give certify=report too"
            )
        most = options.max_rate
        if most is None:
            most = options.rate if options.budget is None else 1.0
        if most < options.rate:
            raise InvalidParameter(f"max_rate: {most:g} is not allowed; it must be at least the rate, {options.rate:g}")
        return Policy(
            rate=options.rate,
            max_rate=most,
            margin=options.margin,
            untypical=options.untypical,
            uncertified=options.uncertified,
            budget=options.budget,
        )


class _Streamed(Response):
    """The response that reads its request on."""

    def __init__(self, run: Callable[[Exchange, Lines], Any], *, longest: int) -> None:
        super().__init__()
        self._run = run
        self._longest = longest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(Exchange.of(scope), BodyLines(scope, receive, send, longest=self._longest))


class Stream:
    """One stream. The fast answers are given one by one, in order, and robust ones are awaited beside them."""

    def __init__(
        self, answering: Answering, options: StreamOptions, thinning: Thinning, exchange: Exchange, lines: Lines
    ) -> None:
        """`exchange`: of the whole stream."""
        self._answering = answering
        self._options = options
        self._thinning = thinning
        self._exchange = exchange
        self._lines = lines
        self._bounds = answering.bounds
        self._max_values = json_values.limit(answering.spec.shape)
        self._tells = answering.evidence == "full"
        self._slots = asyncio.Semaphore(answering.bounds.in_flight)
        self._frames = 0
        self._counted = 0
        self._failed = False  # the engine takes no more work

    async def run(self) -> None:
        """Answer until the frames end, and say why they did. Raises ClientGone, alone or in a group."""
        await self._write(
            {
                "stream": self._exchange.request_id,
                **self._answering.served,
                "options": self._options.model_dump(),
                "in_flight": self._bounds.in_flight,
                "longest_line": self._bounds.longest_line,
                "idle_s": self._bounds.idle,
            }
        )
        stopping = asyncio.create_task(self._stop_with_the_service())
        try:
            async with asyncio.TaskGroup() as counts:
                end = await self._answer_all(counts)
        finally:
            stopping.cancel()
        if self._failed:
            end = "stopping" if self._answering.lifecycle.draining else "failed"
        self._exchange.images = self._frames
        await self._write(
            {
                "end": end,
                "message": _ENDS[end],
                "frames": self._frames,
                "counted": self._counted,
                "request_id": self._exchange.request_id,
            }
        )
        await self._lines.linger()

    async def _stop_with_the_service(self) -> None:
        await self._answering.lifecycle.stopping.wait()
        self._lines.stop()

    async def _answer_all(self, counts: asyncio.TaskGroup) -> End:
        """Give every frame its fast answer, and begin the counts of those that are chosen; return why there are no more
        frames.
        """
        while True:
            number = self._frames
            try:
                line = await self._next()
            except TimeoutError:
                return "idle"
            except RequestError as e:  # a line that is too long
                self._frames += 1
                await self._refuse(e, None, number, "fast")
                continue
            if line is None:
                return "stopping" if self._answering.lifecycle.draining else "complete"
            if line.strip():
                self._frames += 1
                await self._answer(line, number, counts)

    async def _next(self) -> bytes | None:
        """Return the next line, and send empty ones meanwhile. Raises TimeoutError if none comes for too long."""
        now = asyncio.get_running_loop().time
        over = now() + self._bounds.idle
        while True:
            try:
                async with asyncio.timeout_at(min(over, now() + HEARTBEAT)):
                    return await self._lines.read()
            except TimeoutError:
                if now() >= over:
                    raise
                await self._write(None)

    async def _answer(self, line: bytes, number: int, counts: asyncio.TaskGroup) -> None:
        """Give one frame its fast answer, and begin its count if it is chosen."""
        request = self._request()
        began = time.monotonic()
        frame_id: Id | None = None
        try:
            self._answering.classification.check("fast")
            read = partial(frames.parse, line, number, max_values=self._max_values)
            frame = await self._answering.intake.parse(read, size=len(line), receive=_silent)
            frame_id = frame.id
            if frame.fault is not None:
                raise frame.fault
            images = await self._answering.intake.read([frame.source], self._options, size=len(line), receive=_silent)
            decode = time.monotonic() - began
            classified = await self._answering.classification.fast(
                request, images, self._options, decode=decode, shadowed=False
            )
        except Exception as e:
            await self._refuse(e, frame_id, number, "fast")
            return
        finally:
            self._account(request)
        choice = self._choose(classified)
        answer: dict[str, Any] = {"id": frame.id, "path": "fast", "counted": choice.counted}
        await self._write(answer | self._told(classified, choice))
        self._answering.metrics.frame("fast", choice)
        if choice.counted:
            await self._slots.acquire()
            proven = classified.result.certificates
            counts.create_task(self._count(request, frame, number, images, choice, decode=decode, proven=proven))

    def _choose(self, classified: Classified) -> Choice:
        *_, second, first = sorted(classified.result.probabilities[0].tolist())
        return self._thinning.choose(
            margin=first - second,
            typical=classified.predictions[0].get("typical"),
            certified=self._certified(classified),
            load=min(1.0, self._answering.wait() / BUSY),
        )

    def _certified(self, classified: Classified) -> bool | None:
        """Tell whether a frame is proven at the eps of the stream, or a larger one; None: nobody asked."""
        if classified.result.certificates is None:
            return None
        (found,) = classified.result.certificates
        return found is not None and found.eps >= self._options.certify_eps

    async def _count(
        self,
        request: Request,
        frame: Frame,
        number: int,
        images: np.ndarray,
        choice: Choice,
        *,
        decode: float,
        proven: tuple[Certificate | None, ...] | None,
    ) -> None:
        """Give one frame its robust answer, which holds a slot until it is sent. `proven`: by its fast answer."""
        options = RobustOptions.model_construct(**self._options.model_dump(include=_COUNT), seed=None)
        if frame.deadline_ms is not None:
            options = options.model_copy(update={"deadline_ms": frame.deadline_ms})
        votes = 0
        try:
            classified = await self._answering.classification.robust(
                request, images, options, decode=decode, sampled=choice.drawn, proven=proven
            )
            votes = classified.result.outcomes[0].votes
            self._counted += 1
            answer: dict[str, Any] = {"id": frame.id, "path": "robust"} | self._told(classified, choice)
            if self._tells:
                made_of = partial(answers.digests, images)
                (answer["image"],) = await self._answering.intake.parse(made_of, size=images.nbytes, receive=_silent)
            await self._write(answer)
            self._answering.metrics.frame("robust", choice)
        except Exception as e:
            await self._refuse(e, frame.id, number, "robust")
        finally:
            self._thinning.settle(choice, votes=votes)
            self._account(request)
            self._slots.release()

    def _told(self, classified: Classified, choice: Choice) -> dict[str, Any]:
        """Return what a line says of a frame's answer: with the evidence, also what chose the frame."""
        (prediction,) = classified.predictions
        content: dict[str, Any] = {"prediction": prediction}
        if self._tells:
            content |= {"chosen": choice.why, "timings": classified.timings}
        return content

    def _request(self) -> Request:
        """Make the request that a frame is to those who classify it: of the stream's caller, arriving now."""
        whole = self._exchange
        exchange = Exchange(request_id=whole.request_id, caller=whole.caller, host=whole.host)
        scope: dict[str, Any] = {"type": "http", "headers": []}
        exchange.attach(scope)
        return Request(scope, _silent)

    def _account(self, request: Request) -> None:
        """Count the work that a frame was charged for."""
        exchange = Exchange.of(request.scope)
        if exchange.caller is not None:
            self._answering.metrics.caller_rows(exchange.caller.name, exchange.rows)
        exchange.rows = 0

    async def _refuse(self, error: Exception, frame_id: Id | None, number: int, path: PathName) -> None:
        """Answer a frame with an error. Raises ClientGone, if that is it."""
        shown = as_request_error(error)
        if isinstance(shown, ClientGone):
            raise shown
        if isinstance(shown, InternalError):
            log.exception("frame failed", extra={"fields": {"request_id": self._exchange.request_id, "line": number}})
        if isinstance(shown, NotReady | EngineFailed):
            self._failed = True
            self._lines.stop()
        self._answering.metrics.refusal(shown.name)
        content = {"id": frame_id, "line": number, "path": path, "error": shown.name, "message": str(shown)}
        if isinstance(shown, Overloaded):
            content["retry_after"] = shown.retry_after
        await self._write(content)
        self._answering.metrics.frame("error", None)

    async def _write(self, content: dict[str, Any] | None) -> None:
        """Send a line; None: an empty one. Raises ClientGone if the client does not take it for too long."""
        line = b"" if content is None else to_json(content)
        try:
            async with asyncio.timeout(self._bounds.idle):
                await self._lines.write(line)
        except TimeoutError:
            await gone(self._lines)


async def _silent() -> Message:
    """Receive nothing, ever: whoever classifies a frame need not listen for the client, which the stream does."""
    await asyncio.get_running_loop().create_future()
    return {}
