"""What the dashboard asks of Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docker/grafana/dashboards/carso.json"
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "5m"}


@dataclass(frozen=True)
class Query:
    panel: str
    expr: str  # with the dashboard's variables filled in


def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def queries() -> Iterator[Query]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            yield Query(panel["title"], expr)
