"""What interval bounds prove, Marabou proves too: a complete verifier, which shares nothing with this project."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from carso_training.networks import bounds
from carso_training.networks.bounds import Box, box_of, margins
from torch import nn

from tests.environments import python_with
from tests.test_bounds import line

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROGRAM = Path(__file__).parent / "marabou.py"
LEAST = 1e-3  # margins of less are within Marabou's own tolerance


def proven(*, networks: int) -> list[dict[str, Any]]:
    """Images of small random networks whose label is proven, as questions to Marabou."""
    questions = []
    for seed in range(networks):
        torch.manual_seed(seed)
        layers, images = line(6, 9, 8, 4), torch.rand(12, 6)
        eps = torch.linspace(0.01, 0.2, len(images))
        with torch.no_grad():
            labels = nn.Sequential(*layers)(images).argmax(dim=1)
            box = box_of(images, eps)
            found = margins(layers, box, labels, slack=True)
            found.scatter_(1, labels.unsqueeze(1), torch.inf)
        for row in (found.min(dim=1).values > LEAST).nonzero().flatten().tolist():
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            questions.append(
                {
                    "layers": [[layer.weight.tolist(), layer.bias.tolist()] for layer in linear],
                    "lower": box.lower[row].tolist(),
                    "upper": box.upper[row].tolist(),
                    "label": int(labels[row]),
                }
            )
    return questions


def refuted(questions: list[dict[str, Any]]) -> list[bool]:
    """Whether Marabou finds another label in each box."""
    command = [python_with("maraboupy==2.0.0", "numpy<2"), PROGRAM]
    asked = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, check=True)
    answers: list[bool] = json.loads(asked.stdout.splitlines()[-1])
    return answers


def test_marabou_finds_no_other_label_in_a_box_that_is_proven():
    questions = proven(networks=12)
    assert len(questions) > 30
    assert not any(refuted(questions))


def test_marabou_finds_another_label_where_a_radius_without_absolute_weights_proves_too_much(monkeypatch):
    def wrong(layer: nn.Linear, box: Box, slack: bool) -> Box:
        centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
        centre, radius = layer(centre), F.linear(radius, layer.weight)
        return Box(centre - radius.abs(), centre + radius.abs())

    monkeypatch.setitem(bounds.RULES, nn.Linear, wrong)
    assert any(refuted(proven(networks=12)))
