"""POST /classify/stream, as clients meet it: over real connections, with lines both ways."""

from __future__ import annotations

import base64
import json
import signal
import socket
import time

import httpx
import pytest

from tests.bundles import SMALL, shared_bundle
from tests.calls import COLOUR_PNG, VALUES, in_flight, logged, refused, sample, under_way
from tests.duplex import PATH, TEXT, Duplex, streaming
from tests.server import Server, serving
from tests.waiting import PATIENCE, comes_to

KEY = "k" * 32


def test_a_client_may_send_each_frame_after_it_has_read_the_last_answer(server):
    with streaming(server, rate=1) as stream:
        for number in range(5):
            stream.send(id=f"frame {number}")
            fast = stream.line()
            assert (fast["id"], fast["path"], fast["counted"], fast["chosen"]) == (
                f"frame {number}",
                "fast",
                True,
                ["rate"],
            )
            robust = stream.line()
            assert (robust["id"], robust["path"], robust["chosen"]) == (f"frame {number}", "robust", ["rate"])
            assert robust["prediction"]["fast_label"] == fast["prediction"]["label"]
        stream.end()
        (end,) = stream.lines()
    assert (end["end"], end["frames"], end["counted"]) == ("complete", 5, 5)


def test_the_answers_are_those_of_the_other_endpoints(server, client):
    image = VALUES[0].tolist()
    alone = client.post("/classify/fast", json={"images": [image]}).json()
    with streaming(server, rate=1) as stream:
        stream.send(image)
        fast, robust = stream.line(), stream.line()
    assert fast["prediction"] == alone["predictions"][0]
    seed = robust["prediction"]["seed"]
    again = client.post("/classify", json={"images": [image]}, params={"seed": seed}).json()
    assert robust["prediction"] == again["predictions"][0]
    assert robust["image"] == again["images"][0]


def test_frames_without_an_id_are_numbered_and_fast_answers_keep_their_order(server):
    with streaming(server, rate=0) as stream:
        for number in range(20):
            stream.send(**({} if number % 2 else {"id": number}))
        stream.send_text(b"\n \n")  # no frames
        stream.send()
        stream.end()
        *fast, end = stream.lines()
    assert [line["id"] for line in fast] == list(range(21))
    assert not any(line["counted"] or line["chosen"] for line in fast)
    assert (end["frames"], end["counted"]) == (21, 0)


def test_the_first_line_says_what_answers_and_within_which_bounds(server, client):
    info = client.get("/info").json()
    with server.connect() as connection:
        stream = Duplex(connection, {"x-request-id": "mine"}, rate=0.25, budget=100, samples=20)
        head = dict(stream.head().headers)
        first = stream.line()
        stream.end()
        end = stream.lines()[-1]
    assert head[b"content-type"] == b"application/x-ndjson"
    assert (first["stream"], end["request_id"], head[b"x-request-id"]) == ("mine", "mine", b"mine")
    assert first["bundle"] == {name: info["bundle"][name] for name in ("name", "version", "checksum")}
    assert (first["provider"], first["precision"]) == (info["device"]["provider"], info["device"]["precision"])
    asked = {name: first["options"][name] for name in ("rate", "max_rate", "budget", "samples", "risk", "margin")}
    assert asked == {"rate": 0.25, "max_rate": 1.0, "budget": 100.0, "samples": 20, "risk": 1e-3, "margin": 0.0}
    assert (first["in_flight"], first["longest_line"], first["idle_s"]) == (8, 2**20, 300)


