"""What a disk says when it refuses, turned into what a user can do about it."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another directory"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another directory"),
    errno.EFBIG: ("the file would pass the size limit", "raise `ulimit -f` or choose another disk"),
    errno.EROFS: ("the file system is read-only", "choose a directory on a writable file system"),
    errno.EACCES: ("permission is denied", "choose a directory you may write to"),
    errno.EPERM: ("the operation is not permitted", "choose a directory you may write to"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.EIO: ("the disk reported an input/output error", "check the disk; choose another one"),
}


def as_storage_error(error: OSError, where: Path) -> StorageError | None:
    """The :class:`StorageError` for an OSError that means "cannot write here"; None for any other.

    EACCES and EPERM count only where the file is below ``where``: a checkpoint that may not be
    read is another problem.
    """
    refusal = _REFUSALS.get(error.errno or 0)
    if refusal is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM) and isinstance(error.filename, str):
        inside = os.path.realpath(error.filename).startswith(os.path.realpath(where))
        if not inside:
            return None
    found, hint = refusal
    name = error.filename if isinstance(error.filename, str) else str(where)
    return StorageError(f"cannot write {name}: {found}", hint=hint)


@contextmanager
def refusals(where: Path) -> Iterator[None]:
    """Turn a disk's refusal inside the block into a StorageError.

    Args:
        where: the directory being written to.

    Raises:
        StorageError: no space, quota, read-only, no permission, file too large.
    """
    try:
        yield
    except OSError as error:
        translated = as_storage_error(error, where)
        if translated is None:
            raise
        raise translated from error


def require_space(directory: Path, nbytes: int) -> None:
    """Refuse before writing ``nbytes`` that the file system has no room for.

    Raises:
        StorageError: fewer bytes are free than are needed.
    """
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise StorageError(
            f"{directory} has {free / 1e9:.2f} GB free and {nbytes / 1e9:.2f} GB are needed",
            hint="free some space or choose another directory",
        )
