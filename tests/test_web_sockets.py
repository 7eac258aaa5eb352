"""/classify/stream over WebSocket, by a library that others use, and by bytes where it is too polite."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from carso.api.frames import Line
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.bundles import SMALL, shared_bundle
from tests.calls import in_flight, logged, sample
from tests.duplex import PATH, TEXT
from tests.server import ROOT, Server, serving
from tests.waiting import PATIENCE, comes_to

KEY = "k" * 32
_LINE = TypeAdapter(Line)
HANDSHAKE = (
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Talk:
    """One stream, whose first line was read. Every line that is read is one of those that the schema knows."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.first = self.line()

    def send(self, image: object = TEXT, **frame: object) -> None:
        self.connection.send(json.dumps({"image": image, **frame}))

    def end(self) -> None:
        self.connection.send('{"end": true}')

    def line(self) -> dict[str, Any]:
        text = self.connection.recv(PATIENCE)
        _LINE.validate_json(text)
        return json.loads(text)

    def lines(self) -> list[dict[str, Any]]:
        """All lines that still come, to the last one, after which the service closes the connection."""
        found = [self.line()]
        while "end" not in found[-1]:
            found.append(self.line())
        with pytest.raises(ConnectionClosed):
            self.connection.recv(PATIENCE)
        assert self.connection.close_code == 1000
        return found


def address(server: Server, **options: object) -> str:
    return f"{server.url.replace('http', 'ws', 1)}{PATH}?{urlencode(options)}"


@contextmanager
def talking(server: Server, *, connected: dict[str, Any] | None = None, **options: object) -> Iterator[Talk]:
    """`connected`: arguments of the library's `connect`."""
    with connect(address(server, **options), proxy=None, **(connected or {})) as connection:
        yield Talk(connection)


def refusal(server: Server, connected: dict[str, Any] | None = None, **options: object) -> tuple[int, str, str]:
    """The status, the error and the message of a handshake that is refused; it has an id, as any answer."""
    with pytest.raises(InvalidStatus) as raised:
        connect(address(server, **options), proxy=None, **(connected or {}))
    response = raised.value.response
    content = json.loads(response.body)
    assert content["request_id"] == response.headers["x-request-id"]
    return response.status_code, content["error"], content["message"]


def test_each_message_is_a_line_and_a_frame_may_depend_on_the_last_answer(server):
    with talking(server, rate=1) as talk:
        assert talk.first["options"]["rate"] == 1
        for number in range(3):
            talk.send(id=number)
            fast, robust = talk.line(), talk.line()
            assert (fast["id"], fast["path"], robust["id"], robust["path"]) == (number, "fast", number, "robust")
        talk.connection.send(json.dumps({"image": TEXT}).encode())  # binary messages are lines too
        assert [talk.line()["id"], talk.line()["id"]] == [3, 3]
        talk.end()
        (end,) = talk.lines()
    assert (end["end"], end["frames"], end["counted"]) == ("complete", 4, 4)


def test_an_end_lets_all_frames_be_answered_that_were_sent(server):
    with talking(server, rate=1) as talk:
        for number in range(20):
            talk.send(id=number)
        talk.end()
        *answers, end = talk.lines()
    assert sorted((line["id"], line["path"]) for line in answers) == [
        (number, path) for number in range(20) for path in ("fast", "robust")
    ]
    assert end["end"] == "complete"


def test_what_is_no_frame_is_answered_in_its_place(server):
    with talking(server, rate=0) as talk:
        for text in ("nonsense", '{"end": false}', '{"id": 7}'):
            talk.connection.send(text)
        talk.send()
        talk.end()
        *found, last, _ = talk.lines()
    assert [(line["id"], line["line"], line["error"]) for line in found] == [
        (None, 0, "undecodable_json"),
        (1, 1, "malformed_frame"),
        (7, 2, "malformed_frame"),
    ]
    assert last["path"] == "fast"


def test_a_message_that_is_too_long_ends_the_connection(server):
    with talking(server, rate=0) as talk:
        with pytest.raises(ConnectionClosedError):
            talk.connection.send(" " * (2**20 + 1))
            talk.connection.recv(PATIENCE)
        assert talk.connection.close_code == 1009
    comes_to(lambda: sample(server.metrics(), "carso_streams"), 0)


def test_a_stream_that_cannot_begin_is_refused_as_any_request_is(server, narrow_server):
    status, error, message = refusal(server, rate=2)
    assert (status, error) == (422, "invalid_parameter")
    assert "rate: '2' is not allowed" in message
    with talking(narrow_server):
        assert refusal(narrow_server)[:2] == (429, "overloaded")


def test_keys_open_streams_and_pay_for_their_frames(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"camera: {KEY}\nspent: {KEY}x rate=1\n")
    with serving(shared_bundle(SMALL), tmp_path / "log", api_keys_file=keys) as server:
        assert refusal(server)[:2] == (401, "unauthorized")
        with talking(server, connected={"additional_headers": {"authorization": f"Bearer {KEY}"}}, rate=1) as talk:
            talk.send()
            talk.end()
            votes = talk.lines()[1]["prediction"]["votes"]
        rows = 'carso_caller_rows_total{caller="camera"}'
        comes_to(lambda: sample(server.metrics(), rows) == votes + 2, True)
        spent = {"additional_headers": {"authorization": f"Bearer {KEY}x"}}
        with talking(server, connected=spent, rate=1, risk=0) as talk:
            talk.send()
            assert (talk.line()["path"], talk.line()["path"]) == ("fast", "robust")
        assert refusal(server, spent)[:2] == (429, "overloaded")


