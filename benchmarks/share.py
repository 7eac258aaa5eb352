"""Votes needed against the leader's share, as docs/votes.png: python -m benchmarks.share

No networks: elections of 1500 votes with a given leader, in random order, counted by the rule in the engine's ballots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import typer
from carso.inference.vote import StoppingRule
from rich.progress import track

from benchmarks.replay import replay
from benchmarks.report import progress_console

SAMPLES, CLASSES = 1500, 10
RISKS = {1e-2: "risk 0.01", 1e-3: "risk 0.001", 1e-6: "risk 0.000001", 0.0: "exact"}
ONE_RIVAL = np.linspace(0.50, 1.00, 51)  # the leader's share, all other votes being one rival's
MANY_RIVALS = np.linspace(0.12, 1.00, 45)  # the others being spread evenly


def election(share: float, *, rivals: int) -> np.ndarray:
    """All votes of an election in which class 0 has `share` of them, and at least one more than any other: [1500]."""
    leader = max(round(share * SAMPLES), -(-SAMPLES // (rivals + 1)) + 1)
    others = np.arange(SAMPLES - leader) % rivals + 1
    return np.concatenate([np.zeros(leader, np.int64), others])


def mean_votes(share: float, *, rivals: int, rule: StoppingRule, trials: int, draws: np.random.Generator) -> float:
    """Over the order of the votes; the leader is the class that was expected."""
    votes = election(share, rivals=rivals)
    return float(np.mean([replay(draws.permutation(votes).tolist(), rule, expected=0).votes for _ in range(trials)]))


def main(
    *,
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("docs/votes.png"),
    trials: Annotated[int, typer.Option(min=1, help="Elections per point.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    draws = np.random.default_rng(seed)
    mpl.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    sides = (("all others to one rival", 1, ONE_RIVAL), ("others spread over nine rivals", CLASSES - 1, MANY_RIVALS))
    steps = [(panel, side, risk) for panel, side in zip(panels, sides, strict=True) for risk in RISKS]
    for panel, (title, rivals, shares), risk in track(steps, description="counting", console=progress_console):
        rule = StoppingRule(SAMPLES, CLASSES, risk)
        needed = [mean_votes(share, rivals=rivals, rule=rule, trials=trials, draws=draws) for share in shares]
        panel.plot(100 * shares, needed, label=RISKS[risk])
        _dress(panel, title)
    panels[0].set_ylabel("votes cast, mean")
    panels[1].legend(frameon=False)
    figure.savefig(out, dpi=150)
    print(out)


def _dress(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("the leader's share of all 1500 votes, %")
    panel.set_yscale("log")
    ticks = (15, 30, 100, 300, 1000, 1500)
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    typer.run(main)
