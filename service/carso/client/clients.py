"""Client and AsyncClient: the same calls, which differ in how they send and sleep and in nothing else."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from carso.client.call import Call, Patience, R
from carso.client.errors import Unavailable
from carso.client.images import Images, body_of
from carso.client.results import FastResult, Health, Info, RobustResult
from carso.version import __version__

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = 60.0  # seconds
RETRIES = 3
CONNECTIONS = 100


class _Calls:
    """What both clients share: where the service is, and the calls that are made on it."""

    _http: httpx.Client | httpx.AsyncClient

    def __init__(self, *, url: str | None, api_key: str | None, timeout: float, retries: int) -> None:
        self.url = checked_url(url or os.environ.get("CARSO_URL") or DEFAULT_URL)
        key = api_key or os.environ.get("CARSO_API_KEY")
        if key and not re.fullmatch(r"[!-~]+", key):  # found here, the error does not show the key
            raise ValueError("the API key holds something else than printable ASCII characters without spaces")
        self._headers = {"user-agent": f"carso/{__version__}"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._timeout, self._retries = timeout, retries

    def _robust(self, images: Images, options: Mapping[str, object], deadline: float | None) -> Call[RobustResult]:
        return Call(
            self._http.build_request,
            "POST",
            "/classify",
            model=RobustResult,
            patience=Patience(timeout=self._timeout, retries=self._retries, deadline=deadline, tell=True),
            params=options,
            body=body_of(images),
        )

    def _fast(self, images: Images, options: Mapping[str, object], deadline: float | None) -> Call[FastResult]:
        return Call(
            self._http.build_request,
            "POST",
            "/classify/fast",
            model=FastResult,
            patience=Patience(timeout=self._timeout, retries=self._retries, deadline=deadline),
            params=options,
            body=body_of(images),
        )

    def _info(self) -> Call[Info]:
        patience = Patience(timeout=self._timeout, retries=self._retries)
        return Call(self._http.build_request, "GET", "/info", model=Info, patience=patience)

    def _probe(self, path: str) -> Call[Health]:
        """Once: whoever probes asks about this moment."""
        patience = Patience(timeout=self._timeout, retries=0)
        return Call(self._http.build_request, "GET", path, model=Health, patience=patience)


class Client(_Calls):
    """For threads; one client may be used by many. Close it, or use it as a context manager."""

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
        """`url`: by default CARSO_URL of the environment, else http://127.0.0.1:8000; may have a path. `api_key`: by
        default CARSO_API_KEY, else none. `timeout`: seconds, of each wait for the service. `retries`: of one call.
        `connections`: at most, at the same time. Raises ValueError for a URL or key that is none."""
        super().__init__(url=url, api_key=api_key, timeout=timeout, retries=retries)
        self._http = httpx.Client(base_url=self.url, headers=self._headers, limits=_limits(connections))

    def classify(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        deadline: float | None = None,
    ) -> RobustResult:
        """The robust path. `images`: a path, an encoded image as bytes, a sequence of these, or an array as in body_of.

        Options that are None are the service's defaults. `deadline`: seconds for all of it, retries included; the
        service is told what is left of it and answers by then with the votes cast so far (`complete` is False).
        Raises RequestRefused, Unavailable, DeadlineExceeded, UnexpectedAnswer, and what body_of does.
        """
        options = _options(samples=samples, risk=risk, seed=seed, resize=resize)
        return self._run(self._robust(images, options, deadline))

    def classify_fast(self, images: Images, *, resize: bool = False, deadline: float | None = None) -> FastResult:
        """The fast path: the classifier alone. Arguments and errors as of `classify`."""
        return self._run(self._fast(images, _options(resize=resize), deadline))

    def info(self) -> Info:
        """What is served, with which limits, on what. Errors as of `classify`."""
        return self._run(self._info())

    def ready(self) -> bool:
        """Whether the service takes requests; False if it says no or does not answer. Raises the other errors."""
        return self._says_yes("/readyz")

    def live(self) -> bool:
        """Whether its process should go on; as `ready`."""
        return self._says_yes("/livez")

    def _says_yes(self, path: str) -> bool:
        try:
            self._run(self._probe(path))
        except Unavailable:
            return False
        return True

    def _run(self, call: Call[R]) -> R:
        while True:
            request = call.request()
            outcome: httpx.Response | httpx.RequestError
            try:
                outcome = self._http.send(request)
            except httpx.RequestError as e:
                outcome = e
            verdict = call.judge(outcome)
            if not isinstance(verdict, float):
                return verdict
            time.sleep(verdict)

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
    """For asyncio: Client's methods, awaited. A call that is cancelled hangs up, and the service stops its count.

    Files are read where the call is made: give bytes if that may take long.
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
        """As Client's."""
        super().__init__(url=url, api_key=api_key, timeout=timeout, retries=retries)
        self._http = httpx.AsyncClient(base_url=self.url, headers=self._headers, limits=_limits(connections))

    async def classify(
        self,
        images: Images,
        *,
        samples: int | None = None,
        risk: float | None = None,
        seed: int | None = None,
        resize: bool = False,
        deadline: float | None = None,
    ) -> RobustResult:
        """As Client.classify."""
        options = _options(samples=samples, risk=risk, seed=seed, resize=resize)
        return await self._run(self._robust(images, options, deadline))

    async def classify_fast(self, images: Images, *, resize: bool = False, deadline: float | None = None) -> FastResult:
        """As Client.classify_fast."""
        return await self._run(self._fast(images, _options(resize=resize), deadline))

    async def info(self) -> Info:
        """As Client.info."""
        return await self._run(self._info())

    async def ready(self) -> bool:
        """As Client.ready."""
        return await self._says_yes("/readyz")

    async def live(self) -> bool:
        """As Client.live."""
        return await self._says_yes("/livez")

    async def _says_yes(self, path: str) -> bool:
        try:
            await self._run(self._probe(path))
        except Unavailable:
            return False
        return True

    async def _run(self, call: Call[R]) -> R:
        while True:
            request = call.request()
            outcome: httpx.Response | httpx.RequestError
            try:
                async with asyncio.timeout(call.left()):  # httpx bounds each wait, but not their sum
                    outcome = await self._http.send(request)
            except httpx.RequestError as e:
                outcome = e
            except TimeoutError:
                outcome = httpx.ReadTimeout("the deadline has passed", request=request)
            verdict = call.judge(outcome)
            if not isinstance(verdict, float):
                return verdict
            await asyncio.sleep(verdict)

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
    """The URL itself. Raises ValueError unless it is http:// or https:// and names a host."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as e:
        raise ValueError(f"{url!r} is no URL ({e}): give one such as {DEFAULT_URL}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is no http or https URL: give one such as {DEFAULT_URL}")
    return url


def _limits(connections: int) -> httpx.Limits:
    return httpx.Limits(max_connections=connections, max_keepalive_connections=connections)


def _options(*, resize: bool, **options: object) -> dict[str, object]:
    """As query parameters; `resize` only if it is wanted, as the default everywhere is not to."""
    return {**options, "resize": True if resize else None}
