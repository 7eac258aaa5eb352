"""Which precision the votes have, and why."""

from __future__ import annotations

from carso.bundle import Recount
from carso.choices import CPU, PrecisionAsked
from carso.inference.abilities import Choice
from carso.inference.processors import multiplies_bytes

WORSE = 0.5  # percent of the images: the most that int8 may cost, of clean and of attacked ones


def chosen(asked: PrecisionAsked, recounts: tuple[Recount, ...], *, provider: str) -> Choice:
    """Return the precision of the votes on an execution provider.

    `auto` is int8 on a CPU with 8-bit dot products, if the bundle's `recounts` say that it costs next to nothing, and
    float32 otherwise. `recounts` is empty for a bundle without a graph in int8.
    """
    if asked != "auto":
        return Choice(asked, "it was asked for")
    if provider != CPU:
        return Choice("float32", "votes are cast in float32 on a GPU unless tf32 is asked for")
    if not multiplies_bytes():
        return Choice("float32", "this CPU has no 8-bit dot products, or does not tell")
    if {recount.threat.sees for recount in recounts} != {"nothing", "system"}:
        return Choice("float32", "the bundle has no measurement of int8 on clean and on adaptively attacked images")
    measured = ", ".join(
        f"{_gain(recount):+.1f} % {f'at eps {recount.threat.eps:.2f}' if recount.threat.eps else 'clean'}"
        for recount in recounts
    )
    if min(map(_gain, recounts)) < -WORSE:
        return Choice("float32", f"int8 costs this bundle too much accuracy ({measured})")
    return Choice("int8", f"this CPU has 8-bit dot products, and int8 costs this bundle no accuracy ({measured})")


def _gain(recount: Recount) -> float:
    """Return how many more images int8 gets right, in percent of all; negative: fewer."""
    return 100 * (recount.correct_int8 - recount.correct_float32) / recount.images
