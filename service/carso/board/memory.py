"""A piece of memory that several processes share, and a lock on it that the death of its holder sets free.

It is a file without a name, so no restart finds anything of an older one, and nothing is left behind by a process that
is killed. Workers inherit its descriptor.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform != "win32":  # which has no workers
    import fcntl


class Memory:
    """`bytes`, `doubles` and `integers` are three views of the same memory. It begins as zeros.

    A double or an integer is written by one instruction, so no reader sees half of one, whenever its writer is killed.
    """

    def __init__(self, descriptor: int) -> None:
        """Share the memory of a file by its descriptor."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)
        self.bytes = memoryview(self._map)
        self.doubles = self.bytes.cast("d")
        self.integers = self.bytes.cast("q")

    @classmethod
    def create(cls, size: int) -> Memory:
        """Make `size` bytes, a multiple of 8. Pages count as used memory once they are written to."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("carso-board")
            os.ftruncate(descriptor, size)
        else:  # macOS: a temporary file that has no name any more
            with tempfile.TemporaryFile() as file:
                file.write(bytes(size))  # not a hole: a full disk is noticed here, and not by a signal later
                file.flush()
                descriptor = os.dup(file.fileno())
        return cls(descriptor)

    @contextmanager
    def locked(self, lock: int) -> Iterator[None]:
        """Keep other processes out of what they do under the same `lock`, a number. Threads are not kept out.

        The kernel frees the lock if its holder dies.
        """
        while True:
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, lock)
                break
            except OSError as e:
                # The kernel takes a process for one thread. Where one of its threads waits for the holder of one lock,
                # and another has a second lock that this holder's other thread waits for, it sees a circle.
                if e.errno != errno.EDEADLK:
                    raise
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, lock)
