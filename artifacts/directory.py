"""Directories that appear whole or not at all.

Everything is written into a sibling of the destination, flushed, and renamed into place, so a
reader sees the old directory or the new one. A process that dies leaves a ``.partial-`` sibling,
which the next writer to the same destination removes; it is known to be dead because a live writer
holds the destination's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DestinationExists, PathEscape, UsageError
from ._rename import exchange, sync_directory, sync_tree
from .digest import open_regular
from .manifest import MANIFEST, MAX_BYTES, parse
from .storage import refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

REASON = "rejected.txt"
"""Why an artifact was rejected; lies in the rejected directory."""


class Staging:
    """A directory being written.

    Attributes:
        root: write here; on the destination's file system.
        destination: where :meth:`commit` puts it.
    """

    def __init__(self, root: Path, destination: Path, *, force: bool) -> None:
        self.root = root
        self.destination = destination
        self._force = force
        self._open = True

    def commit(self) -> Path:
        """Flush everything and rename it to the destination, which is returned.

        With ``force`` an artifact that is already there is swapped out in one step.

        Raises:
            DestinationExists: something appeared at the destination that must not be replaced.
            StorageError: the disk refused.
        """
        self._check_open()
        with refusals(self.destination.parent):
            _refuse_taken(self.destination, force=self._force)
            sync_tree(self.root)
            _place(self.root, self.destination)
        self._open = False
        return self.destination

    def reject(self, reason: str) -> Path:
        """Move everything to ``<destination>.rejected`` with the reason; the new place is returned.

        An older rejected directory is replaced. A directory of that name that modelport did not
        write is left alone, and a number is appended.
        """
        self._check_open()
        target = self.destination.with_name(self.destination.name + ".rejected")
        number = 2
        while os.path.lexists(target) and not _was_rejected(target):
            target = self.destination.with_name(f"{self.destination.name}.rejected-{number}")
            number += 1
        with refusals(self.destination.parent):
            (self.root / REASON).write_text(reason.rstrip("\n") + "\n", encoding="utf-8")
            sync_tree(self.root)
            _place(self.root, target)
        self._open = False
        return target

    def set_aside(self) -> None:
        """Make room: what was written waits beside, in place of what waited there before."""
        self._check_open()
        _remove(_aside(self.root))
        self.root.rename(_aside(self.root))
        self.root.mkdir()

    def restore(self) -> None:
        """Bring back what waits beside, in place of what was written since."""
        self._check_open()
        _remove(self.root)
        _aside(self.root).rename(self.root)

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("this staging directory was already committed or rejected")


@contextmanager
def stage(destination: Path, *, force: bool = False) -> Iterator[Staging]:
    """Write a directory so that it appears whole at ``destination``, or not at all.

    Leave the block through :meth:`Staging.commit` or :meth:`Staging.reject`; any other way out, an
    exception or Ctrl-C included, removes what was written and leaves the destination untouched.

    Args:
        destination: the directory to create; its parents are made.
        force: replace an artifact that is already there.

    Raises:
        DestinationExists: it is there and ``force`` was not given; or it is no modelport artifact
            (a file, a link, a directory with other data), which is never replaced; or another
            process is writing to it.
        StorageError: the disk refused a write inside the block.
    """
    absolute = Path.cwd() / destination
    # Not resolve(): a link at the destination itself must be seen as one.
    absolute = Path(os.path.normpath(absolute))
    if not absolute.name:
        raise DestinationExists(f"{absolute} cannot be written to", allowed="a new directory")
    parent = absolute.parent
    with refusals(parent):
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DestinationExists(
                f"{error.filename} is not a directory, so {absolute} cannot be made",
                hint="choose another directory",
            ) from error
        target = Path(os.path.realpath(parent)) / absolute.name
        with beside(target) as root:
            _refuse_taken(target, force=force)
            yield Staging(root, target, force=force)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``, for what is to be renamed there; by one writer at a time.

    What is in it when the block is left is removed, and so is what writers that died left behind.

    Raises:
        DestinationExists: another process is writing to the target.
    """
    with _lock(target) as held:
        if held:
            _recover(target)
        root = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        root.mkdir()
        try:
            yield root
        finally:
            # After a replacement this holds what was replaced, or nothing.
            _remove(root)
            _remove(_aside(root))


def _aside(root: Path) -> Path:
    name, _, tail = root.name.rpartition(".partial-")
    return root.with_name(f"{name}.aside-{tail}")


def _refuse_taken(destination: Path, *, force: bool) -> None:
    """Refuse a destination that may not be replaced."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise DestinationExists(
            f"{destination} exists",
            allowed="a directory that does not exist yet",
            hint="add --force to replace it, or choose another directory",
        )
    replaceable = (
        destination.is_dir()
        and not destination.is_symlink()
        and (_is_artifact(destination) or not any(destination.iterdir()))
    )
    if not replaceable:
        raise DestinationExists(
            f"{destination} is not a modelport artifact (it has no {MANIFEST} of modelport's), so "
            "--force does not replace it",
            allowed="a new directory, an empty one, or an artifact",
            hint="choose another directory",
        )


def _is_artifact(directory: Path) -> bool:
    """Whether a directory's manifest looks like ours: other programs call their own files so."""
    try:
        with os.fdopen(open_regular(directory / MANIFEST), "rb") as file:
            return {"schema", "format", "files"} <= set(parse(file.read(MAX_BYTES + 1)))
    except (OSError, PathEscape, UsageError):
        return False


def _was_rejected(directory: Path) -> bool:
    return (
        directory.is_dir() and not directory.is_symlink() and os.path.lexists(directory / REASON)
    )


def _place(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what was there ends up at ``source`` or is removed."""
    if not os.path.lexists(target):
        source.rename(target)
    elif not exchange(source, target):
        aside = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
        target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        sync_directory(target.parent)
        _remove(aside)
    sync_directory(target.parent)


def _recover(target: Path) -> None:
    """Finish or undo what writers to ``target`` that died left behind. The lock is held."""
    for aside in _siblings(target, "old"):
        if os.path.lexists(target):
            _remove(aside)
        else:  # killed between the two renames of a replacement
            aside.rename(target)
    for partial in (*_siblings(target, "partial"), *_siblings(target, "aside")):
        _remove(partial)


def _siblings(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.{kind}-"
    found = []
    for entry in os.scandir(target.parent):
        pid, _, token = entry.name.removeprefix(prefix).partition("-")
        ours = entry.name.startswith(prefix) and pid.isdecimal() and len(token) == 8
        if ours and entry.is_dir(follow_symlinks=False):
            found.append(Path(entry.path))
    return sorted(found)


def _remove(directory: Path) -> None:
    # A leftover that cannot be removed must not hide the error or the success that led here; the
    # next writer tries again.
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the destination's lock, or say who does. False on a file system that has no locks.

    The kernel drops the lock when its holder dies, kill -9 included. The file is removed while the
    lock is held; a writer that opened it before finds another file under the name and tries again.
    """
    path = target.with_name(f".{target.name}.lock")
    descriptor, held = _acquire(path, target)
    try:
        yield held
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, target: Path) -> tuple[int, bool]:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                current = path.lstat().st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                current = False
            if current:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor, True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                return descriptor, False  # without a lock nothing is swept: its writer may live
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                raise DestinationExists(
                    f"another process{f' ({holder})' if holder else ''} is writing to {target}",
                    hint="wait for it to finish, or choose another directory",
                ) from None
            raise
        os.close(descriptor)
