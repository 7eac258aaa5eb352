"""Waiting for what a test is about, and never for a time that should be enough.

How soon something happens depends on the machine; that it happens does not. So a test looks again and again, and only a
service that never gets there fails it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 120.0  # seconds: far more than a loaded machine takes, and reached by failures only
PAUSE = 0.01  # seconds between two looks

T = TypeVar("T")


def eventually(look: Callable[[], T]) -> T:
    """Call `look` until it returns something true, and return that.

    An AssertionError of `look` means "not yet"; the last one is raised when patience is over.
    """
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            if found := look():
                return found
            failure = AssertionError(f"it never came true: the last look found {found!r}")
        except AssertionError as e:
            failure = e
        if time.monotonic() > give_up:
            raise failure
        time.sleep(PAUSE)


def comes_to(look: Callable[[], T], expected: T) -> None:
    """Call `look` until it returns what is expected. Says what it returned instead when patience is over."""

    def same() -> bool:
        found = look()
        assert found == expected
        return True

    eventually(same)
