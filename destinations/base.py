"""What a destination is: a few operations on named bytes, and one on a tag."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ..errors import DigestMismatch, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from ..artifacts import Artifact, FileEntry
    from ..artifacts.release import Release

DEFAULT_TAG = "latest"
PREVIOUS = "previous"
"""As a tag: the release that the tag being published to points at until then."""

BLOCK = 8 << 20
"""Bytes moved at a time; also the unit that is asked for again after a cut connection."""

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PIN = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A destination or a source, as ``scheme://place[:tag]`` or ``scheme://place@sha256:…``.

    Attributes:
        scheme: ``file``, ``oci``, ``hf``, ``triton``, ``s3``, …
        place: what follows ``://``, without tag or digest.
        tag: None where none was given.
        pin: ``sha256:…`` where one release is meant, whatever tags say.
        revision: what follows ``@`` otherwise (a branch on a model hub).
    """

    scheme: str
    place: str
    tag: str | None = None
    pin: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a reference.

        Raises:
            UsageError: no URL, a malformed tag or digest, or a password in it. What may hold a
                password is not repeated.
        """
        shown = "a text with an @, which may hold a password," if "@" in text else repr(text)
        match = _URL.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{shown} is not a place to publish to",
                allowed="file:///path, s3://bucket/path, oci://registry/name:tag, hf://owner/name",
            )
        scheme, rest = match["scheme"], match["rest"]
        head, slash, last = rest.rpartition("/")
        authority = rest.partition("/")[0]
        # Secret keys may hold a "/": then the "@" comes later.
        users = (authority.rpartition("@"), head.partition("@"))
        if authority and any(at and ":" in user for user, at, _ in users):
            raise UsageError(
                f"the {scheme} URL holds a password",
                allowed="credentials in the environment or the tool's own configuration",
            )
        if not rest.strip("/") or any(not c.isprintable() for c in rest):
            raise UsageError(f"{shown} names no place", allowed=f"{scheme}://…")
        last, at, after = last.partition("@") if slash else (last, "", "")
        name, colon, tag = last.partition(":") if slash else (last, "", "")
        if colon and not _TAG.fullmatch(tag):
            raise UsageError(f"{tag!r} is not a tag", allowed="letters, digits and . _ -")
        pin = after if _PIN.fullmatch(after) else None
        # Taken for a revision, a mistyped digest would mean whatever is there now.
        if at and not pin and (":" in after or not after):
            raise UsageError(
                f"{after!r} is not a digest", allowed="sha256: and 64 digits of 0-9 and a-f"
            )
        if pin and colon:
            raise UsageError(
                f"the reference names a tag, {tag}, and a digest", allowed="one of them"
            )
        revision = None if pin else after or None
        return cls(scheme, head + slash + name, tag=tag or None, pin=pin, revision=revision)

    def __str__(self) -> str:
        pin = self.pin or self.revision
        tail = f"@{pin}" if pin else f":{self.tag}" if self.tag else ""
        return f"{self.scheme}://{self.place}{tail}"


@dataclass(frozen=True, slots=True)
class Head:
    """What a tag points at.

    Attributes:
        release: bytes of the release record, checked against :attr:`digest`; empty where there is
            something that is no release, such as a hub's first commit.
        digest: ``sha256:…`` by which the destination knows this release.
        version: what a swap compares with; changes whenever the tag moves.
    """

    release: bytes
    digest: str
    version: str


@dataclass(frozen=True, slots=True)
class Item:
    """One file to be sent: its name in the artifact, what it must be, and where it lies."""

    name: str
    entry: FileEntry
    path: Path


def changed(path: Path) -> DigestMismatch:
    """The error on a file that is no longer what was verified."""
    return DigestMismatch(
        f"{path} changed while it was being published",
        hint="run the same command again: it verifies first",
    )


def bounded(blocks: Iterable[bytes], limit: int, what: str) -> bytes:
    """Blocks as one; nothing is taken that comes after more than ``limit`` bytes.

    Raises:
        UsageError: they are more.
    """
    data = b""
    for block in blocks:
        data += block
        if len(data) > limit:
            raise UsageError(f"{what} is larger than {limit} bytes")
    return data


class Repository(ABC):
    """A place that releases are published to and pulled from.

    A method may fail with whatever its library raises; :mod:`.transfer` asks again and translates.

    Attributes:
        revisions: whether releases have revisions, as ``@branch``, and no tags.
        default: the tag, or the revision, that is meant where none is named.
    """

    revisions: ClassVar[bool] = False
    default: ClassVar[str] = DEFAULT_TAG

    def __init__(self, reference: Reference) -> None:
        if reference.revision and not self.revisions:
            raise UsageError(
                f"{reference.scheme} has no revision {reference.revision}",
                allowed=f"{reference.scheme}://…:tag, or @sha256: and all 64 digits",
            )
        self.reference = reference

    @abstractmethod
    def head(self, tag: str) -> Head | None:
        """What a tag, or ``sha256:…``, points at; None where there is nothing."""

    def previous(self, tag: str) -> Head | None:
        """What a new release under ``tag`` follows: its present one, else the default tag's."""
        return self.head(tag) or self.head(self.default)

    @abstractmethod
    def has(self, item: Item) -> bool:
        """Whether these bytes are there, by digest and size, so that they need not be sent."""

    @abstractmethod
    def send(self, item: Item) -> None:
        """Send one file; afterwards it is there completely or not at all."""

    @abstractmethod
    def point(self, tag: str, release: Release, record: bytes, expected: Head | None) -> Head:
        """Make ``tag`` point at a release whose files have all been sent.

        Raises:
            TagMoved: the tag no longer points at ``expected``.
        """

    def settle(self, tag: str, head: Head) -> None:
        """Look once more whether a tag that was moved with an expectation stayed there.

        Only where :meth:`point` cannot compare and swap in one step.

        Raises:
            TagMoved: another publisher moved it at the same moment.
        """

    @abstractmethod
    def read(self, name: str, entry: FileEntry, start: int) -> Iterator[bytes]:
        """The bytes of a published file from ``start`` on; the caller checks them."""

    def mend(self, record: bytes) -> None:
        """Write the release record again, whether or not it is there."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server should know and an artifact's manifest does not say.

    Attributes:
        name: of the model on the server.
        preferred: batch sizes at which the benchmark found the model efficient.
    """

    name: str
    preferred: tuple[int, ...] = ()


class Deployment(ABC):
    """A place that a server reads models from; written once, never pulled from."""

    default_options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, reference: Reference) -> None:
        if reference.tag or reference.pin or reference.revision:
            raise UsageError(
                f"{reference} names one release, and a server numbers its versions itself",
                allowed=f"{reference.scheme}:///path",
            )
        self.reference = reference

    @abstractmethod
    def place(self, artifact: Artifact, serving: Serving, record: bytes) -> tuple[Path, ...]:
        """Write the model so that the server sees it whole or not at all; the new directories."""
