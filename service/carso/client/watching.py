"""What `carso watch` does: files as they appear become frames of a stream, which is opened again when it breaks."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from carso.client.clients import AsyncClient
from carso.client.errors import Unavailable
from carso.client.results import FastFrame
from carso.client.streaming import Frame, StreamAnswer, from_thread

STANDARD_INPUT = "-"
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds before a broken stream is opened again


def files_of(source: str, *, every: float) -> Iterator[Path]:
    """Yield the files of a folder, as they appear and for ever; or those of a list, a line each, to its end.

    `source`: a folder, a list, or - for a list on standard input. `every`: seconds between two looks at a folder.
    Raises OSError for a list that cannot be read.
    """
    if source == STANDARD_INPUT:
        yield from _named(sys.stdin)
    elif Path(source).is_dir():
        yield from _appearing(Path(source), every)
    else:
        with Path(source).open(encoding="utf-8") as lines:
            yield from _named(lines)


def _named(lines: Iterable[str]) -> Iterator[Path]:
    return (Path(line.rstrip("\r\n")) for line in lines if line.strip())


def _appearing(folder: Path, every: float) -> Iterator[Path]:
    """Yield each file once it stays the same from one look to the next, and again when it was changed."""
    before: dict[Path, tuple[int, int]] = {}
    sent: dict[Path, tuple[int, int]] = {}
    while True:
        now = dict(_states(folder))
        for path, state in sorted(now.items(), key=lambda item: (item[1], item[0])):  # the oldest first
            if state == before.get(path) and state != sent.get(path):
                sent[path] = state
                yield path
        before = now
        sent = {path: state for path, state in sent.items() if path in now}
        time.sleep(every)


def _states(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yield when each file of a folder was changed, in nanoseconds, and its size; none that begin with a dot."""
    for path in folder.iterdir():
        try:
            if path.is_file() and not path.name.startswith("."):
                found = path.stat()
                yield path, (found.st_mtime_ns, found.st_size)
        except FileNotFoundError:  # it was there a moment ago
            continue


class Watch:
    """Sends files and tells their answers. No file that was read is lost with a connection: it is sent again."""

    def __init__(
        self,
        client: AsyncClient,
        files: Iterable[Path],
        *,
        tell: Callable[[Path, StreamAnswer | OSError], None],
        complain: Callable[[str], None],
        **options: Any,
    ) -> None:
        """`files` may block. `tell` gets every answer with its file, and why a file cannot be read. `options`: those of
        `AsyncClient.stream`.
        """
        self._client = client
        self._files = files
        self._tell = tell
        self._complain = complain
        self._options = options
        self._found: asyncio.Queue[Path | None] = asyncio.Queue(1)
        self._pending: dict[int, tuple[Path, bytes]] = {}  # files that were read and not answered, by their ids
        self._number = 0
        self._ended = False  # there are no more files

    async def run(self) -> None:
        """Watch until there are no more files, and all are answered.

        Raises RequestRefused and UnexpectedAnswer, Unavailable only if the service cannot be reached at the start, and
        what `files` raises.
        """
        await self._client.info()
        async with asyncio.TaskGroup() as group:
            finding = group.create_task(self._find())
            pause = FIRST_PAUSE
            while await self._any():
                try:
                    async for answer in self._client.stream(self._frames(), **self._options):
                        self._note(answer)
                        pause = FIRST_PAUSE
                except Unavailable as e:
                    self._complain(f"{e}; going on with {len(self._pending)} files that are not answered")
                    await asyncio.sleep(random.uniform(0, pause))  # noqa: S311
                    pause = min(LONGEST_PAUSE, 2 * pause)
            finding.cancel()

    async def _find(self) -> None:
        async for path in from_thread(self._files):
            await self._found.put(path)
        await self._found.put(None)

    async def _any(self) -> bool:
        """Wait for a file; False: there are no more. A stream that has nothing to send would be ended as idle."""
        while not self._pending and not self._ended:
            self._take(await self._found.get())
        return bool(self._pending)

    async def _frames(self) -> AsyncIterator[Frame]:
        for number, (_, content) in list(self._pending.items()):
            yield Frame(content, id=number)
        while not self._ended:
            taken = self._take(await self._found.get())
            if taken is not None:
                yield Frame(self._pending[taken][1], id=taken)

    def _take(self, path: Path | None) -> int | None:
        """Read a file, and return its id; None: it cannot be read, or there are no more."""
        if path is None:
            self._ended = True
            return None
        try:
            content = path.read_bytes()
        except OSError as e:
            self._tell(path, e)
            return None
        self._number += 1
        self._pending[self._number] = path, content
        return self._number

    def _note(self, answer: StreamAnswer) -> None:
        if isinstance(answer.id, int) and answer.id in self._pending:
            self._tell(self._pending[answer.id][0], answer)
            if not (isinstance(answer, FastFrame) and answer.counted):  # else the robust answer follows
                del self._pending[answer.id]
