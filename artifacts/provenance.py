"""Where an artifact came from, as an in-toto statement with a SLSA v1 provenance predicate.

Says only what holds again for the same artifact on the same kind of host: no time, no user, no
host name, so that publishing the same thing twice gives the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .manifest import FileEntry, Manifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:modelport:export:1"


def statement(
    manifest: Manifest, files: Mapping[str, FileEntry], *, allowed: tuple[str, ...] = ()
) -> bytes:
    """The statement on an artifact: its files, its source, how it was made and where.

    Args:
        files: the artifact's files, the manifest included.
        allowed: what the publisher allowed that is refused by default.
    """
    source = manifest.source
    document = {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": entry.sha256}}
            for name, entry in sorted(files.items())
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "format": manifest.format,
                    "model": source.model,
                    "options": dict(manifest.options),
                    "revision": source.revision,
                    "seed": source.seed,
                    "task": source.task,
                    "weights": source.weights,
                },
                "internalParameters": {"allowed": sorted(allowed)},
                "resolvedDependencies": [_source(manifest), *_parent(manifest)],
            },
            "runDetails": {
                "builder": {
                    "id": _builder(),
                    "version": dict(sorted(manifest.tools.items())),
                    "host": _host(),
                },
            },
        },
    }
    return json.dumps(document, indent=2, sort_keys=True, default=str).encode() + b"\n"


def allowed(document: bytes) -> tuple[str, ...]:
    """What a statement says was allowed.

    Raises:
        UsageError: it is no statement of modelport's.
    """
    try:
        found = json.loads(document)["predicate"]["buildDefinition"]["internalParameters"]
        return tuple(map(str, found["allowed"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the provenance is no statement of modelport's") from error


def _source(manifest: Manifest) -> dict[str, Any]:
    source = manifest.source
    dependency: dict[str, Any] = {"name": source.model, "digest": {"sha256": source.digest}}
    if source.revision:
        dependency["annotations"] = {"revision": source.revision}
    return dependency


def _parent(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest.parent is None:
        return []
    return [{"name": "parent artifact", "digest": {"sha256": manifest.parent}}]


def _builder() -> str:
    """The CI workflow that published it, as its service names it; else that it was no service."""
    server = os.environ.get("GITHUB_SERVER_URL")
    workflow = os.environ.get("GITHUB_WORKFLOW_REF")
    return f"{server}/{workflow}" if server and workflow else "urn:modelport:local"


def _host() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
    }
