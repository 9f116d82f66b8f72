"""Renames with the guarantees that :mod:`.directory` needs, and durable small writes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

# linux/fs.h; renameat2(2)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@cache
def _renameat2() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the kernel or the file system cannot.

    Raises:
        OSError: the swap is supported and failed.
    """
    call = _renameat2()
    if call is None:
        return False
    import ctypes

    result = call(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Make every file and every name below ``root`` durable, the deepest directories first."""
    for current, _, files in os.walk(root, topdown=False):
        for name in files:
            path = Path(current, name)
            if path.is_symlink():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(current))


def write_durable(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step; a reader sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
