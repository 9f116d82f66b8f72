"""A repository on any file system that fsspec knows: ``s3://bucket/path[:tag]`` and others.

Credentials come from the environment or the configuration files of each service's own tools; none
is taken from a URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from typing import TYPE_CHECKING, Any

from ..artifacts.digest import open_regular
from ..errors import BackendUnavailable, UsageError
from .base import BLOCK, Item, Reference, changed
from .tree import TreeRepository

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What is written to these becomes visible when it is closed, whole. Elsewhere: write, then rename.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})
_CREATES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
_BOTO = {"retries": {"max_attempts": 1, "mode": "standard"}, "connect_timeout": 20,
         "read_timeout": 60}
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
           "adl": "azure", "sftp": "sftp", "ssh": "sftp"}
# No listings cache: what others publish meanwhile must be seen.
_OPTIONS: dict[str, dict[str, Any]] = {
    **{scheme: {"use_listings_cache": False} for scheme in _OBJECT_STORES - {"memory"}},
    **{scheme: {"use_listings_cache": False, "config_kwargs": _BOTO} for scheme in ("s3", "s3a")},
}


class FileSystemRepository(TreeRepository):
    """The operations of :class:`.tree.TreeRepository` through fsspec."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        try:
            import fsspec
        except ImportError as error:
            raise _absent(reference.scheme, error) from error
        known = fsspec.available_protocols()
        if reference.scheme not in known:
            raise UsageError(
                f"nothing here knows the scheme {reference.scheme}",
                allowed="file, oci, hf, triton, s3, gs, az, sftp, or another of fsspec's",
            )
        self._opened: Any = None
        self._root = ""

    @property
    def _fs(self) -> Any:
        """The file system; connected on first use, where :mod:`.retry` can ask again."""
        if self._opened is None or not self._alive():
            url = f"{self.reference.scheme}://{self.reference.place}"
            try:
                self._opened, root = self._open(url)
            except ImportError as error:
                raise _absent(self.reference.scheme, error) from error
            if hasattr(self._opened, "retries"):
                self._opened.retries = 1  # .retry asks again, and says so
            self._root = str(root).rstrip("/")
        return self._opened

    def _open(self, url: str) -> tuple[Any, str]:
        """Connect; the file system and the path in it that a URL means."""
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(
            url, **_OPTIONS.get(self.reference.scheme, {})
        )
        return found

    def _alive(self) -> bool:
        """Whether the connection that was made can still be used."""
        return True

    def names(self, directory: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(directory), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [str(path).rpartition("/")[2] for path in found]

    def size(self, path: str) -> int | None:
        try:
            info: Any = self._fs.info(self._path(path))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def load(self, path: str, limit: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path(path), start=0, end=limit)
        return data

    def blocks(self, path: str, start: int, size: int) -> Iterator[bytes]:
        while start < size:
            block = self._fs.cat_file(
                self._path(path), start=start, end=min(start + BLOCK, size)
            )
            if not block:
                return
            yield block
            start += len(block)

    def store(self, path: str, item: Item) -> None:
        with os.fdopen(open_regular(item.path), "rb") as source:
            digest = self._write(path, iter(lambda: source.read(BLOCK), b""))
        if digest != item.entry.sha256:
            self._fs.rm_file(self._path(path))
            raise changed(item.path)

    def store_bytes(self, path: str, data: bytes) -> None:
        self._write(path, [data])

    def create(self, path: str, data: bytes) -> None:
        target = self._path(path)
        self._make_parent(target)
        if self.reference.scheme in _CREATES:
            self._fs.pipe_file(target, data, mode="create")
            return
        try:
            with self._fs.open(target, "xb") as file:
                file.write(data)
        except (NotImplementedError, ValueError):
            # Not exclusive between the two calls; reading back afterwards catches most of that.
            self._fs.pipe_file(target, data, mode="create")

    def _write(self, path: str, blocks: Iterable[bytes]) -> str:
        target = self._path(path)
        direct = self.reference.scheme in _OBJECT_STORES
        written = target if direct else f"{target}.partial-{secrets.token_hex(4)}"
        self._make_parent(target)
        sha = hashlib.sha256()
        file = self._fs.open(written, "wb", block_size=BLOCK)
        try:
            for block in blocks:
                sha.update(block)
                file.write(block)
            file.close()
        except BaseException:
            _abandon(file)
            raise
        if not direct:
            self._fs.mv(written, target)
        return sha.hexdigest()

    def _make_parent(self, target: str) -> None:
        if self.reference.scheme not in _OBJECT_STORES:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)

    def _path(self, path: str) -> str:
        assert self._fs is not None  # connected: only then is the root known
        return f"{self._root}/{path}"


def _abandon(file: Any) -> None:
    """Drop what was written: closing would make a part of the file visible under its full name."""
    with contextlib.suppress(Exception):
        file.discard()
    # paramiko's files have a property there, and would write once more when they are collected
    setattr(file, "_closed" if hasattr(file, "_closed") else "closed", True)


def _absent(scheme: str, error: ImportError) -> BackendUnavailable:
    return BackendUnavailable(
        f"{scheme}: needs a package that is not installed ({error.name or error})",
        hint=f'pip install "modelport[{_EXTRAS.get(scheme, "publish")}]"',
    )


DESTINATION = FileSystemRepository