@pytest.mark.parametrize(
    ("line", "frame_id", "error"),
    [
        (b"nonsense", None, "undecodable_json"),
        (b"[1, 2]", None, "malformed_frame"),
        (b'{"id": null, "image": "%s"}' % TEXT.encode(), None, "malformed_frame"),
        (b'{"id": true, "image": "%s"}' % TEXT.encode(), None, "malformed_frame"),
        (b'{"id": "%s", "image": ""}' % (b"x" * 129), None, "malformed_frame"),
        (b'{"id": 7}', 7, "malformed_frame"),
        (b'{"id": 7, "image": "", "samples": 3}', 7, "malformed_frame"),
        (b'{"id": 7, "image": "!"}', 7, "undecodable_base64"),
        (b'{"id": 7, "image": "AAAA"}', 7, "undecodable_image"),
        (b'{"id": 7, "image": 5}', 7, "not_numbers"),
        (b'{"id": 7, "image": [[1, 2], [3]]}', 7, "ragged_array"),
        (b'{"id": 7, "image": [[0.5, 1], [0, 1]]}', 7, "wrong_shape"),
        (b'{"id": 7, "image": "", "deadline_ms": 0}', 7, "invalid_parameter"),
        (b'{"id": 7, "image": "", "deadline_ms": true}', 7, "invalid_parameter"),
        (b'{"id": 7, "image": "", "deadline_ms": 1.5}', 7, "invalid_parameter"),
        (b'{"image": [' + b"1," * 2**17 + b"1]}", None, "body_too_large"),
        (b'{"image": "' + b"A" * 2**20 + b'"}', None, "body_too_large"),
        (b'{"image": "' + b"A" * 2**22 + b'"}', None, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_is_no_frame_is_answered_in_its_place_and_the_stream_goes_on(server, line, frame_id, error):
    with streaming(server, rate=0) as stream:
        stream.send(id="before")
        stream.send_text(line + b"\n")
        stream.send(id="after")
        stream.end()
        before, wrong, after, end = stream.lines()
    assert (before["id"], after["id"]) == ("before", "after")
    assert (wrong["id"], wrong["line"], wrong["path"], wrong["error"]) == (frame_id, 1, "fast", error)
    assert (end["end"], end["frames"]) == ("complete", 3)


def test_a_last_line_needs_no_end(server):
    with streaming(server, rate=0) as stream:
        stream.send_text(json.dumps({"image": TEXT}).encode())
        stream.end()
        fast, end = stream.lines()
    assert (fast["id"], end["frames"]) == (0, 1)


def test_a_body_with_a_length_is_a_stream_too(server, client):
    frames = "\n".join(json.dumps({"id": number, "image": TEXT}) for number in range(3))
    answer = client.post(PATH, content=frames, params={"rate": 1})
    *lines, end = [json.loads(line) for line in answer.text.splitlines()[1:]]
    assert sorted((line["id"], line["path"]) for line in lines) == [
        (n, p) for n in range(3) for p in ("fast", "robust")
    ]
    assert end["end"] == "complete"


def test_images_are_resized_if_the_stream_asks_for_it(server):
    text = base64.b64encode(COLOUR_PNG).decode()
    for resize, errors in (("false", ["wrong_shape"]), ("true", [])):
        with streaming(server, rate=0, resize=resize) as stream:
            stream.send(text)
            stream.end()
            *lines, _ = stream.lines()
        assert [line["error"] for line in lines if "error" in line] == errors


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"rate": 2}, "invalid_parameter", "rate: '2' is not allowed; it must be a number from 0 to 1"),
        (
            {"rate": 0.5, "max_rate": 0.4},
            "invalid_parameter",
            "max_rate: 0.4 is not allowed; it must be at least the rate",
        ),
        ({"budget": 0}, "invalid_parameter", "budget: '0'"),
        ({"seed": 1}, "unknown_parameter", "'seed' is not an option of this endpoint"),
        ({"samples": 10**6}, "invalid_parameter", "samples"),
        ({"untypical": "true"}, "invalid_parameter", "CARSO_TYPICAL=all"),
        ({"uncertified": "true"}, "invalid_parameter", "give certify=report too"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_stream_begins(client, options, error, told):
    assert told in refused(client.post(PATH, params=options), 422, error)


def agreement(server: Server) -> float:
    page = server.metrics()
    return sum(sample(page, f'carso_path_agreement_total{{agree="{agree}"}}') for agree in ("true", "false"))


def test_frames_that_were_chosen_for_what_they_show_are_no_evidence(server):
    before = agreement(server)
    with streaming(server, rate=0, margin=1) as stream:
        stream.send()
        assert stream.line()["chosen"] == ["margin"]
        assert stream.line()["path"] == "robust"
    assert agreement(server) == before
    with streaming(server, rate=1, margin=1) as stream:
        stream.send()
        assert stream.line()["chosen"] == ["rate", "margin"]
        assert stream.line()["path"] == "robust"
    assert agreement(server) == before + 1


def test_a_budget_that_is_spent_leaves_frames_uncounted_and_says_so(server):
    with streaming(server, rate=1, budget=1, risk=0) as stream:  # a count takes hundreds of votes: a debt of minutes
        stream.send(id=0)
        assert (stream.line()["counted"], stream.line()["path"]) == (True, "robust")
        stream.send(id=1)
        fast = stream.line()
        assert (fast["chosen"], fast["counted"]) == (["rate"], False)
        stream.end()
        (end,) = stream.lines()
    assert end["counted"] == 1
    assert sample(server.metrics(), 'carso_stream_frames_chosen_total{counted="false",reason="rate"}') >= 1


def no_stream(server: Server) -> None:
    """Wait until those of other tests have ended."""
    comes_to(lambda: sample(server.metrics(), "carso_streams"), 0)


def test_untypical_frames_are_chosen_where_the_fast_path_looks_at_that(narrow_server):
    no_stream(narrow_server)
    with streaming(narrow_server, rate=0, untypical="true") as stream:
        for image in VALUES:
            stream.send(image.tolist())
            fast = stream.line()
            assert fast["chosen"] == ([] if fast["prediction"]["typical"] else ["untypical"])
            if fast["counted"]:
                assert stream.line()["path"] == "robust"


def test_a_full_stream_reads_no_further_until_a_count_ends(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000, "stream_frames": 1}
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server,
        streaming(server, rate=1, samples=100_000, risk=0) as stream,
    ):
        # each counts from when its frame is read: whoever waits for a place has a second left when it gets it
        for number, deadline in enumerate((500, 1500, 2000)):
            stream.send(id=number, deadline_ms=deadline)
        stream.end()
        *lines, end = stream.lines()
    assert [(line["id"], line["path"]) for line in lines] == [
        *((0, "fast"), (1, "fast")),  # the second waits for the place of the first
        *((0, "robust"), (2, "fast")),
        *((1, "robust"), (2, "robust")),
    ]
    assert {line["prediction"]["rule"] for line in lines if line["path"] == "robust"} == {"deadline"}
    assert end["counted"] == 3


@pytest.mark.slow  # the service notices the hang-up with the next line that it sends, after 15 s of silence
def test_a_client_that_sends_more_than_is_done_is_slowed_down(endless_server):
    with streaming(endless_server, rate=1, samples=100_000, risk=0) as stream:
        for number in range(9):  # eight are counted for a long time
            stream.send(id=number)
        comes_to(lambda: in_flight(endless_server), 8)
        stream.socket.setblocking(False)
        sent, idle = 0, 0
        piece = b"10000\r\n" + b" " * 65535 + b"\n\r\n"
        while idle < 50:
            try:
                sent += stream.socket.send(piece)
                idle = 0
            except BlockingIOError:
                idle += 1
                time.sleep(0.01)
            assert sent < 64 * 2**20
    comes_to(lambda: in_flight(endless_server), 0)


def test_a_hang_up_cancels_everything(endless_server):
    with streaming(endless_server, rate=1, samples=100_000, risk=0) as stream:
        for number in range(3):
            stream.send(id=number)
            assert stream.line()["counted"]
        comes_to(lambda: in_flight(endless_server), 3)
        assert sample(endless_server.metrics(), "carso_streams") == 1
    comes_to(lambda: in_flight(endless_server), 0)
    comes_to(lambda: sample(endless_server.metrics(), "carso_streams"), 0)
    comes_to(lambda: sample(endless_server.metrics(), 'carso_queue_rows{path="robust"}'), 0)


def test_a_frame_has_a_deadline_of_its_own(endless_server):
    with streaming(endless_server, rate=1, samples=100_000, risk=0, deadline_ms=600_000) as stream:
        stream.send(id="late")
        assert stream.line()["counted"]
        stream.send(id="soon", deadline_ms=500)
        assert stream.line()["id"] == "soon"
        answer = stream.line()
        if "error" in answer:  # on a slow machine, no vote was cast by then
            assert (answer["id"], answer["path"], answer["error"]) == ("soon", "robust", "deadline_exceeded")
        else:
            assert (answer["id"], answer["prediction"]["complete"]) == ("soon", False)
    comes_to(lambda: in_flight(endless_server), 0)


def test_a_queue_that_is_full_refuses_a_frame_and_not_the_stream(endless_server):
    with under_way(endless_server), streaming(endless_server, rate=1, samples=100_000, risk=0) as stream:
        stream.send(id="the last that fits")
        assert stream.line()["counted"]
        stream.send(id="too much")
        assert stream.line()["counted"]
        error = stream.line()
        assert (error["id"], error["path"], error["error"]) == ("too much", "robust", "overloaded")
        assert error["retry_after"] >= 1
        stream.send(id="after it")
        assert stream.line()["path"] == "fast"
    comes_to(lambda: in_flight(endless_server), 0)


def test_a_stream_outlives_the_time_that_a_body_may_take(narrow_server):
    no_stream(narrow_server)
    with streaming(narrow_server, rate=1) as stream:
        for _ in range(3):
            time.sleep(0.7)  # more than the timeout and its grace, together
            stream.send()
            assert (stream.line()["path"], stream.line()["path"]) == ("fast", "robust")
        stream.end()
        assert stream.lines()[-1]["end"] == "complete"


def test_an_idle_stream_is_ended(impatient_server):
    with streaming(impatient_server, rate=0) as stream:
        stream.send()
        assert stream.line()["path"] == "fast"
        stream.send_text(b'{"image": ')  # the beginning of a line is none
        (end,) = stream.lines()
    assert (end["end"], end["frames"]) == ("idle", 1)


def test_a_client_that_takes_no_answers_is_cut_off(impatient_server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        address = httpx.URL(impatient_server.url)
        connection.settimeout(PATIENCE)
        connection.connect((address.host, address.port))
        connection.sendall(b"POST /classify/stream?rate=0 HTTP/1.1\r\nhost: x\r\nx-request-id: deaf\r\n")
        connection.sendall(b"transfer-encoding: chunked\r\n\r\n")
        frames = b'{"id": "%s"}\n' % (b"x" * 100) * 500
        with pytest.raises(OSError):  # reset, or a broken pipe
            while True:
                connection.sendall(b"%x\r\n%s\r\n" % (len(frames), frames))
    (line,) = logged(impatient_server, "deaf")
    assert line["error"] == "client_gone"
    assert "Traceback" not in impatient_server.log.read_text()
    assert "without completing" not in impatient_server.log.read_text()


def test_a_server_that_stops_answers_what_it_has_read_and_says_why_it_ends(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, drain_delay_s=3600) as server:
        with streaming(server, rate=1, samples=1500, risk=0) as stream, server.client() as client:
            stream.send(id="accepted")
            assert stream.line()["counted"]
            server.process.send_signal(signal.SIGTERM)
            robust, end = stream.lines()
            assert (robust["id"], robust["path"]) == ("accepted", "robust")
            assert (end["end"], end["frames"], end["counted"]) == ("stopping", 1, 1)
            # the port is still open, but not for a stream
            assert "stopping" in refused(client.post(PATH), 503, "not_ready")
        server.process.send_signal(signal.SIGTERM)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_count_that_does_not_end_in_the_time_to_drain_is_told_so(tmp_path):
    limits = {"max_samples": 100_000, "queue_rows": 10_000_000, "drain_timeout_s": 0.3}
    with serving(shared_bundle(SMALL), tmp_path / "log", per_second=20_000, **limits) as server:
        with streaming(server, rate=1, samples=100_000, risk=0) as stream:
            stream.send(id="long")
            assert stream.line()["counted"]
            server.process.send_signal(signal.SIGTERM)
            error, end = stream.lines()
        assert (error["id"], error["path"], error["error"]) == ("long", "robust", "not_ready")
        assert (end["end"], end["counted"]) == ("stopping", 0)
        assert server.leaves() == 0
    assert "Traceback" not in server.log.read_text()


def test_an_engine_that_fails_ends_the_stream(tmp_path):
    with serving(shared_bundle(SMALL), tmp_path / "log", failing=True) as server:
        with streaming(server, rate=1) as stream:
            stream.send(id="first")
            assert stream.line()["counted"]
            error, end = stream.lines()
        assert (error["id"], error["error"], end["end"]) == ("first", "engine_failed", "failed")


def test_there_are_as_many_streams_as_the_operator_allows(narrow_server):
    no_stream(narrow_server)
    with narrow_server.client() as client:
        with streaming(narrow_server) as stream:
            refusal = client.post(PATH)
            assert "1 streams are open, and at most 1" in refused(refusal, 429, "overloaded")
            assert refusal.headers["retry-after"] == "1"
            stream.end()
            stream.lines()
        comes_to(lambda: client.post(PATH).status_code, 200)


def test_keys_and_their_rates_hold_for_every_frame(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"camera: {KEY} rate=50\n")
    with serving(shared_bundle(SMALL), tmp_path / "log", api_keys_file=keys) as server, server.client() as client:
        refused(client.post(PATH), 401, "unauthorized")
        named = {"authorization": f"Bearer {KEY}"}
        with streaming(server, headers=named, rate=1, risk=0, certify="report") as stream:
            for number in range(2):  # ten seconds of rows are saved up: 500
                stream.send(id=number)
            stream.end()
            lines = stream.lines()
        first = [line for line in lines if line.get("id") == 0]
        assert [line["path"] for line in first] == ["fast", "robust"]
        votes = first[1]["prediction"]["votes"]
        rows = votes + 2 + 2  # two first passes, and one pass of bounds for both
        comes_to(lambda: sample(server.metrics(), 'carso_caller_rows_total{caller="camera"}'), rows)
        errors = [line for line in lines if line.get("error")]
        assert {(line["error"], line["id"]) for line in errors} == {("overloaded", 1)}
        assert all("the key of camera is for 50 rows" in line["message"] for line in errors)


def test_where_the_evidence_is_withheld_lines_hold_labels_only(tmp_path):
    with (
        serving(shared_bundle(SMALL), tmp_path / "log", evidence="label") as server,
        streaming(server, rate=1) as stream,
    ):
        stream.send(id=1)
        fast, robust = stream.line(), stream.line()
    assert fast.keys() == {"id", "path", "counted", "prediction"}
    assert fast["prediction"].keys() == {"label", "class_name"}
    assert robust.keys() == {"id", "path", "prediction"}
    assert robust["prediction"].keys() == {"label", "class_name", "typical", "complete"}


def test_a_stream_leaves_one_line_in_the_log_and_its_frames_are_counted(server):
    with streaming(server, headers={"x-request-id": "counted"}, rate=1) as stream:
        stream.send()
        stream.send_text(b"{}\n")
        stream.end()
        stream.lines()
    (line,) = logged(server, "counted")
    assert (line["endpoint"], line["status"], line["images"]) == (PATH, 200, 2)
    page = server.metrics()
    for answer in ("fast", "robust", "error"):
        assert sample(page, f'carso_stream_frames_total{{answer="{answer}"}}') >= 1


def test_a_compressed_stream_is_refused(client):
    refused(client.post(PATH, content=b"x", headers={"content-encoding": "gzip"}), 415, "unsupported_media_type")
