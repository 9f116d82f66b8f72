"""Artifacts on disk: manifest, digests, durable writes, verification, and weights that stream.

:mod:`.weights` (safetensors) and :mod:`.onnx_files` (ONNX with external data) are imported by name.
"""

from __future__ import annotations

from ..checkpoints.model import Source
from .directory import Staging, stage
from .manifest import (
    BENCHMARK,
    MANIFEST,
    PARITY,
    Ancestor,
    Artifact,
    Attempt,
    Component,
    FileEntry,
    Manifest,
    ParitySummary,
)
from .store import collect, read, verify, with_report, write_manifest

__all__ = [
    "BENCHMARK",
    "MANIFEST",
    "PARITY",
    "Ancestor",
    "Artifact",
    "Attempt",
    "Component",
    "FileEntry",
    "Manifest",
    "ParitySummary",
    "Source",
    "Staging",
    "collect",
    "read",
    "stage",
    "verify",
    "with_report",
    "write_manifest",
]
