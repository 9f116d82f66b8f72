"""Reading, verifying and completing an artifact directory.

Adding a report changes two files. The new report is first made durable beside the old one, then
the manifest that names its digest replaces the old manifest, which is the moment it counts, then
the report is renamed into place. Killed in between, :func:`verify` finishes the last step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DigestMismatch, PathEscape, UsageError
from ._rename import sync_directory, write_durable
from .digest import digest, digests, kind, open_regular
from .directory import REASON
from .manifest import (
    MANIFEST,
    MAX_BYTES,
    PARITY,
    REPORTS,
    Artifact,
    FileEntry,
    Manifest,
    ParitySummary,
    dumps,
    loads,
)
from .release import BESIDE, entry_of
from .storage import refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

_AGAIN = "export the artifact again, or fetch it again from where it was published"
# What write_durable leaves when it is killed: never read, so harmless.
_INTERRUPTED = re.compile(
    r"\.((manifest|provenance|signature)\.json|\.(parity|benchmark)\.json\.pending)\.tmp-[0-9]+"
)


def read(root: Path) -> Artifact:
    """Read an artifact's manifest. No other file is opened, and nothing is verified.

    Raises:
        UsageError: there is no manifest, or it is malformed.
        PathEscape: the manifest is a link, or names a path outside the artifact.
    """
    path = root / MANIFEST
    try:
        descriptor = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(root) from None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(MAX_BYTES + 1)  # one more is refused below
    return Artifact(root, loads(data), entry=entry_of(data))


def _no_manifest(root: Path) -> UsageError:
    if not root.exists():
        return UsageError(f"{root} does not exist", hint="modelport export onnx --model demo")
    if root.is_file():
        return UsageError(
            f"{root} is a file",
            allowed=f"the directory of an artifact, which holds {MANIFEST}",
            hint=f"give its directory: {root.parent}",
        )
    return UsageError(
        f"{root} has no {MANIFEST}, so it is not a modelport artifact",
        hint=f"modelport export onnx --model demo --output {root}-artifact",
    )


def verify(root: Path) -> Artifact:
    """Read an artifact and check that it holds exactly the files its manifest names.

    Every listed file must be a regular file of the recorded size and sha256, and no other file may
    be there. Nothing but the manifest is parsed. A report whose addition was cut short by a crash
    is put in its place.

    Raises:
        UsageError: there is no manifest, or it is malformed.
        PathEscape: a link or a special file.
        DigestMismatch: a file is missing, unlisted, or has another size or digest.
    """
    artifact = read(root)
    _finish_reports(artifact)
    present = regular_files(root)
    listed = artifact.manifest.files
    for name in sorted(present - set(listed)):
        raise DigestMismatch(
            f"{root / name} is not named in the manifest",
            allowed=", ".join(sorted(listed)),
            hint=f"remove it, or {_AGAIN}",
        )
    for name in sorted(set(listed) - present):
        raise DigestMismatch(f"{root / name} is missing", hint=_AGAIN)
    for name, entry in sorted(listed.items()):
        size = (root / name).lstat().st_size
        if size != entry.size:
            raise DigestMismatch(
                f"{root / name} has {size} bytes", allowed=f"{entry.size} bytes", hint=_AGAIN
            )
    for path, found in digests(root / name for name in sorted(listed)).items():
        expected = listed[path.relative_to(root).as_posix()]
        if found != expected:
            raise DigestMismatch(
                f"{path} has sha256 {found.sha256}", allowed=expected.sha256, hint=_AGAIN
            )
    return artifact


def collect(root: Path) -> dict[str, FileEntry]:
    """Digest and size of every file below ``root`` but the manifest, for :attr:`Manifest.files`.

    Raises:
        PathEscape: a link or a special file is among them.
    """
    names = sorted(regular_files(root))
    found = digests(root / name for name in names)
    return {name: found[root / name] for name in names}


def write_manifest(root: Path, manifest: Manifest) -> Artifact:
    """Write ``manifest.json`` in one durable step.

    Raises:
        StorageError: the disk refused.
    """
    text = dumps(manifest)
    loads(text)  # never write what could not be read
    with refusals(root):
        write_durable(root / MANIFEST, text.encode())
    return Artifact(root, manifest)


def with_report(
    artifact: Artifact, name: str, text: str, parity: ParitySummary | None = None
) -> Artifact:
    """Add or replace a report and record it in the manifest; survives a crash at any point.

    Args:
        artifact: what the report is about.
        name: ``parity.json`` or ``benchmark.json``.
        text: the report.
        parity: the new verdict; None keeps the one there is.

    Raises:
        UsageError: another file name, or a verdict on another artifact.
        DigestMismatch: the artifact was replaced meanwhile, so the report is about another one.
        StorageError: the disk refused.
    """
    if name not in REPORTS:
        raise UsageError(f"{name} is not a report", allowed=", ".join(sorted(REPORTS)))
    if parity is not None and (name != PARITY or parity.identity != artifact.manifest.identity):
        raise UsageError("the parity summary belongs to another file or another artifact")
    root, data = artifact.root, text.encode()
    with refusals(root), _exclusive(root):
        current = read(root).manifest
        if current.identity != artifact.manifest.identity:
            raise DigestMismatch(
                f"{root} was replaced while it was examined",
                hint=f"modelport validate {root}",
            )
        _finish_reports(Artifact(root, current))
        pending = _pending(root, name)
        write_durable(pending, data)
        files = {**current.files, name: digest(pending)}
        updated = dataclasses.replace(current, files=files, parity=parity or current.parity)
        written = write_manifest(root, updated)
        pending.replace(root / name)
        sync_directory(root)
    return written


def _pending(root: Path, name: str) -> Path:
    return root / f".{name}.pending"


def _finish_reports(artifact: Artifact) -> None:
    """Put a pending report in its place if the manifest already names it; else drop it."""
    for name in REPORTS:
        pending = _pending(artifact.root, name)
        if not os.path.lexists(pending):
            continue
        expected = artifact.manifest.files.get(name)
        if expected is not None and digest(pending) == expected:
            with refusals(artifact.root):
                pending.replace(artifact.root / name)
                sync_directory(artifact.root)


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """One report at a time; the lock is on the directory itself and leaves no file behind."""
    import fcntl

    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def regular_files(root: Path) -> set[str]:
    """POSIX paths of the files below ``root``, without the manifest and modelport's own traces.

    Raises:
        PathEscape: a link of either kind or a special file is among them.
    """
    return {name for name in _walk(root) if name not in _UNLISTED and not _is_trace(name)}


def traces(root: Path) -> set[str]:
    """What modelport left below ``root`` that belongs to no artifact and is never published.

    Raises:
        PathEscape: as :func:`regular_files`.
    """
    return {name for name in _walk(root) if _is_trace(name)}


def _is_trace(name: str) -> bool:
    """Why it was rejected, a report that a kill left pending, a write that it cut short."""
    return name in _TRACES or _INTERRUPTED.fullmatch(name) is not None


def _walk(root: Path) -> Iterator[str]:
    for current, directories, files in os.walk(root, followlinks=False):
        for name in [*directories, *files]:
            path = Path(current, name)
            status = path.lstat()
            mode = status.st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise PathEscape(
                    f"{path} is {kind(mode)}", allowed="regular files only", hint=_AGAIN
                )
            if status.st_nlink != 1:  # whoever holds the other name can change it after the check
                raise PathEscape(
                    f"{path} is a hard link: {status.st_nlink} names share its data",
                    allowed="files of the artifact's own",
                    hint=f"copy it (cp -r --no-preserve=links {root} COPY) and verify the copy",
                )
            yield path.relative_to(root).as_posix()


_UNLISTED = frozenset({MANIFEST, *BESIDE})
_TRACES = frozenset({REASON, *(_pending(Path(), name).name for name in REPORTS)})
