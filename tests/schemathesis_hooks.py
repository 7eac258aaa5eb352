"""What schemathesis does not know by itself: bodies of JSON lines. tests/test_fuzz.py runs it with these."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(context: schemathesis.SerializationContext, value: Any) -> bytes:
    """A body of what was made up, and of frames that are nearly right."""
    data = getattr(value, "data", value)  # of bytes, which it wraps
    made_up = data if isinstance(data, bytes) else str(data).encode(errors="ignore")
    return b"\n".join([made_up, b"{}", b'{"id": 1, "image": "AAAA"}', b'{"image": [[0.5]], "deadline_ms": 1}', made_up])


@schemathesis.deserializer("application/x-ndjson")
def text(context: schemathesis.DeserializationContext, response: schemathesis.Response) -> str:
    """The answer, each of whose lines is JSON."""
    for line in response.content.splitlines():
        json.loads(line or b"null")
    return response.content.decode()
