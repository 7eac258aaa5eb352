"""Many attacks on the same images, one after the other, each on those that withstood the ones before.

    <folder>/campaign.json                 what the folder's results belong to
    <folder>/<number>-<attack>-<batch>.npz rows, the attacked images of each, and which of them withstood

Every batch of every attack is on disk as soon as it is judged, so a campaign that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from carso_training import durable
from carso_training.datasets.examples import Examples
from carso_training.errors import RunError
from carso_training.robustness.figures import Settings, Tried
from carso_training.robustness.judges import Judge

ROUNDING = 1e-6  # of float32 in x + eps - x
Making = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Images [B, *shape], labels [B] and a generator on their device -> candidates [B, *shape]."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attack of a campaign."""

    name: str  # unique in the campaign, and safe in a file name
    make: Making
    settings: Settings = field(default_factory=dict)


CLEAN = Trial(name="clean", make=lambda images, labels, generator: images)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a campaign found. `tried` has the clean images first."""

    survived: Tensor  # [N] bool: correct before and after every attack
    clean: Tensor  # [N] bool: correct before
    tried: tuple[Tried, ...]
    seconds: float  # of all batches, whenever they were run


@dataclass(frozen=True, kw_only=True)
class Made:
    """One batch of one attack."""

    trial: int  # its number; 0 is no attack
    name: str  # of the attack
    rows: np.ndarray  # [B] int64, of the data set
    images: np.ndarray  # [B, *shape] float32, attacked
    survived: np.ndarray  # [B] bool
    seconds: float
    answers: Mapping[str, int]  # of a service, by name, to the requests that making and judging took


class Campaign:
    """Attacks of one strength on one set of images."""

    def __init__(
        self,
        folder: Path,
        *,
        data: Examples,
        rows: Tensor,
        eps: float,
        judge: Judge,
        seed: int,
        batch: int,
        belongs_to: Mapping[str, Any],
        device: torch.device,
        answers: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """`rows` [N]: the images of `data` that are attacked. `batch`: images attacked at once.
        `answers` tells what a service has answered since the last call, by name.

        `belongs_to` holds all that decides the results, as JSON. Raises RunError if the folder has results of something
        else, and OSError if it cannot be written.
        """
        self.folder, self.data, self.rows, self.eps = folder, data, rows, eps
        self.judge, self.seed, self.batch, self.device = judge, seed, batch, device
        self._answers = answers
        self._claim({**belongs_to, "eps": eps, "seed": seed, "batch": batch, "rows": rows.tolist()})

    def run(self, trials: Sequence[Trial], *, title: str, quiet: bool = False) -> Outcome:
        """Judge the clean images, then every trial on those that are left. Raises RunError and OSError.

        `title` stands before the progress bar; `quiet`: there is none.
        """
        alive = torch.ones(len(self.rows), dtype=torch.bool)
        clean, tried = alive.clone(), []

        def said(trial: Trial) -> str:
            return f"{title} {trial.name}: {int(alive.sum())} of {len(alive)} stand"

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet) as progress:
            bar = progress.add_task("", total=len(trials) + 1)
            for number, trial in enumerate((CLEAN, *trials)):
                places = alive.nonzero().squeeze(1)
                seconds, answers = 0.0, Counter[str]()
                for index, part in enumerate(places.split(self.batch) if len(places) else ()):
                    progress.update(bar, description=said(trial), completed=number + index * self.batch / len(places))
                    done = self._batch(number, trial, index, part)
                    alive[part] = torch.from_numpy(done.survived)
                    seconds += done.seconds
                    answers.update(done.answers)
                progress.update(bar, description=said(trial), completed=number + 1)
                tried.append(
                    Tried(
                        attack=trial.name,
                        settings=trial.settings,
                        attacked=len(places),
                        broken=len(places) - int(alive.sum()),
                        seconds=round(seconds, 2),
                        answers=dict(answers),
                    )
                )
                if trial is CLEAN:
                    clean = alive.clone()
        return Outcome(survived=alive, clean=clean, tried=tuple(tried), seconds=sum(each.seconds for each in tried))

    def _batch(self, number: int, trial: Trial, index: int, places: Tensor) -> Made:
        """Read the results of one batch, or make them."""
        path, rows = self.folder / f"{number:02}-{trial.name}-{index:03}.npz", self.rows[places]
        if path.exists():
            found = self._read(path)
            if not np.array_equal(found.rows, rows.numpy()):
                raise RunError(
                    f"{path} is of other images than those that are left. Remove {self.folder} and start again."
                )
            return found
        began = time.perf_counter()
        images = self.data.pixels(rows).to(self.device)
        labels = self.data.labels[rows].to(self.device)
        own = np.random.SeedSequence([self.seed, number, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(self.device).manual_seed(int(own) >> 1)
        candidates = trial.make(images, labels, generator).detach()
        self._hold(trial, candidates, images)
        survived = self.judge(candidates, labels, rows, number)
        answers = self._answers()
        seconds = time.perf_counter() - began
        with durable.replacing(path) as file:
            np.savez(
                file,
                rows=rows.numpy(),
                survived=survived.numpy(),
                images=candidates.cpu().numpy(),
                seconds=np.float64(seconds),
                answers=np.array(json.dumps(dict(answers))),
            )
        return Made(
            trial=number,
            name=trial.name,
            rows=rows.numpy(),
            images=candidates.cpu().numpy(),
            survived=survived.numpy(),
            seconds=seconds,
            answers=answers,
        )

    def made(self) -> Iterator[Made]:
        """Yield every batch that is on disk, the clean images first. Raises RunError if one is damaged."""
        for path in sorted(self.folder.glob("*.npz")):
            yield self._read(path)

    def _read(self, path: Path) -> Made:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return Made(
                    trial=int(path.name.partition("-")[0]),
                    name=path.stem.partition("-")[2].rpartition("-")[0],
                    rows=arrays["rows"],
                    images=arrays["images"],
                    survived=arrays["survived"],
                    seconds=float(arrays["seconds"]),
                    answers=json.loads(str(arrays["answers"])) if "answers" in arrays else {},  # older ones have none
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise RunError(f"{path} is damaged ({e}). Remove it; the same command then makes it again.") from None

    def _hold(self, trial: Trial, candidates: Tensor, images: Tensor) -> None:
        """See to it that no attack oversteps: its figure would be worth nothing."""
        moved = float((candidates - images).abs().max())
        inside = bool(((candidates >= 0) & (candidates <= 1)).all())  # False for NaN too
        allowed = 0.0 if trial is CLEAN else self.eps + ROUNDING
        if not inside or moved > allowed or candidates.shape != images.shape:
            raise RuntimeError(f"{trial.name} left the ball of eps {allowed} (moved {moved}) or the range [0, 1]")

    def _claim(self, mine: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, content = self.folder / "campaign.json", json.dumps(mine, indent=1, sort_keys=True) + "\n"
        if not path.exists():
            durable.write(path, content)
            return
        try:
            theirs = json.loads(path.read_bytes())
        except ValueError as e:
            raise RunError(f"{path} is damaged ({e}). Remove {self.folder} and start again.") from None
        if theirs != json.loads(content):
            differing = sorted(key for key in {*mine, *theirs} if theirs.get(key) != json.loads(content).get(key))
            raise RunError(
                f"{self.folder} has results of another measurement (it differs in {', '.join(differing)}). "
                "Give another folder with --out, or remove this one."
            )
