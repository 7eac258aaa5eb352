"""The compose stack, brought up under load, but for Grafana: no registry has it where these checks run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.containers import Container, docker, request
from tests.deploy.dashboard import annotations, choices, queries

ROOT = Path(__file__).parents[2]
PROJECT = "carso-check"
PATIENCE = 120  # seconds: test machines may be busy
PERIOD = "15"  # seconds from one attack to the next
# There is no GPU, there are no keys, the bundle proves nothing, and not every machine has cgroups of version 2
NO_DATA_YET = ("carso_gpu_", "carso_caller_", "carso_uncertified_", "carso_cgroup_", "carso:throttled:")

pytestmark = pytest.mark.skipif(
    "DEPLOY_CPU_IMAGE" not in os.environ, reason="tests/deploy/run builds the images and runs this"
)


@dataclass(frozen=True)
class Stack:
    ports: dict[str, int]

    def compose(self, *arguments: str) -> str:
        environment = os.environ | {name: str(port) for name, port in self.ports.items()} | {"ATTACK_PERIOD": PERIOD}
        command = ["docker-compose", "--project-name", PROJECT, "--profile", "load", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def container(self, service: str) -> Container:
        labels = {"project": PROJECT, "service": service}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return Container(docker("ps", "--all", "--quiet", *filters).stdout.strip())

    def prometheus(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        port = self.ports["PROMETHEUS_PORT"]
        status, answer = request("127.0.0.1", "GET", f"/api/v1/{path}?{query}", port=port)
        assert status == 200, answer
        return answer["data"]

    def ask(self, expr: str) -> list[dict[str, Any]]:
        return self.prometheus("query", query=expr)["result"]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    started = Stack({name: free_port() for name in ("SERVICE_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")})
    try:
        started.compose("up", "--build", "--detach", "carso", "prometheus", "load")
        yield started
    finally:
        started.compose("down", "--volumes")


def free_port() -> int:
    """A port that was free a moment ago: Compose has to be told a number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(what: Callable[[], Any], *, because: Callable[[], Any]) -> None:
    """Wait until `what` is true. Fails with `because`."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            if what():
                return
        except OSError:
            pass
        time.sleep(1)
    pytest.fail(str(because()))


def test_every_service_becomes_healthy(stack: Stack) -> None:
    for name in ("carso", "prometheus"):
        container = stack.container(name)
        eventually(
            lambda container=container: container.inspect()["State"]["Health"]["Status"] == "healthy",
            because=lambda container=container: (container.inspect()["State"], container.log()),
        )
    assert stack.container("load").inspect()["State"]["Running"]


def test_the_service_answers_at_its_published_port(stack: Stack) -> None:
    body = (ROOT / "docs/samples/1-pgd-0.30.png").read_bytes()
    status, answer = request("127.0.0.1", "POST", "/classify", body, port=stack.ports["SERVICE_PORT"])
    (prediction,) = answer["predictions"]
    assert (status, prediction["class_name"], prediction["agree"]) == (200, "1", False)


def test_the_limits_are_in_force(stack: Stack) -> None:
    for name in ("carso", "prometheus", "load"):
        host = stack.container(name).inspect()["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["Memory"] > 0
        assert host["NanoCpus"] > 0
        assert host["PidsLimit"] > 0


def test_prometheus_scrapes_the_service_and_has_every_rule(stack: Stack) -> None:
    def healths() -> list[str]:
        return [target["health"] for target in stack.prometheus("targets")["activeTargets"]]

    eventually(lambda: healths() == ["up"], because=lambda: stack.prometheus("targets"))
    groups = stack.prometheus("rules")["groups"]
    assert {group["name"] for group in groups} == {"carso-objectives", "carso-alerts"}
    eventually(
        lambda: all(rule["health"] == "ok" for group in stack.prometheus("rules")["groups"] for rule in group["rules"]),
        because=lambda: stack.prometheus("rules"),
    )


def test_every_query_of_the_dashboard_returns_data_under_load(stack: Stack) -> None:
    expected = [query for query in queries() if not any(name in query.expr for name in NO_DATA_YET)]
    assert len(expected) > 30

    def silent() -> list[tuple[str, str]]:
        # something that is refused, so that there are errors to show, and no zero in the place of one that is not found
        request("127.0.0.1", "POST", "/classify", b"no image", port=stack.ports["SERVICE_PORT"])
        asked = [(query.panel, re.sub(r"^(sum.+) or vector\(0\)$", r"\1", query.expr)) for query in expected]
        return [(panel, expr) for panel, expr in asked if not _numbers(stack.ask(expr))]

    eventually(lambda: not silent(), because=lambda: (silent(), stack.container("load").log()))


def test_the_replicas_to_choose_from_are_those_that_prometheus_knows(stack: Stack) -> None:
    found = {label: {s["metric"].get(label) for s in stack.ask(series.expr)} for series, label in choices()}
    assert found == {"namespace": {None}, "instance": {"carso:8000"}}


def test_the_attacked_share_of_the_load_shows_as_disagreement(stack: Stack) -> None:
    (disagreement,) = {query.expr for query in queries() if "agree=" in query.expr and "/" in query.expr}
    eventually(lambda: 0.02 < max(_numbers(stack.ask(disagreement))) < 0.3, because=lambda: stack.ask(disagreement))


def test_what_scales_the_service_returns_data_under_load(stack: Stack) -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    scaler = (ROOT / "k8s/components/autoscaling/scaled-object.yaml").read_text()
    exprs = [
        *re.findall(r"```promql\n(.+?)\n```", page, re.DOTALL),
        *re.findall(r"^ +query: (.+)$", scaler, re.MULTILINE),
    ]
    assert len(exprs) == 5
    for expr in exprs:
        eventually(lambda expr=expr: _numbers(stack.ask(expr)), because=lambda expr=expr: expr)


def test_no_alert_fires_that_this_load_does_not_deserve(stack: Stack) -> None:
    deserved = {"CarsoAttackEvidence", "CarsoDisagreement"}  # if it lasts: a part of the load is attacked
    deserved |= {"CarsoLatencyBudgetBurnsFast", "CarsoLatencyBudgetBurnsSlowly"}  # on a machine that is slow enough
    assert {series["metric"]["alertname"] for series in stack.ask('ALERTS{alertstate="firing"}')} <= deserved


def test_the_service_going_away_is_noticed(stack: Stack) -> None:
    stack.compose("stop", "carso")
    assert stack.container("carso").inspect()["State"]["ExitCode"] == 0
    eventually(lambda: stack.ask('ALERTS{alertname="CarsoDown"}'), because=lambda: stack.ask("up"))
    (down,) = (query.expr for query in queries() if query.panel == "Replicas that are down")
    assert _numbers(stack.ask(down)) == [1]
    (alerts,) = annotations()
    assert stack.ask(alerts.expr.replace("firing", "pending"))


def _numbers(result: list[dict[str, Any]]) -> list[float]:
    """The values of a result but NaN, which is what a quantile of nothing is."""
    values = [float(series["value"][1]) for series in result]
    return [value for value in values if value == value]
