"""A release: the record that publishing writes and that names every byte that was published.

Deterministic: the same artifact, provenance, signature and permissions give the same bytes, so
publishing the same thing twice is noticed. Its sha256 is the release's name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from ..errors import UsageError
from . import manifest as manifests
from .manifest import MANIFEST, FileEntry, check_path

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from .manifest import Manifest

RELEASE = "publication.json"
PROVENANCE = "provenance.json"
SIGNATURE = "signature.json"
BESIDE = frozenset({RELEASE, PROVENANCE, SIGNATURE})
"""Files that lie in an artifact's directory and that its manifest cannot name."""

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Release:
    """What was published.

    Attributes:
        artifact: :attr:`~.manifest.Manifest.identity` of the artifact.
        format: of the artifact.
        files: every file, the manifest, provenance and signature included.
        allowed: what the publisher allowed that the gate refuses by default (``unproven``,
            ``random-weights``, ``pickle``, ``remote-code``).
        checks: what the gate was asked to check besides, and what it was compared with.
    """

    artifact: str
    format: str
    files: Mapping[str, FileEntry]
    allowed: tuple[str, ...] = ()
    checks: Mapping[str, Any] = field(default_factory=dict)
    schema: Literal[1] = SCHEMA

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


def release_of(
    manifest: Manifest, files: Mapping[str, FileEntry], *, allowed: tuple[str, ...] = (),
    checks: Mapping[str, Any] | None = None,
) -> Release:
    """The release of an artifact with its files and what lies beside them."""
    return Release(manifest.identity, manifest.format, dict(files), tuple(sorted(allowed)),
                   dict(checks or {}))


def dumps(release: Release) -> bytes:
    """The record's bytes: JSON with sorted keys, equal for equal releases."""
    data = dataclasses.asdict(release)
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def loads(data: bytes) -> Release:
    """Read a record, trusting nothing in it.

    Raises:
        UsageError: it is no release record, or of a schema that this version does not know.
        PathEscape: it names a file outside the artifact.
    """
    from pydantic import ValidationError

    document = manifests.parse(data)
    if document.get("schema") != SCHEMA or document.get("schema") is True:
        raise UsageError(
            f"the release record has schema {document.get('schema')!r}",
            allowed=f"schema {SCHEMA}",
            hint="use the modelport version that published it",
        )
    unknown = set(document) - {f.name for f in dataclasses.fields(Release)}
    if unknown:
        raise UsageError(f"the release record is malformed: {min(unknown)}: unknown")
    try:
        release = _adapter().validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UsageError(f"the release record is malformed: {where}: {first['msg']}") from None
    for path, entry in release.files.items():
        if path != MANIFEST:
            check_path(path)
        manifests.check_entry(path, entry)
    if MANIFEST not in release.files or RELEASE in release.files:
        raise UsageError(f"the release record must name {MANIFEST} and not itself")
    return release


def entry_of(data: bytes) -> FileEntry:
    """Digest and size of bytes in memory."""
    return FileEntry(hashlib.sha256(data).hexdigest(), len(data))


@cache
def _adapter() -> TypeAdapter[Release]:
    from pydantic import TypeAdapter

    return TypeAdapter(Release)
