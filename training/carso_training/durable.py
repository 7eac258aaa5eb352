"""Files that are either whole or not there, also after a crash or a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write(path: Path, content: bytes | str) -> None:
    """Replace the file by one with this content. Raises OSError, and then leaves the old file as it was."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, before_swap: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` once the block ends without an error.

    The content lies on the disk before the name changes hands. `before_swap` is called between the two. After an error
    the new file is removed, and the old one is as it was.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before_swap()
        part.replace(path)
    except BaseException as e:
        with suppress(OSError):
            part.unlink()
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(path)  # a failed write does not know where
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the operating system lets folders be opened (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
