"""The events of `votes`, read from the lines of an answer, without any I/O.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

from typing import TypeAlias

from carso.client.results import FirstPass, RobustResult, Tally

MEDIA_TYPE = "text/event-stream"
Event: TypeAlias = FirstPass | Tally | RobustResult
_KINDS: dict[str, type[Event]] = {"first_pass": FirstPass, "tally": Tally, "answer": RobustResult}


class Told(Exception):  # noqa: N818  what a service tells
    """The service ended its events with an error, whose JSON this holds."""

    def __init__(self, content: str) -> None:
        super().__init__(content)
        self.content = content


class Reader:
    """Takes lines and gives events. Kinds of events that this version does not know are left out."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[str] = []

    def event_at(self, line: str) -> Event | None:
        """Return the event that ends with this line; None: it goes on, or it is not ours.

        Raises Told, and pydantic's ValidationError for what is not such an event.
        """
        if line:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self._name = value
            elif field == "data":
                self._data.append(value)
            return None
        name, data = self._name, "\n".join(self._data)
        self._name, self._data = "", []
        if name == "error":
            raise Told(data)
        return _KINDS[name].model_validate_json(data) if name in _KINDS else None
