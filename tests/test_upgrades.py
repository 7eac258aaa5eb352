"""Clients that offer to speak another protocol than HTTP/1.1, as Java's HttpClient and `curl --http2` do each time."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from tests.calls import PIXELS, PNG, logged, refused, request
from tests.pictures import encoded, npy
from tests.server import Server
from tests.test_slow_clients import connect, impatient, told, trickle  # noqa: F401  a fixture
from tests.waiting import PATIENCE

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
WEBSOCKET = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n"
OTHERS = [encoded(pixels) for pixels in PIXELS]


def offering(body: bytes, offer: bytes = H2C, *, path: str = "/classify/fast", chunk: int = 0) -> bytes:
    """A request that offers an upgrade; its body is in chunks of `chunk` bytes, or has its length stated."""
    if chunk:
        framing = b"transfer-encoding: chunked\r\n"
        pieces = [body[at : at + chunk] for at in range(0, len(body), chunk)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        framing = b"content-length: %d\r\n" % len(body)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n".encode()
    return head + offer + framing + b"\r\n" + body


def answers(connection: socket.socket, count: int) -> list[tuple[int, dict]]:
    """The next answers, of which each states its length."""
    found, rest = [], b""
    while len(found) < count:
        head, end, body = rest.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1]) if end else 0
        if not end or len(body) < length:
            received = connection.recv(65536)
            assert received, rest
            rest += received
            continue
        assert b"connection: close" not in head
        found.append((int(head.split()[1]), json.loads(body[:length])))
        rest = body[length:]
    assert not rest
    return found


def labels(found: list[tuple[int, dict]]) -> list[int]:
    assert [status for status, _ in found] == [200] * len(found), found
    return [answer["predictions"][0]["probabilities"] for _, answer in found]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[list[float]]:
    """What each of OTHERS is answered without an offer."""
    with server.connect() as connection:
        for png in OTHERS:
            connection.sendall(request("/classify/fast", png, content_type="image/png"))
        return labels(answers(connection, len(OTHERS)))


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
@pytest.mark.parametrize("packet", [1_000_000, 100, 1])
def test_the_body_behind_an_offer_is_read_however_it_comes(server, expected, offer, chunk, packet):
    """And so are the next requests on the connection, with an offer and without."""
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for png, probabilities in zip(OTHERS, expected, strict=True):
            for sent in (offering(png, offer, chunk=chunk), request("/classify/fast", png, content_type="image/png")):
                for at in range(0, len(sent), packet):
                    connection.sendall(sent[at : at + packet])
                assert labels(answers(connection, 1)) == [probabilities]


def test_the_head_may_come_before_the_body(server, expected):
    """In separate packets, as Java sends them."""
    sent = offering(PNG)
    end = sent.index(b"\r\n\r\n") + 4
    with server.connect() as connection:
        connection.sendall(sent[:end])
        time.sleep(0.1)
        connection.sendall(sent[end:])
        assert labels(answers(connection, 1)) == expected[:1]


@pytest.mark.parametrize("chunk", [0, 50])
def test_requests_behind_each_other_in_one_packet_are_answered_in_order(server, expected, chunk):
    plain = request("/classify/fast", OTHERS[1], content_type="image/png")
    sent = [offering(OTHERS[0], chunk=chunk), plain, offering(OTHERS[2], chunk=chunk), offering(OTHERS[0], WEBSOCKET)]
    with server.connect() as connection:
        connection.sendall(b"".join(sent))
        assert labels(answers(connection, 4)) == [expected[which] for which in (0, 1, 2, 0)]


def test_a_request_without_a_body_may_offer_too(server):
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + H2C + b"\r\n")
        assert answers(connection, 1) == [(200, {"status": "live"})]
        connection.sendall(2 * (b"GET /readyz HTTP/1.1\r\nhost: x\r\n" + WEBSOCKET + b"\r\n"))
        assert answers(connection, 2) == [(200, {"status": "ready"})] * 2


def test_a_client_that_waits_for_100_may_offer_too(server, expected):
    with server.connect() as connection:
        head, end, body = offering(PNG).partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\nexpect: 100-continue" + end)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert labels(answers(connection, 1)) == expected[:1]


def test_an_offer_leaves_no_warning(server):
    offered = "offered-" + str(time.monotonic_ns())
    for offer in (H2C, WEBSOCKET):
        with server.connect() as connection:
            connection.sendall(offering(PNG, offer + f"x-request-id: {offered}\r\n".encode()))
            answers(connection, 1)
    assert [line["status"] for line in logged(server, offered, lines=2)] == [200, 200]
    assert "upgrade" not in server.log.read_text().lower()
    assert "websocket" not in server.log.read_text().lower()


@pytest.mark.parametrize(
    "framing",
    [
        b"transfer-encoding: chunked\r\n\r\nnonsense\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: gzip\r\n\r\nxxx",
        b"content-length: 3\r\ncontent-length: 4\r\n\r\nxxxx",
    ],
)
def test_a_body_that_cannot_be_read_is_refused_as_it_is_without_an_offer(server, framing):
    for offer in (b"", H2C):
        with connect(server) as connection:
            head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"
            told(trickle(connection, head + offer + framing, b"x"), 400, "malformed_request")


@pytest.mark.parametrize("target", ["/classify", "127.0.0.1:80", "x"])
def test_nobody_gets_a_tunnel(server, target):
    with server.connect() as connection:
        connection.sendall(f"CONNECT {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"404", b"405")


def test_the_limits_and_timers_hold_behind_an_offer(server, impatient):  # noqa: F811
    head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n" + H2C
    chunked = head + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n"
    for start, more in ((head + b"x: ", b"x"), (chunked + b"0\r\nx: ", b"x"), (chunked + b"1;", b"x")):
        with connect(server) as connection:
            told(trickle(connection, start, more * 70_000), 431, "head_too_large")
    with connect(impatient) as connection:
        assert trickle(connection, head, b"x") == b""
    with connect(impatient) as connection:
        assert trickle(connection, chunked, b"1\r\nx\r\n").startswith(b"HTTP/1.1 408")
    with connect(impatient) as connection:
        assert trickle(connection, head + b"content-length: 9000\r\n\r\n", b"x").startswith(b"HTTP/1.1 408")


def test_a_body_over_the_limit_is_refused_behind_an_offer(strict_server):
    with strict_server.connect() as connection:
        connection.sendall(offering(b"x" * 30_000, chunk=1000, path="/classify"))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_many_offers_in_one_packet_cost_no_more_than_their_length(server):
    """A packet of 600 requests, each of which lets a new parser take over."""
    one = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(600 * one)
        assert len(answers(connection, 600)) == 600


@pytest.mark.parametrize(("hosts", "count"), [(b"", 0), (b"host: a\r\nhost: b\r\n", 2)])
def test_a_request_without_its_one_host_is_refused(server, hosts, count):
    for offer in (b"", H2C):
        with connect(server) as connection:
            answer = trickle(connection, b"GET /livez HTTP/1.1\r\n" + hosts + offer + b"\r\n", b"")
        told(answer, 400, "malformed_request")
        assert f"this one has {count}".encode() in answer


def test_http_1_0_needs_no_host(server):
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
@pytest.mark.parametrize("how", [(), ("--header", "transfer-encoding: chunked"), ("--header", "expect: 100-continue")])
def test_curl_that_asks_for_http_2_is_answered(server, expected, tmp_path, how):
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    command = ["curl", "--silent", "--http2", "--header", "content-type: image/png", "--data-binary", f"@{image}", *how]
    url = f"{server.url}/classify/fast"
    done = subprocess.run([*command, url, "--next", *command[1:], url], capture_output=True, check=True)
    found = [json.loads(line) for line in done.stdout.replace(b"}{", b"}\n{").splitlines()]
    assert labels([(200, answer) for answer in found]) == expected[:1] * 2


JAVA = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;

public class Classify {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        byte[] body = Files.readAllBytes(Path.of(args[1]));
        for (int i = 0; i < 2; i++) {
            for (boolean chunked : new boolean[] {false, true}) {
                var publisher = BodyPublishers.ofByteArray(body);
                if (chunked) publisher = BodyPublishers.fromPublisher(publisher);
                var request = HttpRequest.newBuilder(URI.create(args[0] + "/classify/fast"))
                    .header("Content-Type", args[2]).POST(publisher).build();
                System.out.println(client.send(request, BodyHandlers.ofString()).body());
            }
        }
        var probe = HttpRequest.newBuilder(URI.create(args[0] + "/livez")).build();
        System.out.println(client.send(probe, BodyHandlers.ofString()).body());
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")
def test_a_stock_java_client_is_answered(server, expected, tmp_path):
    """Small bodies come in one packet with their head or not; the large one, of the same image 40 times, in several."""
    program = tmp_path / "Classify.java"
    program.write_text(JAVA)
    (tmp_path / "small").write_bytes(PNG)
    (tmp_path / "large").write_bytes(npy(np.repeat((PIXELS[:1] / 255.0)[:, None], 40, axis=0)))
    for name, content_type, images in (("small", "image/png", 1), ("large", "application/x-npy", 40)):
        command = ["java", str(program), server.url, str(tmp_path / name), content_type]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        *classified, live = done.stdout.splitlines()
        assert done.returncode == 0 and json.loads(live) == {"status": "live"}, done.stderr
        assert len(classified) == 4
        for answer in map(json.loads, classified):
            found = [prediction["probabilities"] for prediction in answer["predictions"]]
            np.testing.assert_allclose(found, expected[:1] * images, atol=1e-5)


def test_the_refusal_of_a_method_is_the_same_behind_an_offer(client):
    response = client.get("/classify", headers={"connection": "upgrade", "upgrade": "h2c"})
    refused(response, 405, "method_not_allowed")
