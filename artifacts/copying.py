"""Copying bytes between files without taking them through this process where the kernel can."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .storage import refusals, require_space

if TYPE_CHECKING:
    from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h
_BLOCK = 1 << 20
_STEP = 1 << 30  # copy_file_range copies at most 2 GiB - 4 KiB a call
_UNSUPPORTED = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EBADF)


def copy_file(source: Path, target: Path) -> str:
    """Copy a file: share its blocks where the file system can, else copy in the kernel, else here.

    Never makes a hard link: ONNX readers refuse one, and a change to either name would change both.
    A link at ``source`` is followed (the hub's cache is made of them).

    Returns:
        ``reflink``, ``kernel`` or ``buffer``: how the bytes came over.

    Raises:
        CheckpointError: the source is not a regular file, or was cut short while being copied.
        FileExistsError: the target exists.
        StorageError: the disk refused.
    """
    with refusals(target.parent):
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(reader)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{source} is not a regular file")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            writer = os.open(target, flags, 0o644)
            try:
                if _clone(reader, writer):
                    return "reflink"
                require_space(target.parent, status.st_size)
                return copy_range(reader, writer, 0, status.st_size, source)
            except BaseException:
                with contextlib.suppress(OSError):
                    target.unlink()
                raise
            finally:
                os.close(writer)
        finally:
            os.close(reader)


def copy_range(reader: int, writer: int, offset: int, length: int, source: Path) -> str:
    """Append ``length`` bytes of ``reader`` from ``offset`` at the writer's position.

    Returns:
        ``kernel`` or ``buffer``.

    Raises:
        CheckpointError: the source ends early.
    """
    how = "kernel"
    while length:
        count = _kernel_copy(reader, writer, offset, min(length, _STEP)) if how == "kernel" else 0
        if not count:
            how = "buffer"
            count = _buffer_copy(reader, writer, offset, min(length, _BLOCK))
        if not count:
            raise CheckpointError(
                f"{source} ends at byte {offset}, {length} bytes early",
                hint="it changed while being read: fetch the checkpoint again",
            )
        offset += count
        length -= count
    return how


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of a C-contiguous buffer; one call may write less than asked."""
    view = data.cast("B") if data.nbytes else data
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def _clone(reader: int, writer: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError:  # another file system, or one that cannot: the copy that follows reports more
        return False
    return True


def _kernel_copy(reader: int, writer: int, offset: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(reader, writer, length, offset)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise


def _buffer_copy(reader: int, writer: int, offset: int, length: int) -> int:
    block = os.pread(reader, length, offset)
    write_all(writer, memoryview(block))
    return len(block)
