"""Publishing and fetching, the same for every destination: data first, the tag last.

What is published is immutable and named by its digest; only a tag ever changes, in one step. So a
reader that follows a tag finds everything there, whoever publishes and whatever is killed.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from ..artifacts import release as releases
from ..artifacts.release import RELEASE
from ..artifacts.storage import refusals, require_space
from ..errors import DigestMismatch, TagMoved, UsageError
from .base import DEFAULT_TAG, PREVIOUS, Head, Item, Reference, Repository
from .retry import patiently

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..artifacts import FileEntry
    from ..artifacts.release import Release

    Notify = Callable[[str], None]

_RACES = 64  # swaps that may be lost to other publishers before giving up


def publish(
    repository: Repository,
    items: Sequence[Item],
    release: Release,
    *,
    expected: str | None = None,
    resend: bool = False,
    notify: Notify = lambda _: None,
) -> tuple[Head, int]:
    """Send what is not there yet, then move the tag.

    Args:
        items: every file that the release names.
        expected: ``sha256:…`` that the tag must point at, or ``none``; None moves it from wherever
            it is when everything has been sent. On the hub it is the commit that a branch is at.
        resend: send every file, also those that are there: mends a damaged one.

    Returns:
        What the tag points at now, and the bytes that were sent.

    Raises:
        TagMoved: the tag points elsewhere than expected. Nothing was changed.
        DestinationUnreachable: it kept failing. The tag is where it was.
        DigestMismatch: a file changed while it was sent.
    """
    tag = repository.reference.tag or DEFAULT_TAG
    if repository.reference.pin or tag == PREVIOUS:
        raise UsageError(
            f"{repository.reference} is one release and cannot be published to",
            allowed="a branch, such as @main" if repository.revisions
            else f"a tag other than {PREVIOUS}, such as :{DEFAULT_TAG}",
        )
    record = releases.dumps(release)
    if resend:
        patiently("sending the release record", lambda: repository.mend(record))
    there = patiently(f"reading the tag {tag}", lambda: repository.head(tag))
    _require(repository, there, expected)  # before anything is sent
    sent = 0
    for item in items:
        if not resend and patiently(f"asking for {item.name}", lambda i=item: repository.has(i)):  # type: ignore[misc]
            notify(f"{item.name} is there already")
            continue
        notify(f"sending {item.name} ({item.entry.size / 1e6:,.1f} MB)")
        patiently(f"sending {item.name}", lambda i=item: repository.send(i))  # type: ignore[misc]
        sent += item.entry.size
    notify(f"publishing {repository.reference}")
    return _swap(repository, tag, release, record, expected), sent


def _swap(
    repository: Repository, tag: str, release: Release, record: bytes, expected: str | None
) -> Head:
    for _ in range(_RACES):
        current = patiently(f"reading the tag {tag}", lambda: repository.head(tag))
        if current is not None and current.release == record:
            return current  # published already, perhaps by an attempt whose answer was lost
        _require(repository, current, expected)
        try:
            head = patiently(
                f"publishing {repository.reference}",
                lambda at=current: repository.point(tag, release, record, at),  # type: ignore[misc]
            )
        except TagMoved:
            continue
        if expected is not None:
            patiently(f"reading the tag {tag}", lambda it=head: repository.settle(tag, it))  # type: ignore[misc]
        return head
    raise TagMoved(
        f"the tag {tag} kept moving: {_RACES} other publishers came first",
        hint="publish again when they are done, or under another tag",
    )


def _require(repository: Repository, current: Head | None, expected: str | None) -> None:
    """Refuse a tag that is not where it was expected."""
    found = current.digest if current and current.release else "none"
    if expected is not None and found != expected:
        raise TagMoved(
            f"{repository.reference} points at {found}",
            allowed=expected,
            hint="pull what is there now, decide, and publish with --expect of it",
        )


def resolve(repository: Repository, *, following: Reference | None = None) -> Head | None:
    """What the repository's reference means now; None where there is no release.

    Args:
        following: for ``:previous``, the destination whose present release is meant; where it has
            none yet, that of the default tag or branch is.

    Raises:
        UsageError: the record there is none.
    """
    reference = repository.reference
    if reference.tag == PREVIOUS:
        named = (following.tag or following.revision) if following else None
        tag = named or repository.default
        head = patiently(f"reading {reference}", lambda: repository.previous(tag))
    else:
        name = reference.pin or reference.tag or DEFAULT_TAG
        head = patiently(f"reading {reference}", lambda: repository.head(name))
    return head if head and head.release else None


def fetch(
    repository: Repository, head: Head, root: Path, *, notify: Notify = lambda _: None,
    only: frozenset[str] | None = None,
) -> Release:
    """Write a release's files below ``root``, each checked against its digest as it arrives.

    Args:
        root: an empty directory; what is written there counts only once this returns.
        only: these files alone.

    Raises:
        DigestMismatch: what arrived is not what the release names, twice.
        PathEscape, UsageError: the record is malformed or names a file outside ``root``.
        DestinationUnreachable: it kept failing.
        StorageError: the disk refused.
    """
    release = releases.loads(head.release)
    wanted = {n: e for n, e in sorted(release.files.items()) if only is None or n in only}
    with refusals(root):
        require_space(root, sum(entry.size for entry in wanted.values()))
        for name, entry in wanted.items():
            notify(f"fetching {name} ({entry.size / 1e6:,.1f} MB)")
            try:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise UsageError(f"the release names {name} below another file") from None
            try:
                _fetch_file(repository, name, entry, root / name)
            except DigestMismatch:  # on the way, or there? the second time tells
                notify(f"{name} arrived damaged; fetching it again")
                _fetch_file(repository, name, entry, root / name)
        if only is None:
            (root / RELEASE).write_bytes(head.release)
    return release


def _fetch_file(repository: Repository, name: str, entry: FileEntry, path: Path) -> None:
    sha, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def rest() -> None:  # after a cut connection, from where it was cut
            nonlocal size
            for block in repository.read(name, entry, size):
                size += len(block)
                if size > entry.size:
                    return  # never write more than was announced
                sha.update(block)
                file.write(block)
            if size < entry.size:
                raise EOFError(f"the connection ended after {size} of {entry.size} bytes")

        patiently(f"fetching {name}", rest)
        file.flush()
        os.fsync(file.fileno())
    if size != entry.size or sha.hexdigest() != entry.sha256:
        found = f"sha256 {sha.hexdigest()}" if size == entry.size else "too many bytes"
        raise DigestMismatch(
            f"{repository.reference} serves {name} with {found}",
            allowed=f"sha256 {entry.sha256}, {entry.size} bytes",
            hint="publish it again with --resend, which replaces damaged files",
        )