def test_pages_of_other_origins_open_no_streams_unless_the_operator_lets_them(server, narrow_server):
    foreign = {"origin": "https://a.example"}
    assert refusal(server, foreign)[:2] == (403, "origin_refused")
    with talking(server, connected={"origin": server.url}):
        pass
    with talking(narrow_server, connected=foreign):
        pass
    assert refusal(narrow_server, {"origin": "https://b.example"})[:2] == (403, "origin_refused")


def test_below_a_prefix_the_path_is_the_same_with_it_and_without(narrow_server):
    for prefix in ("", "/vision"):
        url = address(narrow_server, rate=0).replace(PATH, prefix + PATH)
        comes_to(lambda: sample(narrow_server.metrics(), "carso_streams"), 0)
        with connect(url, proxy=None) as connection:
            assert Talk(connection).first["stream"]


def test_a_stream_outlives_the_time_that_a_request_may_take(narrow_server):
    comes_to(lambda: sample(narrow_server.metrics(), "carso_streams"), 0)
    with talking(narrow_server, rate=0) as talk:
        time.sleep(1.2)  # more than the timeout and its grace, together
        talk.send()
        assert talk.line()["path"] == "fast"


def test_a_handshake_that_trickles_in_is_not_waited_for(narrow_server):
    with narrow_server.connect() as connection:
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + HANDSHAKE[:-4])
        assert connection.recv(65536) == b""


def test_a_hang_up_cancels_everything(endless_server):
    with talking(endless_server, rate=1, samples=100_000, risk=0) as talk:
        for number in range(3):
            talk.send(id=number)
            assert talk.line()["counted"]
        comes_to(lambda: in_flight(endless_server), 3)
    comes_to(lambda: in_flight(endless_server), 0)
    comes_to(lambda: sample(endless_server.metrics(), "carso_streams"), 0)


def test_an_idle_stream_is_ended(impatient_server):
    with talking(impatient_server, rate=0) as talk:
        talk.send()
        assert talk.line()["path"] == "fast"
        (end,) = talk.lines()
    assert (end["end"], end["frames"]) == ("idle", 1)


def test_a_client_that_takes_no_answers_is_cut_off(impatient_server):
    url = httpx.URL(impatient_server.url)
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect((url.host, url.port))
    deaf = {"additional_headers": {"x-request-id": "too-deaf"}, "max_queue": 1, "ping_interval": None, "sock": narrow}
    with talking(impatient_server, connected=deaf, rate=0) as talk, pytest.raises(ConnectionClosed):
        while True:
            talk.connection.send('{"id": "%s"}' % ("x" * 100))
    (line,) = logged(impatient_server, "too-deaf")
    assert (line["status"], line["error"]) == (101, "client_gone")
    assert "Traceback" not in impatient_server.log.read_text()


def test_a_server_that_stops_answers_what_it_has_read_and_says_why_it_ends(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000) as server:
        with talking(server, rate=1, samples=1500, risk=0) as talk:
            talk.send(id="accepted")
            assert talk.line()["counted"]
            server.process.send_signal(signal.SIGTERM)
            robust, end = talk.lines()
            assert (robust["id"], robust["path"]) == ("accepted", "robust")
            assert (end["end"], end["frames"], end["counted"]) == ("stopping", 1, 1)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + HANDSHAKE.replace(b"13", b"8"), b"405"),
        (f"GET {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + HANDSHAKE.replace(b"dGhl", b""), b"405"),
        (f"HEAD {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + HANDSHAKE, b"405"),
        (b"GET /classify HTTP/1.1\r\nhost: x\r\n" + HANDSHAKE, b"405"),
        (f"GET {PATH} HTTP/1.1\r\n".encode() + HANDSHAKE, b"400"),
        (f"GET {PATH} HTTP/1.1\r\nhost: x\r\na: {'x' * 9000}\r\n".encode() + HANDSHAKE, b"431"),
        (f"GET {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + 1000 * b"a: b\r\n" + HANDSHAKE, b"431"),
    ],
    ids=["of another version", "without a key", "by HEAD", "elsewhere", "without a host", "too long", "too many"],
)
def test_an_offer_that_is_no_handshake_is_answered_like_any_request(server, head, status):
    with server.connect() as connection:
        connection.sendall(head)
        answer = connection.recv(65536)
    assert answer.split()[1] == status
    assert b"x-request-id" in answer


def test_a_handshake_behind_a_request_whose_answer_is_due_is_not_taken(endless_server):
    """Its messages would come between the parts of that answer."""
    with endless_server.connect() as connection:
        body = b'{"image": "%s"}' % TEXT.encode()
        connection.sendall(b"POST /classify/fast HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nhost: x\r\n".encode() + HANDSHAKE)
        received = b""
        while received.count(b"HTTP/1.1 ") < 2:
            received += connection.recv(65536)
    assert b"101 Switching" not in received or received.index(b"HTTP/1.1 101") > received.index(b'"request_id"')


@pytest.mark.slow
def test_node_by_itself_can_talk(server):
    node = [shutil.which("node") or "", "--experimental-websocket"]
    if not node[0] or subprocess.run([*node, "--eval", ""], capture_output=True).returncode:
        pytest.skip("there is no node here, or one before 20.10, which has no WebSocket")
    client = ROOT / "tests" / "clients" / "web_socket.mjs"
    command = [*node, client, address(server, rate=1), TEXT]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    *lines, closed = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line.get("path") for line in lines] == [None, "fast", "robust", None]
    assert (lines[-1]["end"], closed) == ("complete", 1000)
