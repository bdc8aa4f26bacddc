"""Opening files that may be anything, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError


@contextmanager
def opened(path: Path, most: int) -> Iterator[BinaryIO]:
    """Opens a regular file of at most `most` bytes for reading; ValueError for another kind of file, or a larger one.

    A pipe, a device or a link to one is refused without waiting for it.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > most:
            raise ValueError(f"{found.st_size:,} bytes, larger than the limit of {most:,}")
        yield file


def read_bytes(path: Path, most: int) -> bytes:
    """Returns the content of a regular file; ValueError as `opened`, also for a file that grows meanwhile."""
    with opened(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than the limit of {most:,} bytes")
    return content


@contextmanager
def locked(path: Path, *, folder: bool = False) -> Iterator[None]:
    """Holds a lock while the block runs: on a folder, made if there is none, or on a file made for the lock alone.

    FormatError if another run holds it; that of a killed run is free. At the end the file is removed, or the folder if it is
    empty.
    """
    while True:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        handle = os.open(
            path, os.O_CLOEXEC | (os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT), 0o666
        )
        try:
            if not lock(handle):
                raise FormatError(
                    f"{path}: another run of sodaprof is writing there. Wait until it ends, or choose another name."
                )
            if not is_open(path, handle):
                continue  # another run has just ended, which removed or renamed it
            try:
                yield
                return
            finally:
                if is_open(path, handle):
                    with suppress(OSError if folder else FileNotFoundError):  # a folder that is not empty stays
                        (path.rmdir if folder else path.unlink)()
        finally:
            os.close(handle)


def is_open(path: Path, handle: int) -> bool:
    """Whether the path is still that of the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def lock(handle: int) -> bool:
    """Locks an open file unless another run has; returns whether it did. The lock ends with the process, if not before."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
