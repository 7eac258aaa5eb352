"""A parser of HTTP/1.1 requests that ignores offers to speak another protocol, as RFC 9110 (7.8) lets a server do, but
for those that its protocol takes.

Java's HttpClient offers HTTP/2 with every request (`Upgrade: h2c`), and so does `curl --http2`. httptools stops at the
end of such a head, and never reads the body behind it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httptools

# What decides where the body of a request ends, and whether another request follows it.
_FRAMING = frozenset((b"connection", b"content-length", b"transfer-encoding"))
_CALLBACKS = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body")


class SteadfastParser:
    """Has the methods of httptools.HttpRequestParser that uvicorn calls, and calls the same ones of a protocol.

    Where httptools stops, at the end of a head that offers an upgrade, a new parser takes over. It is first fed a head
    that says the same of the body and offers nothing. No callback tells of that head.
    """

    def __init__(self, protocol: Any) -> None:
        """`protocol` has the methods that HttpRequestParser calls, and `takes_upgrade`, which is asked at the end of a
        head that offers one.
        """
        self._protocol = protocol
        self._taken = False
        self._parser = self._begin({name: getattr(protocol, name) for name in _CALLBACKS})

    def feed_data(self, data: bytes | memoryview) -> None:
        """Parse the next bytes of the connection. Raises HttpParserUpgrade at the end of a head whose offer is taken,
        and HttpParserError; what then follows cannot be parsed.
        """
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as e:
                if self._taken:
                    raise
                self._go_on()
                data = memoryview(data)[e.args[0] :]  # not copied: one packet may hold many such requests
            else:
                return

    def should_upgrade(self) -> bool:
        """Tell, from on_headers_complete on, whether this head offers an upgrade that is taken."""
        self._taken = self._parser.should_upgrade() and self._protocol.takes_upgrade()
        return self._taken

    def should_keep_alive(self) -> bool:
        """Tell, from on_headers_complete on, whether another request may follow this one."""
        return bool(self._parser.should_keep_alive())

    def get_method(self) -> bytes:
        """Return the method of the request, from on_headers_complete on."""
        return bytes(self._parser.get_method())

    def get_http_version(self) -> str:
        """Return the version of the request, from on_headers_complete on: "1.1"."""
        return str(self._parser.get_http_version())

    def _begin(self, callbacks: dict[str, Any]) -> Any:
        parser = httptools.HttpRequestParser(SimpleNamespace(**callbacks, on_message_complete=self._complete))
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn: a pipelined request is answered
        return parser

    def _complete(self) -> None:
        if not self._parser.should_upgrade():  # else this is the end of the head
            self._protocol.on_message_complete()

    def _go_on(self) -> None:
        """Begin again behind a head that offered an upgrade."""
        framing = b"".join(name + b": " + value + b"\r\n" for name, value in self._protocol.headers if name in _FRAMING)
        muted = True

        def once_heard(name: str) -> Any:
            callback = getattr(self._protocol, name)
            return lambda *args: None if muted else callback(*args)

        version = self._parser.get_http_version().encode()
        self._parser = self._begin({name: once_heard(name) for name in _CALLBACKS})
        self._parser.feed_data(b"POST / HTTP/" + version + b"\r\n" + framing + b"\r\n")
        muted = False
