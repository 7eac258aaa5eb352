"""Logging on standard error: one JSON object a line, or text for people."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Literal

from pydantic_core import to_json

Format = Literal["auto", "json", "text"]


class JsonFormatter(logging.Formatter):
    """Formats a record as time, level, logger and message, the `extra={"fields": {...}}` it has, and its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return to_json(line, fallback=str, inf_nan_mode="strings").decode()


class TextFormatter(logging.Formatter):
    """Formats a record as time of day, level and message, its fields as name=value, and its traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and its traceback on lines of its own."""
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")[11:23]
        fields = (f"{name}={_shown(value)}" for name, value in getattr(record, "fields", {}).items())
        line = " ".join((time, f"{record.levelname.lower():7}", record.getMessage(), *fields))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object) -> str:
    """Return a value so that it has no line break and no sequence that a terminal obeys."""
    text = str(value) if isinstance(value, (bool, int, float, str)) else to_json(value, fallback=str).decode()
    return text if text.isprintable() else repr(text)


class Lines(logging.Handler):
    """Writes to a standard error that several processes share: whole lines, one process at a time.

    The kernel itself keeps only short lines together, and only in a pipe.
    """

    def __init__(self, lock: Callable[[], AbstractContextManager[None]], worker: int | None) -> None:
        """`lock` keeps the other processes out. `worker`: the number that each line has; None: it has none."""
        super().__init__()
        self._lock = lock
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            if self._worker is not None:
                record.fields = {"worker": self._worker, **getattr(record, "fields", {})}
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
            with self._lock():
                while line:
                    line = line[os.write(sys.stderr.fileno(), line) :]
        except Exception:  # as logging's own handlers do
            self.handleError(record)


def configure(level: str, form: Format, handler: logging.Handler | None = None) -> None:
    """Send all logs of this process, those of the HTTP server included, through one formatter.

    `form`: "auto" is text if standard error is a terminal. `handler`: None writes to standard error.
    """
    if form == "auto":
        form = "text" if sys.stderr.isatty() else "json"
    # None of this is in our lines, and looking it up takes as long as the rest of a line (logging's own advice).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = handler or logging.StreamHandler()
    handler.setFormatter(TextFormatter() if form == "text" else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
