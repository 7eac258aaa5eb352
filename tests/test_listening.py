"""Where the service listens: both families of addresses, and what it says where it cannot."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from carso.http.listening import CannotListen, UnknownHost, bind

from tests.bundles import SMALL, shared_bundle
from tests.server import environment
from tests.test_settings import start
from tests.waiting import PATIENCE, eventually

HEALTHCHECK = Path(__file__).parents[1] / "docker/healthcheck.py"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@contextmanager
def listening(host: str, log: Path, **settings: object) -> Iterator[tuple[int, list[str]]]:
    """A ready server at `host`: its port, and the addresses that its log names."""
    variables = environment(bundle=shared_bundle(SMALL), device="cpu", threads=1, host=host, port=0, **settings)
    with (
        log.open("wb") as stderr,
        subprocess.Popen([sys.executable, "-m", "carso.command", "serve"], env=variables, stderr=stderr) as process,
    ):
        try:
            eventually(lambda: process.poll() is not None or '"message":"ready"' in log.read_text())
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            messages = [line["message"] for line in lines]
            assert messages.index("listening") < messages.index("ready")
            addresses = lines[messages.index("listening")]["addresses"]
            yield int(re.search(r"\d+$", addresses[0])[0]), addresses
        finally:
            process.terminate()
            process.wait(PATIENCE)


def answers_at(host: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{host}:{port}/livez", timeout=PATIENCE, trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False


def is_healthy(host: str, port: int) -> bool:
    """What the image's health check says."""
    variables = os.environ | {"CARSO_HOST": host, "CARSO_PORT": str(port)}
    return subprocess.run([sys.executable, HEALTHCHECK], env=variables, timeout=PATIENCE).returncode == 0


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "at"),
    [
        ("::", {"127.0.0.1": True, "[::1]": True}),
        ("0.0.0.0", {"127.0.0.1": True, "[::1]": False}),  # noqa: S104
        ("::1", {"127.0.0.1": False, "[::1]": True}),
        ("127.0.0.1", {"127.0.0.1": True, "[::1]": False}),
    ],
)
def test_it_listens_at_the_addresses_that_the_setting_names_and_its_health_check_asks_there(tmp_path, host, at):
    with listening(host, tmp_path / "log") as (port, addresses):
        assert {address: answers_at(address, port) for address in at} == at
        assert addresses == [f"http://{f'[{host}]' if ':' in host else host}:{port}"]
        assert is_healthy(host, port)
    assert not is_healthy(host, port)


def test_a_name_stands_for_all_of_its_addresses_at_one_port():
    sockets = bind("localhost", 0)
    try:
        known = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
        assert {each.getsockname()[0] for each in sockets} == {each for each in known if has_ipv6() or ":" not in each}
        assert len({each.getsockname()[1] for each in sockets}) == 1
    finally:
        for each in sockets:
            each.close()


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_where_there_is_no_ipv6_every_address_is_every_ipv4_address(monkeypatch, number):
    """As on a system whose kernel has none."""
    real = socket.socket.bind

    def without(opened: socket.socket, address: tuple) -> None:
        if opened.family == socket.AF_INET6:
            raise OSError(number, "no IPv6")
        real(opened, address)

    class Ipv4Only(socket.socket):
        bind = without

    monkeypatch.setattr(socket, "socket", Ipv4Only)
    (only,) = bind("::", 0)
    with only:
        assert only.getsockname()[0] == "0.0.0.0"  # noqa: S104


def test_a_port_that_is_taken_ends_the_start_with_its_address_and_never_says_ready():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = start(bundle=shared_bundle(SMALL), device="cpu", port=port)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"carso: cannot listen at 127.0.0.1:{port}: another process listens there")
    assert "CARSO_PORT" in last
    assert "ready" not in ended.stderr.replace(last, "")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("host", "status", "parts"),
    [
        ("no.such.host.invalid", 2, ["CARSO_HOST: 'no.such.host.invalid'", "not an address"]),
        ("192.0.2.7", 1, ["192.0.2.7:0", "this machine does not have that address", "CARSO_HOST"]),
        ("1.2.3.4.5", 2, ["CARSO_HOST: '1.2.3.4.5'", "not an address"]),
        ("x" * 70, 2, ["CARSO_HOST", "not an address"]),
    ],
)
def test_a_host_that_cannot_be_used_ends_the_start_with_the_reason(host, status, parts):
    ended = start(bundle=shared_bundle(SMALL), device="cpu", host=host, port=0)
    assert ended.returncode == status
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("carso: ") and all(part in last for part in parts), last
    assert "Traceback" not in ended.stderr and "ready" not in ended.stderr


def test_a_port_that_another_process_takes_meanwhile_is_told_like_any_other():
    from carso.http.listening import listen

    first, second = bind("127.0.0.1", 0), []
    try:
        second = bind("127.0.0.1", first[0].getsockname()[1])  # as long as nobody listens
        listen(first, backlog=1)
        with pytest.raises(CannotListen, match="another process listens there"):
            listen(second, backlog=1)
    finally:
        for each in (*first, *second):
            each.close()


def test_a_name_that_nobody_knows_is_no_host():
    with pytest.raises(UnknownHost):
        bind("no.such.host.invalid", 0)
