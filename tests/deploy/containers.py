"""Docker, as the tests of the images and of the compose stack use it."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PORT = 8000
IMAGE = {"Content-Type": "image/png"}
START_WITHIN = 120  # seconds: test machines may be busy

# What a cautious operator sets, and Kubernetes' restricted standard asks for.
HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--memory=512m", "--pids-limit=128")


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the docker client. Raises RuntimeError with what it said, if `check`."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done


@dataclass(frozen=True)
class Container:
    """A container with a server in it, reached at its own address, past Docker's proxy."""

    id: str

    def inspect(self) -> dict[str, Any]:
        (found,) = json.loads(docker("inspect", self.id).stdout)
        return found

    @property
    def address(self) -> str:
        networks = self.inspect()["NetworkSettings"]["Networks"].values()
        return next(network["IPAddress"] for network in networks)

    def log(self) -> str:
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return docker("exec", self.id, *command, check=False)

    def wait_until_ready(self) -> None:
        address, give_up = self.address, time.monotonic() + START_WITHIN
        while time.monotonic() < give_up and self.inspect()["State"]["Running"]:
            try:
                if request(address, "GET", "/readyz")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"container {self.id[:12]} is not ready:\n{self.log()}")


def request(
    host: str,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    port: int = PORT,
    headers: Mapping[str, str] = IMAGE,
) -> tuple[int, Any]:
    """Status and JSON of one request on a connection of its own."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        is_json = "json" in (response.headers["content-type"] or "")
        return response.status, json.loads(content) if is_json else content.decode()
    finally:
        connection.close()


@contextmanager
def running(image: str, *options: str) -> Iterator[Container]:
    """A ready server out of `image`, hardened; it is removed at the end."""
    container = Container(docker("run", "--detach", *HARDENED, *options, image).stdout.strip())
    try:
        container.wait_until_ready()
        yield container
    finally:
        docker("rm", "--force", container.id)
