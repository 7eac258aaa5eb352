"""Parse a multipart/form-data body to its files, whatever the fields are called that hold them.

The files stay in memory, where the body already is, within its limit. Starlette's own form parser would write large
parts to a disk, which may be read-only or full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from carso.complaints import shown
from carso.errors import EmptyBatch, TooManyImages, UndecodableMultipart, UnexpectedPart

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD = b"file"  # a part of this name is a file even if it has no filename


@dataclass(eq=False)
class _Parts:
    """What the parser has found so far."""

    max_files: int
    files: list[bytes] = field(default_factory=list)
    complete: bool = False
    _name: bytes = b""
    _is_file: bool = False
    _header: bytes = b""
    _value: bytes = b""
    _content: list[bytes] = field(default_factory=list)

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_file,
            "on_part_data": self._add_to_content,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def _begin(self) -> None:
        if len(self.files) == self.max_files:
            raise TooManyImages(f"the body holds more than {self.max_files} files: send them in several requests")
        self._name = self._header = self._value = b""
        self._is_file = False
        self._content = []

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._name = options.get(b"name", b"")
            named = b"filename" in options or b"filename*=" in self._value.lower()
            self._is_file = named or self._name == FIELD
        self._header = self._value = b""

    def _check_file(self) -> None:
        if not self._is_file:
            raise UnexpectedPart(
                f"the part {shown(self._name.decode(errors='replace'))} is not a file: send images with a filename, "
                "and options as query parameters"
            )

    def _add_to_content(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def _end(self) -> None:
        self.files.append(b"".join(self._content))

    def _complete(self) -> None:
        self.complete = True


def parse(content_type: str, data: bytes, *, max_files: int) -> list[bytes]:
    """Return the content of each part, in order.

    Raises UndecodableMultipart, UnexpectedPart, TooManyImages, EmptyBatch.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise UndecodableMultipart("the Content-Type names no boundary: let the HTTP client write this header")
    parts = _Parts(max_files)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(data)
    except FormParserError as e:
        raise UndecodableMultipart(f"the multipart body is damaged ({e}): send it again") from None
    if not parts.complete:
        raise UndecodableMultipart("the multipart body ends before its last boundary: send all of it")
    if not parts.files:
        raise EmptyBatch("the body has no parts: send one or more images, each as a file")
    return parts.files
