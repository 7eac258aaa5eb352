"""Ask Marabou, a complete verifier, whether another label is possible in a box: run by tests/test_marabou.py.

Reads a JSON list of questions from standard input: `layers` ([weights, biases] of Linear layers with ReLU between
them), the box's ends `lower` and `upper`, and a `label`. Writes a JSON list to standard output, which says of each
whether another class scores at least as high as the label somewhere in the box.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from maraboupy import MarabouCore

OPTIONS = MarabouCore.Options()
OPTIONS._verbosity = 0


def refutable(question: dict[str, Any], other: int) -> bool:
    """Whether some point of the box gives class `other` a score that is at least the label's."""
    query = MarabouCore.InputQuery()
    layers, width = question["layers"], len(question["lower"])
    # the inputs; then for each layer its sums, and what ReLU makes of them
    query.setNumberOfVariables(width + sum(2 * len(biases) for _, biases in layers))
    before = list(range(width))
    for variable, low, high in zip(before, question["lower"], question["upper"], strict=True):
        query.markInputVariable(variable, variable)
        query.setLowerBound(variable, low)
        query.setUpperBound(variable, high)
    for index, (weights, biases) in enumerate(layers):
        sums = [width + place for place in range(len(biases))]
        width += 2 * len(biases)
        for row, bias, total in zip(weights, biases, sums, strict=True):
            equation = MarabouCore.Equation()
            for weight, variable in zip(row, before, strict=True):
                equation.addAddend(weight, variable)
            equation.addAddend(-1.0, total)
            equation.setScalar(-bias)
            query.addEquation(equation)
        if index + 1 < len(layers):
            before = [total + len(biases) for total in sums]
            for total, rectified in zip(sums, before, strict=True):
                MarabouCore.addReluConstraint(query, total, rectified)
        else:
            wins = MarabouCore.Equation(MarabouCore.Equation.GE)
            wins.addAddend(1.0, sums[other])
            wins.addAddend(-1.0, sums[question["label"]])
            wins.setScalar(0.0)
            query.addEquation(wins)
    outcome, *_ = MarabouCore.solve(query, OPTIONS, "")
    if outcome not in ("sat", "unsat"):
        raise SystemExit(f"Marabou gives no answer: {outcome}")
    return outcome == "sat"


if __name__ == "__main__":
    answers = [
        any(refutable(each, other) for other in range(len(each["layers"][-1][1])) if other != each["label"])
        for each in json.load(sys.stdin)
    ]
    json.dump(answers, sys.stdout)
