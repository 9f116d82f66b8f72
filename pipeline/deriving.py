"""Derive an artifact from another by a transform of its graph; weights go from file to file."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from .. import artifacts, checkpoints, transforms, validate
from .texts import TEXTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

    from ..artifacts import Ancestor, Artifact, ParitySummary
    from ..checkpoints import LoadedModel
    from ..exporters import Derivation, Exporter

LONGEST = 512
"""Sizes of the largest sample drawn for measuring ranges."""


def derive(
    exporter: Exporter[Any],
    model: LoadedModel,
    parent: Artifact,
    root: Path,
    step: Derivation,
) -> Artifact:
    """Apply one transform to ``parent`` and write the result, with its manifest, into ``root``.

    Args:
        exporter: of the parent's format; reads back what was written.
        model: what the parent was exported from.
        root: an empty directory.
        step: which transform, its settings, and the options that describe the result.

    Raises:
        UsageError: the parent's graph cannot be transformed like that.
        ClaimError: what was written is not what was asked for.
    """
    from ..artifacts import onnx_files

    transform = transforms.get(step.transform)
    settings: dict[str, Any] = dict(step.settings)
    if transform.measures:
        settings["samples"] = samples(model)
    result = transform.apply(onnx_files.load(parent.root), settings)
    metadata = {"modelport.parent": parent.manifest.identity, "modelport.transform": transform.name}
    onnx_files.save(result.model, root, metadata=metadata)
    written = exporter.read_back(model, root, step.result)
    for sidecar in model.sidecars:
        shutil.copyfile(sidecar, root / sidecar.name)
    before = parent.manifest
    facts = {name: before.facts[name] for name in ("strategy", "traced") if name in before.facts}
    facts |= {**written.facts, "made_by": transform.name, transform.name: dict(result.notes)}
    if precision := result.precision or before.facts.get("precision"):
        facts["precision"] = precision
    manifest = artifacts.Manifest(
        format=before.format,
        spec=written.spec,
        source=before.source,
        options={**before.options, **_plain(step.result)},
        facts=facts,
        tools=before.tools,
        files=artifacts.collect(root),
        attempts=before.attempts,
        parent=before.identity,
        target={**before.target, **result.target},
        lineage=(*before.lineage, _ancestor(parent)),
    )
    return artifacts.write_manifest(root, manifest)


def translated(artifact: Artifact) -> ParitySummary | None:
    """The verdict of Gate A on the nearest ancestor that has one, which Gate B rests on."""
    for ancestor in reversed(artifact.manifest.lineage):
        if ancestor.parity is not None and "precision" not in ancestor.facts:
            current = ancestor.parity.identity == ancestor.identity
            return ancestor.parity if current else None
    return None


def samples(model: LoadedModel) -> list[Mapping[str, np.ndarray]]:
    """Feeds to measure a graph's values on: short and long, with padding, and real text."""
    spec = model.spec
    feeds: list[Mapping[str, np.ndarray]] = [model.samples]
    for seed, padding in enumerate(validate.PADDINGS[:2]):
        small = {name: max(dim.min, 2 if name == "batch" else 1) for name, dim in spec.dims.items()}
        sizes = {name: small[name] if name == "batch" else min(dim.max, max(LONGEST, dim.min))
                 for name, dim in spec.dims.items()}
        case = validate.Case(tuple(sorted(sizes.items())), padding, seed)
        if validate.admits(spec, sizes, padding):
            feeds.append(validate.draw(spec, case))
    root = model.checkpoint.root
    if checkpoints.has_tokenizer(root) and set(spec.dims) <= {"batch", "sequence"}:
        feeds.append(checkpoints.tokenize(root, TEXTS, spec.input_names))
    return feeds


def _ancestor(artifact: Artifact) -> Ancestor:
    manifest = artifact.manifest
    return artifacts.Ancestor(
        identity=manifest.identity,
        made_by=str(manifest.facts.get("made_by", "export")),
        options=manifest.options,
        facts=manifest.facts,
        parity=manifest.parity if manifest.parity_is_current else None,
    )


def _plain(options: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(options)
