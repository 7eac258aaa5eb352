"""The service with votes that cost as much time as a test says: python -m tests.paced [our options] serve ...

How long a count takes is a fact of the test then, and not one of the machine:

--per-second N  casts at most N votes a second. A request for a hundred thousand votes for each of 64 images is then
                under way for minutes on any machine.
--failing       every vote fails, as on a device that has gone bad. The self-test at the start still passes.
--cuda          the sessions call themselves CUDA's: tests/cuda.py says what that shows.

`vary(speed)` does to this process what the variable TEST_VOTE_SPEED asks for, to see that no test depends on the
machine: "slow" makes every vote take a hundred times as long; "fast", for servers only, gives long counts their votes
for nothing, all of them to class 0.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SLOW = 100  # times as long
FREE = 2000  # votes of one election in one round from which on a fast machine gives them for nothing
Vote = Callable[..., np.ndarray]


def vary(speed: str, *, per_second: float = 0, failing: bool = False) -> None:
    """Change how the sessions of this process vote. `speed` is "" (as they are), "fast" or "slow"."""
    if speed not in ("", "fast", "slow"):
        sys.exit(f"TEST_VOTE_SPEED: {speed!r} is not allowed; it must be fast or slow, or empty")
    if not (speed or per_second or failing):
        return
    from carso.inference.sessions import Sessions

    if speed == "fast" and not per_second:
        _no_latents_for_free_votes()
    Sessions.__init__ = building(speed, per_second=per_second, failing=failing)  # type: ignore[method-assign]


def building(speed: str = "", *, per_second: float = 0, failing: bool = False) -> Callable[..., None]:
    """What to put in the place of `Sessions.__init__`; the self-test that it ends with votes as ever."""
    from carso.inference.sessions import Sessions

    build = Sessions.__init__

    def built(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.vote = _paced(self.vote, speed, per_second=per_second, failing=failing)
        self.vote_and_purify = _apart(self)

    return built


def _apart(sessions: Any) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Paced votes, and purified images beside them, which cost what they cost."""

    def both(codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray, *, purified: int) -> Any:
        rows = len(latents) - purified
        votes = sessions.vote(codes, code_index[:rows], latents[:rows])
        return votes, sessions.purify(codes, code_index[rows:], latents[rows:])

    return both


def _paced(vote: Vote, speed: str, *, per_second: float, failing: bool) -> Vote:
    def cast(codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        if failing:
            raise RuntimeError("no more votes")
        began = time.monotonic()
        votes = vote_fast(codes, code_index, latents) if speed == "fast" else vote(codes, code_index, latents)
        took = time.monotonic() - began
        due = took * (SLOW if speed == "slow" else 1)
        if per_second:
            due = max(due, len(votes) / per_second)
        if due > took:
            select.select([], [], [], due - took)  # time.sleep fails where the wall clock is faked
        return votes

    def vote_fast(codes: np.ndarray, code_index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        if per_second:  # what it computes is of no account beside what it waits
            return np.zeros(len(latents), np.int64)
        free = np.bincount(code_index, minlength=len(codes))[code_index] >= FREE
        votes = np.zeros(len(latents), np.int64)
        if not free.all():
            votes[~free] = vote(codes, code_index[~free], latents[~free])
        return votes

    return cast


def _no_latents_for_free_votes() -> None:
    """Let one ballot hold as many votes as an election needs, and draw no latents for those that are free."""
    from carso.inference import vote
    from carso.inference.latents import Stream

    vote.LARGEST_BALLOT = 10**6
    draw = Stream.draw

    def drawn(self: Stream, out: np.ndarray) -> None:
        if len(out) < FREE:
            draw(self, out)

    Stream.draw = drawn  # type: ignore[method-assign]


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m tests.paced", allow_abbrev=False)
    parser.add_argument("--speed", default="")
    parser.add_argument("--per-second", type=float, default=0)
    parser.add_argument("--failing", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    ours, theirs = parser.parse_known_args()
    if ours.cuda:
        from tests.cuda import pretend

        pretend(setattr)
    vary(ours.speed, per_second=ours.per_second, failing=ours.failing)
    from carso.command import main as command

    sys.argv[1:] = theirs
    command()


if __name__ == "__main__":
    main()
