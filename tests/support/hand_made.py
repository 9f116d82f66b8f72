"""Models that no checkpoint holds: a module with its contract, and artifacts made from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelport import artifacts, validate
from modelport.checkpoints import Checkpoint, LoadedModel, Source
from modelport.spec import Dim, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch
    from modelport.exporters import Exporter

DIMS = {"batch": Dim(1, 2, 8), "length": Dim(1, 4, 16)}
IDS = TensorSpec("ids", "int64", ("batch", "length"), "tokens", high=10)
VALUES = TensorSpec("values", "float32", ("batch", "length"), "waveform")


class _Scan:
    digest = "0" * 64
    nonfinite: Mapping[Any, int] = {}


def spec(*inputs: TensorSpec, output: tuple[int | str, ...] = ("batch", "length")) -> ModelSpec:
    """A contract with one float output ``y``."""
    return ModelSpec(inputs, (TensorSpec("y", "float32", output),), DIMS)


def loaded(module: torch.nn.Module, contract: ModelSpec) -> LoadedModel:
    """A module that holds its own weights, as an exporter receives it."""
    source = Source("hand-made", "feature-extraction", "random", _Scan.digest, seed=0)
    checkpoint = Checkpoint(Path(), {}, source, _Scan())
    samples = feeds(contract, batch=2, length=5)
    return LoadedModel(contract, module.eval(), checkpoint, {}, samples)


def feeds(contract: ModelSpec, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Seeded feeds at given sizes."""
    return validate.draw(contract, validate.Case(tuple(sorted(sizes.items())), "none", seed))


def written(
    exporter: Exporter[Any], model: LoadedModel, out: Path, options: Any, strategy: str
) -> artifacts.Artifact:
    """Export by one strategy and read back, as the pipeline does."""
    out.mkdir(parents=True, exist_ok=True)
    exporter.export(model, None, out, options, strategy)
    found = exporter.read_back(model, out, options)
    manifest = artifacts.Manifest(
        format=exporter.name, spec=found.spec, source=model.source,
        options=dataclasses.asdict(options), facts=found.facts, tools={},
        files=artifacts.collect(out), target=found.target,
    )  # fmt: skip
    return artifacts.write_manifest(out, manifest)
