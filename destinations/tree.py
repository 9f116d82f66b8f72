"""A repository as files in a tree; everything but the two ways to write is shared.

    blobs/sha256/<hex>      every file and every release record, under its own digest
    tags/<tag>/<number>     what the tag points at; the highest number counts

Nothing is ever changed or replaced: moving a tag is creating the next number, which only one
publisher can. The numbers below are the tag's history.
"""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from typing import TYPE_CHECKING

from ..artifacts.release import entry_of
from ..errors import DigestMismatch, TagMoved
from .base import Head, Item, Repository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..artifacts import FileEntry
    from ..artifacts.release import Release

_MAX_RECORD = 16 << 20
_MAX_POINTER = 1 << 12
_DIGITS = 8


class TreeRepository(Repository):
    """What a file system must provide, and a repository made of it."""

    @abstractmethod
    def names(self, directory: str) -> list[str]:
        """Names of the files in a directory; none where it does not exist."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None where there is none."""

    @abstractmethod
    def load(self, path: str, limit: int) -> bytes:
        """A small file, or as many bytes of it."""

    @abstractmethod
    def blocks(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """A file's bytes from ``start`` to ``size``, in pieces."""

    @abstractmethod
    def store(self, path: str, item: Item) -> None:
        """Write a file, replacing; it appears whole or not at all, and is the item's bytes."""

    @abstractmethod
    def store_bytes(self, path: str, data: bytes) -> None:
        """:meth:`store` of bytes in memory."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Write a new file.

        Raises:
            FileExistsError: it is there.
        """

    def head(self, tag: str) -> Head | None:
        if tag.startswith("sha256:"):
            return self._pinned(tag)
        numbers = self._numbers(tag)
        return self._at(tag, numbers)

    def has(self, item: Item) -> bool:
        return self.size(_blob(item.entry.sha256)) == item.entry.size

    def send(self, item: Item) -> None:
        self.store(_blob(item.entry.sha256), item)

    def read(self, name: str, entry: FileEntry, start: int) -> Iterator[bytes]:
        path = _blob(entry.sha256)
        try:
            yield from self.blocks(path, start, entry.size)
        except FileNotFoundError:
            raise DigestMismatch(
                f"{self.reference} lacks {name} (sha256 {entry.sha256})",
                hint="publish it again",
            ) from None

    def mend(self, record: bytes) -> None:
        self.store_bytes(_blob(entry_of(record).sha256), record)

    def point(self, tag: str, release: Release, record: bytes, expected: Head | None) -> Head:
        entry = entry_of(record)
        if self.size(_blob(entry.sha256)) != entry.size:
            self.store_bytes(_blob(entry.sha256), record)
        last = max(self._numbers(tag), default=0)
        if (expected.version if expected else "0") != str(self._effective(tag)):
            raise TagMoved(f"the tag {tag} moved")
        path = f"tags/{tag}/{last + 1:0{_DIGITS}}"
        # The random part tells our entry from another publisher's, where the file system let both
        # create it.
        pointer = {"release": entry.sha256, "size": entry.size, "writer": secrets.token_hex(8)}
        data = json.dumps(pointer, sort_keys=True).encode() + b"\n"
        try:
            self.create(path, data)
        except FileExistsError:
            raise TagMoved(f"the tag {tag} moved") from None
        if self.load(path, len(data)) != data:
            raise TagMoved(f"the tag {tag} moved")
        return Head(record, f"sha256:{entry.sha256}", str(last + 1))

    def _numbers(self, tag: str) -> list[int]:
        found = (name for name in self.names(f"tags/{tag}") if name.isdecimal())
        return sorted(int(name) for name in found if len(name) == _DIGITS)

    def _effective(self, tag: str) -> int:
        head = self.head(tag)
        return int(head.version) if head else 0

    def _at(self, tag: str, numbers: list[int]) -> Head | None:
        # An entry that was cut short (possible only where creation is not atomic) never counted.
        for number in reversed(numbers):
            try:
                path = f"tags/{tag}/{number:0{_DIGITS}}"
                pointer = json.loads(self.load(path, _MAX_POINTER))
                digest, size = str(pointer["release"]), int(pointer["size"])
            except (ValueError, KeyError, TypeError):
                continue
            return Head(self._record(digest, size), f"sha256:{digest}", str(number))
        return None

    def _pinned(self, pin: str) -> Head | None:
        digest = pin.removeprefix("sha256:")
        size = self.size(_blob(digest))
        return None if size is None else Head(self._record(digest, size), pin, digest)

    def _record(self, digest: str, size: int) -> bytes:
        data = self.load(_blob(digest), size) if 0 <= size <= _MAX_RECORD else b""
        if entry_of(data).sha256 != digest:
            raise DigestMismatch(
                f"the release record sha256:{digest} in {self.reference} is damaged",
                hint="publish again with --resend",
            )
        return data


def _blob(digest: str) -> str:
    return f"blobs/sha256/{digest}"
