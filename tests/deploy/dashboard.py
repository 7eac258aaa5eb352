"""What the dashboard asks of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docker/grafana/dashboards/carso.json"
VARIABLES = {"$namespace": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "5m"}


@dataclass(frozen=True)
class Query:
    panel: str
    expr: str  # with the dashboard's variables filled in


def dashboard() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def queries() -> Iterator[Query]:
    """Those of the panels."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], _filled_in(target["expr"]))


def annotations() -> Iterator[Query]:
    """What is marked in every panel."""
    for annotation in dashboard()["annotations"]["list"]:
        yield Query(annotation["name"], _filled_in(annotation["expr"]))


def choices() -> Iterator[tuple[Query, str]]:
    """The series that a variable's choices are taken from, and the label that has them."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
            yield Query(variable["label"], _filled_in(series)), label


def _filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr
