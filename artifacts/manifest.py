"""The manifest: what an artifact is, where it came from, and the evidence that it is right.

Frozen records; pydantic checks them on reading, so a manifest from outside is data, never trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.model import Source
from ..spec import ModelSpec

SCHEMA = 1
MANIFEST = "manifest.json"
PARITY = "parity.json"
BENCHMARK = "benchmark.json"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Digest (lower-case hex sha256) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One strategy or transform that was tried, and what became of it."""

    strategy: str
    outcome: Literal["kept", "rejected", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ParitySummary:
    """The verdict of one validation, and exactly what it was a verdict on.

    Attributes:
        verdict: ``pass``, ``suspect`` or ``fail``.
        identity: :attr:`Manifest.identity` of the artifact that was validated.
        gates: verdict by gate (``hygiene``, ``translation``, ``precision``, ``effect``).
        worst_rho: largest ratio of the candidate's to the reference's rounding error; None where
            no noise floor could be computed.
        comparisons: number of output × sample comparisons made.
        left_out: number of planned cases that the budget did not allow.
    """

    verdict: Literal["pass", "suspect", "fail"]
    identity: str
    gates: Mapping[str, str]
    worst_rho: float | None
    comparisons: int
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known about an artifact.

    Attributes:
        format: the exporter's name (``onnx``, ``torchscript``, …).
        parent: identity of the artifact this one was made from, if any.
        options: what was asked for, by option name.
        facts: what was found in the file afterwards (opset, IR version, node counts, …).
        tools: versions of the packages that made it.
        target: what it is tied to (device, GPU, runtime); empty when it runs anywhere.
        files: every file of the artifact except the manifest itself, by POSIX path from its root.
        attempts: strategies and transforms tried, in order.
        parity: None until validated (``--no-validate``).
    """

    format: str
    spec: ModelSpec
    source: Source
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]
    attempts: tuple[Attempt, ...] = ()
    parity: ParitySummary | None = None
    parent: str | None = None
    target: Mapping[str, str] = field(default_factory=dict)
    schema: Literal[1] = SCHEMA


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory with a manifest that has been read (not necessarily verified)."""

    root: Path
    manifest: Manifest

    @property
    def format(self) -> str:
        return self.manifest.format

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec
