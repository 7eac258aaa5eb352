"""Client and AsyncClient: the same calls. They differ in how they send and sleep, and in nothing else."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Self, TypedDict

import httpcore
import httpx
from socksio.exceptions import ProtocolError

from carso.choices import Certifying, Fit
from carso.client import DEFAULT_URL, events
from carso.client.call import Call, Patience, R
from carso.client.connections import route_to
from carso.client.errors import Unavailable
from carso.client.events import Event, Reader
from carso.client.images import Image, Images, body_of
from carso.client.results import FastResult, Health, Info, RobustResult, StreamStart
from carso.client.streaming import (
    END_OF_BODY,
    Conversation,
    Frame,
    StreamAnswer,
    asynchronous,
    from_thread,
    in_turns,
    withheld,
)
from carso.version import __version__

TIMEOUT = 60.0  # seconds
RETRIES = 3
CONNECTIONS = 100
NO_SOCKS = "the proxy does not speak SOCKS5"  # which httpx does not turn into an error of its own


class _HttpxOptions(TypedDict):
    base_url: str
    headers: dict[str, str]
    limits: httpx.Limits
    proxy: httpx.Proxy | None
    verify: ssl.SSLContext | bool
    trust_env: bool


class _Arguments(TypedDict):
    url: str
    api_key: str | None
    timeout: float
    retries: int


class _Calls:
    """What both clients share: where the service is, and the calls that they make."""

    _http: httpx.Client | httpx.AsyncClient

    def __init__(self, *, url: str | None, api_key: str | None, timeout: float, retries: int) -> None:
        self.url = checked_url(url or os.environ.get("CARSO_URL") or DEFAULT_URL)
        key = api_key or os.environ.get("CARSO_API_KEY")
        if key and not re.fullmatch(r"[!-~]+", key):  # checked here, because httpx's own error would show the key
            raise ValueError("the API key must hold printable ASCII characters only, and no spaces")
        self._made_with = _Arguments(url=self.url, api_key=key, timeout=timeout, retries=retries)
        self._headers = {"user-agent": f"carso/{__version__}"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._timeout, self._retries = timeout, retries
        self._route = route_to(httpx.URL(self.url))

    def _options_of_httpx(self, connections: int) -> _HttpxOptions:
        """What both of httpx's clients are made with. They look at the environment no more: the route did."""
        return {
            "base_url": self.url,
            "headers": self._headers,
            "limits": httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            "proxy": self._route.proxy,
            "verify": self._route.verify,
            "trust_env": False,
        }

    def _robust(
        self, images: Images, options: Mapping[str, object], deadline: float | None, *, accept: str = "*/*"
    ) -> Call[RobustResult]:
        return Call(
            self._http.build_request,
            "POST",
            "/classify",
            model=RobustResult,
            via=self._route.via,
            patience=Patience(timeout=self._timeout, retries=self._retries, deadline=deadline, tell=True),
            params=options,
            body=body_of(images),
            accept=accept,
        )

    def _votes(self, images: Images, options: Mapping[str, object], deadline: float | None) -> Call[RobustResult]:
        return self._robust(images, options, deadline, accept=events.MEDIA_TYPE)

    def _fast(self, images: Images, options: Mapping[str, object], deadline: float | None) -> Call[FastResult]:
        return Call(
            self._http.build_request,
            "POST",
            "/classify/fast",
            model=FastResult,
            via=self._route.via,
            patience=Patience(timeout=self._timeout, retries=self._retries, deadline=deadline),
            params=options,
            body=body_of(images),
        )

    def _stream(self, options: Mapping[str, object], deadline: float | None) -> Call[StreamStart]:
        """Open a stream; its body is written beside the answer."""
        return Call(
            lambda method, path, **request: self._http.build_request(method, path, **request | {"content": withheld()}),
            "POST",
            "/classify/stream",
            model=StreamStart,
            via=self._route.via,
            patience=Patience(timeout=self._timeout, retries=self._retries),
            params={**options, "deadline_ms": None if deadline is None else max(1, int(1e3 * deadline))},
        )

    def _info(self) -> Call[Info]:
        patience = Patience(timeout=self._timeout, retries=self._retries)
        return Call(self._http.build_request, "GET", "/info", model=Info, patience=patience, via=self._route.via)

    def _probe(self, path: str) -> Call[Health]:
        """Ask once: whoever probes asks about this moment."""
        patience = Patience(timeout=self._timeout, retries=0)
        return Call(self._http.build_request, "GET", path, model=Health, patience=patience, via=self._route.via)


class Client(_Calls):
    """A client for threads: many may share one. Close it, or use it as a context manager.

    with Client("http://127.0.0.1:8000") as client:
        for prediction in client.classify(["a.png", "b.png"]).predictions:
            print(prediction.class_name, prediction.votes, prediction.agree)
    """

    _http: httpx.Client

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        connections: int = CONNECTIONS,
    ) -> None:
        """Set up the connections; none is opened yet.

        `url`: the service's, which may have a path; default: the variable CARSO_URL, else http://127.0.0.1:8000.
        `api_key`: default: the variable CARSO_API_KEY, else none. `timeout`: seconds that each wait for the service may
        take. `retries`: how often one call is sent again, at most. `connections`: how many are open at once, at most.
        Raises ValueError for a URL or key that cannot be one, and UnusableVariable for a proxy or a file of
        certificates that the environment names and that cannot be used.

            client = Client("https://vision.example", api_key="...", timeout=10, retries=5)
        """
        super().__init__(url=url, api_key=api_key, timeout=timeout, retries=retries)
        self._http = httpx.Client(**self._options_of_httpx(connections))

    def classify(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        explain: bool = False,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
        deadline: float | None = None,
    ) -> RobustResult:
        """Classify images on the robust path: both passes, and a vote.

            result = client.classify("digit.png", risk=1e-3, deadline=2)
            (prediction,) = result.predictions
            print(prediction.class_name, f"{prediction.share:.0%} of {prediction.votes} votes")

        `images`: a path, an encoded image as bytes, a sequence of these, or a NumPy array: [H, W], [C, H, W],
        [N, H, W] (one channel) or [N, C, H, W], as uint8, or as floating point in the bundle's value range (see
        `info`). `samples`: votes to count per image, at most. `risk`: the chance, per image, that early stopping elects
        another class than the full count would; 0 counts until the outcome is certain. `seed`: of the latents, from 0
        to 2^53 - 1; the same request with the same seed gets the same votes. `resize`: scale encoded images of another
        height and width, instead of having them refused; arrays are never scaled. `fit`: "pad" keeps their
        proportions, "stretch" does not. `invert`: turn every value round, as for dark ink on white paper.
        `background`: what transparent pixels show: "white", "black", or a colour as "RRGGBB". `explain`: show what the
        votes were cast on, for at most 8 images. `certify`: "report" has every prediction say whether all images within
        `certify_eps` get the same label from the first pass, as `certified`; "decide" also takes a proven label as the
        answer, without a vote; "max" finds the largest eps; "off" asks for no proof. A proven label may still be wrong.
        `deadline`: seconds for everything, retries included; the service is told what is left of it, and answers by
        then with the votes cast so far (`complete` is False). What is None is the service's default.

        Returns one prediction per image, in the order sent. Raises RequestRefused, Unavailable, DeadlineExceeded,
        UnexpectedAnswer; OSError for a file that cannot be read; TypeError and ValueError for what cannot be sent.
        """
        options = _options(
            samples=samples,
            risk=risk,
            seed=seed,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            explain=explain,
            certify=certify,
            certify_eps=certify_eps,
        )
        return self._run(self._robust(images, options, deadline))

    def votes(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        explain: bool = False,
        deadline: float | None = None,
    ) -> Generator[Event]:
        """Classify images on the robust path, and show their votes as they come. Arguments and errors are those of
        `classify`.

            for event in client.votes("digit.png", risk=0):
                match event:
                    case Tally():
                        print(event.votes, event.tally, event.needed)
                    case RobustResult():
                        print(event.predictions[0].class_name)

        Yields a FirstPass for each image, a Tally for each image after each round, and last the RobustResult. A caller
        who is slow gets the newest tallies only. To leave early, close the generator (`contextlib.closing`): the client
        then hangs up, and the service stops its count. Nothing is sent again once events have come.
        """
        options = _options(
            samples=samples,
            risk=risk,
            seed=seed,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            explain=explain,
        )
        call = self._votes(images, options, deadline)
        with closing(self._opened(call)) as response:
            yield from self._events(call, response)

    def _events(self, call: Call[RobustResult], response: httpx.Response) -> Generator[Event]:
        call.check_streams(response)
        reader = Reader()
        try:
            for line in response.iter_lines():
                if event := call.read(reader, line, response):
                    yield event
                    if isinstance(event, RobustResult):
                        return
        except httpx.RequestError as e:
            raise call.cut_off(e, response) from e
        raise call.cut_off(None, response)

    def classify_fast(
        self,
        images: Images,
        *,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
        deadline: float | None = None,
    ) -> FastResult:
        """Classify images on the fast path: the classifier alone. Arguments and errors are those of `classify`.

        (prediction,) = client.classify_fast(png_bytes).predictions
        print(prediction.class_name, prediction.probabilities[prediction.label])
        """
        options = _options(
            resize=resize, fit=fit, invert=invert, background=background, certify=certify, certify_eps=certify_eps
        )
        return self._run(self._fast(images, options, deadline))

    def stream(
        self,
        frames: Iterable[Frame | Image | Any],
        *,
        rate: float | None = None,
        max_rate: float | None = None,
        margin: float | None = None,
        untypical: bool = False,
        uncertified: bool = False,
        budget: float | None = None,
        samples: int | None = None,
        risk: float | None = None,
        deadline: float | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
    ) -> Iterator[StreamAnswer]:
        """Send frames for as long as there are any, and yield their answers as they come.

            for answer in client.stream(camera_frames(), rate=0.1, margin=0.3):
                match answer:
                    case FastFrame(id=frame, prediction=seen):
                        print(frame, "looks like", seen.class_name)
                    case RobustFrame(id=frame, prediction=voted) if not voted.agree:
                        print(frame, "may have been manipulated")

        `frames`: each one image as for `classify`, or a `Frame`, which has an id too; otherwise answers have the
        frame's number, from 0. They are taken in a thread of their own, as fast as the service takes them. Every frame
        gets a FastFrame, in the order sent. Those that the service counts get a RobustFrame too, and what cannot be
        answered a FrameError in its place. `rate`, `max_rate`, `margin`, `untypical`, `uncertified`, `budget`: which
        frames are counted; see docs/streams.md. `deadline`: seconds from the arrival of each frame. What is None is the
        service's default, and the others are as for `classify`.

        Raises what `classify` does before the stream begins. After that, nothing is sent again: Unavailable says that
        the stream was cut off, or ended by the service (its `error` is then "stopping", "idle" or "failed"); send the
        frames that were not answered over another stream. What `frames` itself raises is raised here.
        """
        options = _policy(
            rate=rate, max_rate=max_rate, margin=margin, untypical=untypical, uncertified=uncertified, budget=budget
        )
        options |= _options(
            samples=samples,
            risk=risk,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            certify=certify,
            certify_eps=certify_eps,
        )

        async def talk() -> AsyncIterator[StreamAnswer]:
            async with AsyncClient(**self._made_with) as client:
                async for answer in client._talk(from_thread(frames), options, deadline):
                    yield answer

        return in_turns(talk)

    def info(self) -> Info:
        """Ask what is served, with which limits, on which device. Errors are those of `classify`.

        info = client.info()
        print(info.bundle.classes, info.bundle.input.shape, info.limits.max_images)
        """
        return self._run(self._info())

    def ready(self) -> bool:
        """Ask, once, whether the service takes requests. False if it says no or does not answer.

        Raises RequestRefused and UnexpectedAnswer.

            while not client.ready():
                time.sleep(1)
        """
        return self._says_yes("/readyz")

    def live(self) -> bool:
        """Ask, once, whether the service's process should go on. Answers and errors are those of `ready`.

        if not client.live():
            restart_the_service()
        """
        return self._says_yes("/livez")

    def _says_yes(self, path: str) -> bool:
        try:
            self._run(self._probe(path))
        except Unavailable:
            return False
        return True

    def _run(self, call: Call[R]) -> R:
        while True:
            verdict = call.judge(self._attempt(call))
            if not isinstance(verdict, float):
                return verdict
            time.sleep(verdict)

    def _opened(self, call: Call[R]) -> httpx.Response:
        """Send a call until there is a 2xx, and return that; its body is not read yet."""
        while True:
            outcome = self._attempt(call, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            verdict = call.judge(outcome)
            if isinstance(verdict, float):
                time.sleep(verdict)

    def _attempt(self, call: Call[R], *, stream: bool = False) -> httpx.Response | httpx.RequestError:
        """Send a call once; return its answer, or why there is none. `stream`: the body of a 2xx is not read yet."""
        request = call.request()
        try:
            response = self._http.send(request, stream=stream)
            if not response.is_success:
                response.read()
        except httpx.RequestError as e:
            return e
        except ProtocolError:
            return httpx.ProxyError(NO_SOCKS, request=request)
        return response

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Calls):
    """A client for asyncio: Client's methods, awaited.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            results = await asyncio.gather(*(client.classify(path) for path in paths))

    A call that is cancelled hangs up, and the service stops its count. Files are read on the event loop: give bytes if
    reading may take long.
    """

    _http: httpx.AsyncClient

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        connections: int = CONNECTIONS,
    ) -> None:
        """Set up the connections, as `Client` does; none is opened yet.

        client = AsyncClient("https://vision.example", connections=500)
        """
        super().__init__(url=url, api_key=api_key, timeout=timeout, retries=retries)
        self._http = httpx.AsyncClient(**self._options_of_httpx(connections))

    async def classify(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        explain: bool = False,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
        deadline: float | None = None,
    ) -> RobustResult:
        """Classify images on the robust path, as `Client.classify` does.

        (prediction,) = (await client.classify("digit.png", risk=0)).predictions
        """
        options = _options(
            samples=samples,
            risk=risk,
            seed=seed,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            explain=explain,
            certify=certify,
            certify_eps=certify_eps,
        )
        return await self._run(self._robust(images, options, deadline))

    async def votes(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        explain: bool = False,
        deadline: float | None = None,
    ) -> AsyncGenerator[Event]:
        """Classify images on the robust path, and show their votes as they come, as `Client.votes` does.

        async for event in client.votes("digit.png"):
            print(event)
        """
        options = _options(
            samples=samples,
            risk=risk,
            seed=seed,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            explain=explain,
        )
        call = self._votes(images, options, deadline)
        async with aclosing(await self._opened(call)) as response, aclosing(self._events(call, response)) as events:
            async for event in events:
                yield event

    async def _events(self, call: Call[RobustResult], response: httpx.Response) -> AsyncGenerator[Event]:
        call.check_streams(response)
        reader = Reader()
        lines = response.aiter_lines()
        try:
            while True:
                async with asyncio.timeout(call.left()):
                    line = await anext(lines, None)
                if line is None:
                    break
                if event := call.read(reader, line, response):
                    yield event
                    if isinstance(event, RobustResult):
                        return
        except httpx.RequestError as e:
            raise call.cut_off(e, response) from e
        except TimeoutError:
            late = httpx.ReadTimeout("the deadline has passed", request=response.request)
            raise call.cut_off(late, response) from None
        raise call.cut_off(None, response)

    async def classify_fast(
        self,
        images: Images,
        *,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
        deadline: float | None = None,
    ) -> FastResult:
        """Classify images on the fast path, as `Client.classify_fast` does.

        (prediction,) = (await client.classify_fast("digit.png")).predictions
        """
        options = _options(
            resize=resize, fit=fit, invert=invert, background=background, certify=certify, certify_eps=certify_eps
        )
        return await self._run(self._fast(images, options, deadline))

    async def stream(
        self,
        frames: AsyncIterable[Frame | Image | Any] | Iterable[Frame | Image | Any],
        *,
        rate: float | None = None,
        max_rate: float | None = None,
        margin: float | None = None,
        untypical: bool = False,
        uncertified: bool = False,
        budget: float | None = None,
        samples: int | None = None,
        risk: float | None = None,
        deadline: float | None = None,
        resize: bool = False,
        fit: Fit = "pad",
        invert: bool = False,
        background: str | None = None,
        certify: Certifying | None = None,
        certify_eps: float | None = None,
    ) -> AsyncIterator[StreamAnswer]:
        """Send frames and yield their answers, as `Client.stream` does.

            async for answer in client.stream(camera_frames()):
                print(answer.id)

        A plain iterable is taken on the event loop: give an asynchronous one if taking a frame may last.
        """
        options = _policy(
            rate=rate, max_rate=max_rate, margin=margin, untypical=untypical, uncertified=uncertified, budget=budget
        )
        options |= _options(
            samples=samples,
            risk=risk,
            resize=resize,
            fit=fit,
            invert=invert,
            background=background,
            certify=certify,
            certify_eps=certify_eps,
        )
        async for answer in self._talk(frames, options, deadline):
            yield answer

    async def _talk(
        self,
        frames: AsyncIterable[Frame | Image | Any] | Iterable[Frame | Image | Any],
        options: Mapping[str, object],
        deadline: float | None,
    ) -> AsyncIterator[StreamAnswer]:
        call = self._stream(options, deadline)
        response = await self._opened(call)
        conversation = Conversation(str(response.url), call.request_id)
        network = response.extensions["network_stream"]

        async def send() -> None:
            try:
                async for frame in asynchronous(frames):
                    await network.write(conversation.chunk(frame), timeout=self._timeout)
                await network.write(END_OF_BODY, timeout=self._timeout)
            except httpcore.NetworkError:
                pass  # the reader tells
            except Exception:
                await network.aclose()  # ends the reader
                raise

        sending = asyncio.create_task(send())
        try:
            async for data in response.aiter_raw():
                for answer in conversation.answers(data):
                    yield answer
            conversation.over()
        except httpx.RequestError as e:
            if sending.done() and (failure := sending.exception()):
                raise failure from None
            conversation.over(str(e) or type(e).__name__)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await response.aclose()

    async def info(self) -> Info:
        """Ask what is served, as `Client.info` does.

        classes = (await client.info()).bundle.classes
        """
        return await self._run(self._info())

    async def ready(self) -> bool:
        """Ask whether the service takes requests, as `Client.ready` does.

        ready = await client.ready()
        """
        return await self._says_yes("/readyz")

    async def live(self) -> bool:
        """Ask whether the service's process should go on, as `Client.live` does.

        live = await client.live()
        """
        return await self._says_yes("/livez")

    async def _says_yes(self, path: str) -> bool:
        try:
            await self._run(self._probe(path))
        except Unavailable:
            return False
        return True

    async def _run(self, call: Call[R]) -> R:
        while True:
            verdict = call.judge(await self._attempt(call))
            if not isinstance(verdict, float):
                return verdict
            await asyncio.sleep(verdict)

    async def _opened(self, call: Call[R]) -> httpx.Response:
        """Send a call until there is a 2xx, as `Client._opened` does."""
        while True:
            outcome = await self._attempt(call, stream=True)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            verdict = call.judge(outcome)
            if isinstance(verdict, float):
                await asyncio.sleep(verdict)

    async def _attempt(self, call: Call[R], *, stream: bool = False) -> httpx.Response | httpx.RequestError:
        """Send a call once, as `Client._attempt` does."""
        request = call.request()
        try:
            async with asyncio.timeout(call.left()):  # httpx bounds each wait, but not their sum
                response = await self._http.send(request, stream=stream)
                if not response.is_success:
                    await response.aread()
        except httpx.RequestError as e:
            return e
        except ProtocolError:
            return httpx.ProxyError(NO_SOCKS, request=request)
        except TimeoutError:
            return httpx.ReadTimeout("the deadline has passed", request=request)
        return response

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def checked_url(url: str) -> str:
    """Return the URL. Raises ValueError unless it is http:// or https:// and names a host."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ValueError(f"{url!r} is not a URL ({e}): give one such as {DEFAULT_URL}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is not an http or https URL: give one such as {DEFAULT_URL}")
    return url


def _policy(*, untypical: bool, uncertified: bool, **options: object) -> dict[str, object]:
    """Make the query parameters of a stream's policy."""
    return {**options, "untypical": True if untypical else None, "uncertified": True if uncertified else None}


def _options(*, resize: bool, fit: Fit, invert: bool, explain: bool = False, **options: object) -> dict[str, object]:
    """Make query parameters. Those that have their default everywhere are left out."""
    return {
        **options,
        "resize": True if resize else None,
        "fit": None if fit == "pad" else fit,
        "invert": True if invert else None,
        "explain": True if explain else None,
    }
