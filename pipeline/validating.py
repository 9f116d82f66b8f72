"""Validate an artifact against the unpatched original, at shapes that tracing never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import artifacts, checkpoints, validate
from ..errors import DigestMismatch, HubUnreachable, ModelportError
from .opening import open_session
from .references import references
from .request import ModelRequest, Notify
from .texts import TEXTS

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint
    from ..validate import ParityReport, Plan

@dataclass(frozen=True, slots=True)
class Limits:
    """How far validation goes.

    Attributes:
        sizes: sizes by dimension that replace the default matrix.
        max_seconds: for everything; None lets what coverage rests on take what it needs.
        max_memory: bytes for one case's arrays; None is the validator's default.
        inputs: ``.npz`` file with the user's own feeds, compared besides the matrix.
    """

    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    max_seconds: float | None = None
    max_memory: int | None = None
    inputs: Path | None = None


def validate_artifact(
    root: Path,
    *,
    reference: ModelRequest | None = None,
    runtime: str | None = None,
    device: str = "cpu",
    limits: Limits | None = None,
    notify: Notify = lambda _: None,
) -> tuple[Artifact, ParityReport]:
    """Verify an artifact, compare it with its source, and record the verdict in it.

    Args:
        reference: None takes the source named in the manifest, whose weights must be the very
            ones the artifact was made from; only then is the verdict recorded.
        runtime, device: what runs the artifact.

    Raises:
        DigestMismatch: a file of the artifact was changed, or the source's weights were.
        UsageError, UnavailableError: the source cannot be had, or no runtime opens the artifact.
    """
    artifact = artifacts.verify(root)
    checkpoint = _source(artifact, reference)
    limits = limits or Limits()

    sides = references(artifact, checkpoint, device)
    report = validate.judge(
        lambda: open_session(artifact, runtime=runtime, device=device),
        sides.reference,
        sides.truth,
        _plan(artifact, checkpoint, limits),
        spec=artifact.spec,
        settings=sides.settings,
        on_progress=lambda stage, done, total: notify(f"validating: {stage} {done} of {total}"),
    )
    if reference is None:
        summary = report.summary(artifact.manifest.identity)
        artifact = artifacts.with_report(artifact, artifacts.PARITY, report.to_json(), summary)
    return artifact, report


def parity_report(artifact: Artifact) -> ParityReport | None:
    """The report stored in an artifact; None when it has not been validated."""
    path = artifact.root / artifacts.PARITY
    return validate.from_json(path.read_bytes()) if path.exists() else None


def _source(artifact: Artifact, reference: ModelRequest | None) -> Checkpoint:
    """The checkpoint to compare with; without ``reference`` the one the manifest names."""
    if reference is not None:
        return reference.resolve()
    source = artifact.manifest.source
    try:
        checkpoint = ModelRequest.of(source).resolve()
    except HubUnreachable:
        raise
    except ModelportError as error:
        raise type(error)(
            f"the source {source.model} cannot be read: {error.found}",
            allowed=error.allowed,
            hint=f"modelport validate {artifact.root} --reference MODEL",
        ) from error
    if checkpoint.scan.digest != source.digest:
        raise DigestMismatch(
            f"{source.model} now has weights {checkpoint.scan.digest[:12]}, and the artifact was "
            f"made from {source.digest[:12]}",
            hint="export again, or give the original with --reference",
        )
    return checkpoint


def _plan(artifact: Artifact, checkpoint: Checkpoint, limits: Limits) -> Plan:
    spec = artifact.spec
    traced = artifact.manifest.facts.get("traced", {})
    plan = validate.plan(
        spec,
        max_seconds=limits.max_seconds,
        sizes=limits.sizes,
        traced={name: (size,) for name, size in traced.items()},
        max_memory=limits.max_memory or validate.MAX_MEMORY,
    )
    if checkpoints.has_tokenizer(checkpoint.root) and set(spec.dims) <= {"batch", "sequence"}:
        texts = validate.text_cases(
            spec, TEXTS, lambda chosen: checkpoints.tokenize(checkpoint.root, chosen, spec.input_names)
        )
        plan = plan + texts
    if limits.inputs is not None:
        plan = plan + validate.file_cases(spec, limits.inputs)
    return plan
