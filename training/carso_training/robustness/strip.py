"""A strip of images under adaptive attack: clean, attacked and purified, with what they are voted to be."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from carso.inference.sessions import Sessions

from carso_training import durable

VOTES = 100
COLUMNS = 10
ROWS = ("clean", "attacked", "purified")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One image of the strip."""

    label: int  # the true class
    clean: np.ndarray  # [channels, height, width] in [0, 1]
    attacked: np.ndarray  # the same shape
    fooled: bool  # whether the measurement's judge was


def chosen(columns: list[Column]) -> list[Column]:
    """Take at most COLUMNS of them, half of them that fool it where there are as many, of different classes first."""
    picked: list[Column] = []
    for fooled in (False, True):
        mine = [column for column in columns if column.fooled == fooled]
        firsts = list({column.label: column for column in reversed(mine)}.values())[::-1]
        rest = [column for column in mine if not any(column is first for first in firsts)]
        picked += [*firsts, *rest][: COLUMNS // 2]
    return picked


def write(
    path: Path, columns: list[Column], *, sessions: Sessions, latent: int, names: tuple[str, ...], seed: int
) -> None:
    """Draw the columns into a PNG file: over each image the elected class and its share of VOTES votes.

    `latent` is the size of a latent; the purified image of a column is that of its first vote. Raises OSError.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    latents = np.random.default_rng(seed).standard_normal((VOTES, latent), np.float32)
    with matplotlib.rc_context({"font.size": 8}):
        canvas = Canvas(figsize=(len(columns) * 0.9 + 0.4, 3.4), layout="constrained")
        axes = np.atleast_2d(canvas.subplots(len(ROWS), len(columns), squeeze=False))
        for place, column in enumerate(columns):
            pictures = {"clean": column.clean, "attacked": column.attacked}
            for row, what in enumerate(ROWS):
                ax = axes[row, place]
                if what in pictures:
                    codes = sessions.first_pass(pictures[what][None]).codes
                    votes = sessions.vote(codes, np.zeros(VOTES, np.int64), latents)
                    tally = np.bincount(votes, minlength=len(names))
                    elected = int(tally.argmax())
                    colour = "black" if elected == column.label else "red"
                    ax.set_title(f"{names[elected]}: {100 * tally[elected] / VOTES:.0f} %", color=colour, fontsize=8)
                    picture = pictures[what]
                else:
                    picture = sessions.purify(codes, np.zeros(1, np.int64), latents[:1])[0]  # of the attacked image
                ax.imshow(np.moveaxis(picture, 0, 2).squeeze(), cmap="gray", vmin=0, vmax=1)
                ax.set(xticks=[], yticks=[])
                if not place:
                    ax.set_ylabel(what)
        file = io.BytesIO()
        canvas.savefig(file, format="png", dpi=90, metadata={"Software": None})
    durable.write(path, file.getvalue())
