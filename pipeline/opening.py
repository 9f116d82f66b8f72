"""Open an artifact, once its digests are verified, with a runtime that can."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, runtimes
from ..errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..session import Session


def open_artifact(
    root: Path,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> tuple[Artifact, Session]:
    """Verify an artifact and open it.

    Args:
        runtime: None takes the first that can open the format here.
        device: ``cpu`` or ``cuda``.
        options: of the runtime, by name.

    Raises:
        DigestMismatch, PathEscape: before anything but the manifest is parsed.
        BackendUnavailable: no runtime for this format is available here; says why for each.
        UsageError: the named runtime cannot open this format.
    """
    artifact = artifacts.verify(root)
    return artifact, open_session(artifact, runtime=runtime, device=device, options=options)


def open_session(
    artifact: Artifact,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Session:
    """Open a verified artifact; see :func:`open_artifact`."""
    able = runtimes.for_format(artifact.format)
    if runtime is not None:
        able = tuple(r for r in able if r.name == runtime)
    if not able:
        known = ", ".join(r.name for r in runtimes.for_format(artifact.format)) or "none"
        asked = f"runtime {runtime}" if runtime else "no runtime"
        raise UsageError(f"{asked} opens the format {artifact.format}", allowed=known)
    reasons = []
    for candidate in able:
        reason = candidate.unavailable(device)
        if reason is None:
            try:
                return candidate.open(artifact, device, options)
            except BackendUnavailable as error:
                if len(able) == 1:
                    raise
                reason = error.found
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendUnavailable(
        f"{artifact.format} cannot be run on {device} here ({'; '.join(reasons)})",
        hint="modelport doctor",
    )
