"""Parse a .npy file to an array, from its header and its bytes alone.

Nothing is unpickled, and nothing is allocated because the header says so.
"""

from __future__ import annotations

import io
from math import prod

import numpy as np
from numpy.lib import format as npy_format

from carso.errors import ObjectArray, UndecodableNpy, UnsupportedDtype
from carso.images.numbers import DTYPES

SIGNATURE = b"\x93NUMPY"
MAX_HEADER = 1024  # characters; np.save writes 118 for any plain array


def parse(data: bytes) -> np.ndarray:
    """Return the array, read-only, as one of DTYPES in native byte order.

    Raises UndecodableNpy, ObjectArray, UnsupportedDtype.
    """
    file = io.BytesIO(data)
    try:
        version = npy_format.read_magic(file)
        read_header = {
            (1, 0): npy_format.read_array_header_1_0,
            (2, 0): npy_format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(file, max_header_size=MAX_HEADER)
    except Exception as e:  # the header is a Python literal: hostile ones fail in many ways
        raise UndecodableNpy(f"this is not a .npy file ({type(e).__name__}: {e}): write it with numpy.save") from None
    if dtype.hasobject:
        raise ObjectArray("the array holds Python objects, which would have to be unpickled: save plain numbers")
    if dtype.newbyteorder("=").name not in DTYPES:
        raise UnsupportedDtype(f"the array is of type {dtype}: send {', '.join(DTYPES)}")
    found, due = len(data) - file.tell(), prod(shape) * dtype.itemsize
    if found != due or min(shape, default=0) < 0:
        raise UndecodableNpy(
            f"the header promises shape {shape} of {dtype}, which is {due} bytes, but {found} bytes follow it: send "
            "the whole file, and nothing after it"
        )
    array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
