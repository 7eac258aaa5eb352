"""Logging: one JSON object a line, on standard error."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from pydantic_core import to_json


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


def configure(level: str) -> None:
    """Send all logs of this process, those of the HTTP server included, through JsonFormatter."""
    # None of this is in our lines, and looking it up takes as long as the rest of a line (logging's own advice).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
