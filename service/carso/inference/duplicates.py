"""Is an image nearly one that the same caller sent before?

Whoever attacks without the weights searches by queries: a decision-based attack asks about hundreds of images that lie
close together round one of them. Clean images of different things do not. So the codes of the images that a caller sent
lately are remembered, and an image is a *near-duplicate* if its code is within the bundle's distance of one of them.
The idea is that of Stateful Detection (Chen et al., 2019, arXiv:1907.05587) and Blacklight (Li et al., 2020,
arXiv:2006.14042). The code is a good place to compare images: it holds what the purifier needs of an image, and small
changes of pixels move it little.

The very same image again is a repeat, and gets the verdict that it got the first time: clients send again what got no
answer, and probes send one image for ever. A repeat is not remembered twice.

Memory is bounded: REMEMBERED images of each of CALLERS callers, 4 bytes for each number of a code and 13 more an image.
The oldest image of a caller is forgotten first, and so is the caller who was silent for longest.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np

REMEMBERED = 1000  # images of one caller
CALLERS = 128
_DIGEST_BYTES = 8


class Recent:
    """The images that each caller sent lately. For use by one thread."""

    def __init__(self, *, distance: float, code: int, remembered: int = REMEMBERED, callers: int = CALLERS) -> None:
        """`distance`: nearer codes are near-duplicates, in Euclidean distance. `code`: the numbers of a code.
        `remembered`: images of each caller, at most. `callers`: that are known at once, at most.
        """
        self._limit = distance**2
        self._code = code
        self._remembered = remembered
        self._callers = callers
        self._of: dict[str, _Images] = {}  # the caller who was silent for longest first
        self._key = secrets.token_bytes(16)  # so that nobody can make two images of one digest

    def is_near(self, caller: str, image: np.ndarray, code: np.ndarray) -> bool:
        """Return whether `image` [*shape] with this `code` [code] is nearly an earlier one of `caller`; remember it."""
        earlier = self._of.pop(caller, None)
        if earlier is None:
            if len(self._of) == self._callers:
                del self._of[next(iter(self._of))]
            earlier = _Images(self._remembered, self._code)
        self._of[caller] = earlier
        digest = hashlib.blake2b(image.tobytes(), digest_size=_DIGEST_BYTES, key=self._key).digest()
        return earlier.is_near(int.from_bytes(digest), code, self._limit)


class _Images:
    """The images that one caller sent lately."""

    def __init__(self, most: int, code: int) -> None:
        self._codes = np.empty((most, code), np.float32)  # the system gives memory when it is written to
        self._squares = np.empty(most, np.float32)  # of their lengths
        self._digests = np.empty(most, np.uint64)
        self._verdicts = np.empty(most, np.bool_)
        self._seen = 0  # images, those forgotten included

    def is_near(self, digest: int, code: np.ndarray, limit: float) -> bool:
        known = min(self._seen, len(self._codes))
        if len(same := np.flatnonzero(self._digests[:known] == digest)):
            return bool(self._verdicts[same[0]])
        square = code @ code
        # |a - b|^2 by one product of a matrix, which takes a tenth of the time of the differences themselves
        near = bool((self._squares[:known] - 2 * (self._codes[:known] @ code) + square < limit).any())
        place = self._seen % len(self._codes)
        self._codes[place], self._squares[place] = code, square
        self._digests[place], self._verdicts[place] = digest, near
        self._seen += 1
        return near
