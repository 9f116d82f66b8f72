"""A repository in a local directory: ``file:///path[:tag]``."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts._rename import sync_directory
from ..artifacts.digest import open_regular
from ..artifacts.storage import refusals
from ..errors import DestinationUnreachable, UsageError
from .base import BLOCK, Item, Reference, changed
from .tree import TreeRepository

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class LocalRepository(TreeRepository):
    """Files appear by link or rename, after they and their directory are durable."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        if not reference.place.startswith("/"):
            raise UsageError(
                f"{reference} is not an absolute path", allowed="file:///path, with three slashes"
            )
        self.root = Path(reference.place)
        there = next(p for p in (self.root, *self.root.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise UsageError(
                f"{there} is a file", allowed="a directory, or one that does not exist yet"
            )

    def names(self, directory: str) -> list[str]:
        try:
            with _readable():
                return [entry.name for entry in os.scandir(self.root / directory)]
        except FileNotFoundError:
            return []

    def size(self, path: str) -> int | None:
        try:
            with _readable():
                return (self.root / path).stat().st_size
        except FileNotFoundError:
            return None

    def load(self, path: str, limit: int) -> bytes:
        with _readable(), os.fdopen(open_regular(self.root / path), "rb") as file:
            return file.read(limit)

    def blocks(self, path: str, start: int, size: int) -> Iterator[bytes]:
        with _readable(), os.fdopen(open_regular(self.root / path), "rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block

    def store(self, path: str, item: Item) -> None:
        with os.fdopen(open_regular(item.path), "rb") as source:
            self._write(path, iter(lambda: source.read(BLOCK), b""), item)

    def store_bytes(self, path: str, data: bytes) -> None:
        self._write(path, [data], None)

    def create(self, path: str, data: bytes) -> None:
        self._write(path, [data], None, exclusive=True)

    def _write(
        self, path: str, blocks: Iterable[bytes], item: Item | None, *, exclusive: bool = False
    ) -> None:
        target = self.root / path
        with refusals(self.root):
            _make_directories(target.parent)
            temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
            sha = hashlib.sha256()
            try:
                with temporary.open("xb") as file:
                    for block in blocks:
                        sha.update(block)
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                if item is not None and sha.hexdigest() != item.entry.sha256:
                    raise changed(item.path)
                _link(temporary, target) if exclusive else temporary.replace(target)
                sync_directory(target.parent)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DestinationUnreachable(
            f"cannot read {error.filename}: permission is denied",
            hint="ask its owner, or run as a user who may read it",
        ) from error


def _link(source: Path, target: Path) -> None:
    """Give a complete file its name unless that is taken; in one step, unlike open("x")."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without links: creation is exclusive, and a torn entry is passed over.
        with target.open("xb") as file:
            file.write(source.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _make_directories(directory: Path) -> None:
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


DESTINATION = LocalRepository
