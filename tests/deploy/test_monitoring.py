"""Alerts, their runbook, the dashboard and what Grafana is given at start: whatever needs no daemon to be checked."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from carso.app import build
from carso.settings import Settings

from tests.deploy.dashboard import Query, annotations, choices, dashboard, queries
from tests.lifespan import started

yaml = pytest.importorskip("yaml", reason="pip install '.[deploy]'")
promql_parser = pytest.importorskip("promql_parser", reason="pip install '.[deploy]'")

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker/prometheus"
DIGIT = (ROOT / "docs/samples/1-clean.png").read_bytes()
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is missing")


# What there is only on a GPU, where the kernel tells it, where callers need keys, and with several workers
IF_ANY = ("carso_gpu_", "carso_cgroup_", "carso_caller_", "carso:throttled:", "carso_worker_restarts_total")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def everything_asked() -> list[Query]:
    return [*queries(), *annotations(), *(series for series, _ in choices())]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "docker/prometheus/prometheus.yml"),
        ("check", "rules", "--lint-fatal", "docker/prometheus/rules.yml"),
        ("test", "rules", "tests/deploy/alerts.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_has_a_section_of_the_runbook_and_a_test(alert: dict[str, Any]) -> None:
    url = alert["annotations"]["runbook_url"]
    default, anchor = re.fullmatch(
        r"{{ with \$externalLabels\.runbook }}{{ \. }}{{ else }}(http://\S+){{ end }}#(\w+)", url
    ).groups()
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert anchor in [title.lower() for title in sections]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]
    assets = next(option for option in compose["command"] if option.startswith("--web.user-assets="))
    page = f"./docs/runbook.md:{assets.partition('=')[2]}/{default.removeprefix('http://localhost:9090/user/')}:ro"
    assert page in compose["volumes"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert f'"{alert["alert"]}"' in (ROOT / "tests/deploy/alerts.yml").read_text()


def test_every_section_of_the_runbook_is_of_an_alert() -> None:
    sections = re.findall(r"^## (Carso\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]


@pytest.mark.parametrize("query", everything_asked(), ids=lambda query: query.panel)
def test_every_query_of_the_dashboard_is_promql(query: Query) -> None:
    promql_parser.parse(query.expr)


async def test_alerts_and_dashboard_use_only_metrics_that_the_service_or_a_rule_makes() -> None:
    made = {"up", "ALERTS"} | {rule["record"] for rule in rules() if "record" in rule}
    for bundle in ("mnist-conv", "mnist-certified"):  # one has samples, and the other proofs
        made |= await metrics_of(ROOT / "models" / bundle)
    asked = [query.expr for query in everything_asked()] + [rule["expr"] for rule in rules()]
    named = set(re.findall(r"\b(?:carso|process)[_:][\w:]+|\bup\b|\bALERTS\b", " ".join(asked)))
    assert {name for name in named if not name.startswith(IF_ANY)} <= made


async def metrics_of(bundle: Path) -> set[str]:
    """The names of the metrics of a service that has answered and refused."""
    app = build(Settings(bundle=bundle, device="cpu", threads=1)).app
    transport = httpx.ASGITransport(app)
    async with (
        started(app),
        httpx.AsyncClient(transport=transport, base_url="http://carso") as client,
    ):
        for path in ("/classify", "/classify/fast"):
            answer = await client.post(path, content=DIGIT, headers={"content-type": "image/png"})
            assert answer.status_code == 200
        assert (await client.post("/classify", content=b"")).status_code >= 400
        page = (await client.get("/metrics")).text
    return set(re.findall(r"^(\w+)[{ ]", page, re.MULTILINE))


def test_the_dashboard_is_one_that_grafana_can_provision() -> None:
    content = dashboard()
    assert content["uid"] == "carso"
    assert "id" not in content, "an id belongs to one Grafana"
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in content["panels"]]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in content["panels"])


def test_grafana_finds_what_its_provisioning_names() -> None:
    grafana, compose = ROOT / "docker/grafana", yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (source,) = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/carso.yml").read_text())["providers"]
    mounts = dict(reversed(volume.split(":")[:2]) for volume in compose["grafana"]["volumes"])
    folder = ROOT / mounts[provider["options"]["path"]]
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]
