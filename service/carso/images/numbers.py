"""The sources of images, before they are read, and how nested lists of numbers become an array."""

from __future__ import annotations

from typing import Any

import numpy as np

from carso.complaints import shown
from carso.errors import NotNumbers, RaggedArray

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
)

Source = bytes | np.ndarray | Any  # an encoded image; an array; nested lists, or any other JSON value, which is refused


def from_lists(source: Source) -> np.ndarray:
    """Return nested lists of numbers as an array of floating point or bool. Raises NotNumbers, RaggedArray.

    JSON makes no difference between 1 and 1.0, so whole numbers are values in the bundle's range like all others.
    """
    if not isinstance(source, list):
        raise NotNumbers(f"{shown(source)} is neither nested lists of numbers nor a base64 string")
    try:
        array = np.array(source)
    except ValueError:
        raise RaggedArray("the nested lists are of unequal lengths: every row must have as many values") from None
    if array.dtype.kind not in "biuf":
        raise NotNumbers("the nested lists hold something other than numbers of ordinary size: send numbers only")
    return array if array.dtype.kind == "b" else array.astype(np.float64, copy=False)
