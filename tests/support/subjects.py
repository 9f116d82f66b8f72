"""Tiny models exported to ONNX, and what they are compared with, run once for many variants."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mutants
import tiny_models
from modelport import artifacts, checkpoints, exporters, pipeline, runtimes, validate
from modelport.session import Placement, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from modelport.artifacts import Artifact
    from modelport.checkpoints import Checkpoint, Dtype, LoadedModel
    from modelport.validate import ParityReport, Plan

KINDS: Mapping[str, str] = {
    "bert": "feature-extraction",
    "camembert": "fill-mask",
    "distilbert": "token-classification",
    "deberta-v2": "fill-mask",
    "gpt2": "feature-extraction",
    "vit": "image-classification",
}
"""Architectures that faults are put into, each with a task; bert has two outputs."""

LAYERS = {"gpt2": "n_layer", "distilbert": "n_layers"}
FEW: Mapping[str, tuple[int, ...]] = {"batch": (1, 3), "sequence": (1, 2, 17)}
"""Sizes, besides the longest sequence, that keep the default tests fast."""


class Remembered(Session):
    """A session whose outputs are kept by their inputs, so that every variant shares one run."""

    runtime = "remembered"

    def __init__(self, inner: Session) -> None:
        super().__init__(inner.spec)
        self._inner = inner
        self._known: dict[str, dict[str, np.ndarray]] = {}

    def placement(self) -> Placement:
        return self._inner.placement()

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from modelport.validate.inputs import digest

        key = digest(feeds)
        if key not in self._known:
            self._known[key] = self._inner.run(feeds)
        return dict(self._known[key])


@dataclass
class Subject:
    """A model, its ONNX artifact, and what it is compared with."""

    kind: str
    checkpoint: Checkpoint
    artifact: Artifact
    plan: Plan
    model: LoadedModel = field(repr=False)
    reference: Session = field(repr=False)
    truth: Session = field(repr=False)

    def judge(self, candidate: Session, **settings: Any) -> ParityReport:
        """The verdict on a candidate; a session that is open, and stays so."""
        return validate.judge(candidate, self.reference, self.truth, self.plan,
                              spec=self.artifact.spec, settings=validate.Settings(**settings))

    def spoilt(self, spoil: Callable[[Any], object]) -> Session:
        """The original run eagerly after ``spoil`` has had a copy of its module."""
        module = copy.deepcopy(self.model.module)
        spoil(module)
        return opened(replace(self.model, module=module))

    def judge_file(self, root: Path, *, level: str = "all") -> ParityReport:
        """The verdict on an ONNX file in ``root``; one that does not open is a failure."""
        placed = replace(self.artifact, root=root)
        return validate.judge(
            lambda: open_onnx(placed, level), self.reference, self.truth, self.plan,
            spec=self.artifact.spec, settings=validate.Settings(case_seconds=20.0))


def spoilt_artifact(one: Subject, name: str, out: Path) -> str:
    """An artifact, whole but for one fault in its graph; returns where the fault sits."""
    where = mutants.spoil(one.artifact, name, out)
    for file in one.artifact.manifest.files:
        if not (out / file).exists():
            shutil.copy(one.artifact.root / file, out / file)
    manifest = replace(one.artifact.manifest, files=artifacts.collect(out))
    artifacts.write_manifest(out, manifest)
    return where


def open_onnx(artifact: Artifact, level: str = "all") -> Session:
    options = {"level": level, "threads": 1, "spinning": False}
    return runtimes.get("onnxruntime").open(artifact, "cpu", options)


def checkpoint_of(kind: str, root: Path, *, seed: int = 0) -> Checkpoint:
    """A three-layer checkpoint with seeded weights, built in ``root`` on first need."""
    directory = root / f"{kind}-{seed}"
    if not directory.exists():
        layers = {LAYERS.get(kind, "num_hidden_layers"): 3}
        tiny_models.build(kind, KINDS[kind], directory, seed=seed, **layers)
    return pipeline.ModelRequest(str(directory), task=KINDS[kind]).resolve()


def export(checkpoint: Checkpoint, out: Path, format_: str = "onnx", **options: Any) -> Artifact:
    """Export without validation."""
    exporter = exporters.get(format_)
    request = pipeline.ModelRequest(str(checkpoint.root), task=checkpoint.task)
    return pipeline.export(format_, request, out, exporter.options_type(**options), validate=False)


def source(checkpoint: Checkpoint, dtype: Dtype) -> Session:
    """The original, run eagerly on float32 feeds."""
    return opened(checkpoints.load_reference(checkpoint, dtype=dtype, attention="sdpa"))


def opened(model: LoadedModel) -> Session:
    floating = [replace(t, dtype="float32") if t.dtype.startswith("float") else t
                for t in model.spec.inputs]
    model = replace(model, spec=replace(model.spec, inputs=tuple(floating)))
    return runtimes.get("torch_eager").open(model)


def subject(
    kind: str, root: Path, *, seed: int = 0, opset: int = 17,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> Subject:
    """Build, export and plan; ``sizes`` None takes the default matrix."""
    checkpoint = checkpoint_of(kind, root, seed=seed)
    artifact = export(checkpoint, root / f"{kind}-{seed}-opset{opset}", opset=opset)
    spec = artifact.spec
    traced = {name: (size,) for name, size in artifact.manifest.facts["traced"].items()}
    chosen = {n: (*s, spec.dims[n].max) if n == "sequence" else s
              for n, s in (sizes or {}).items() if n in spec.dims}
    plan = validate.plan(spec, traced=traced, sizes=chosen)
    model = checkpoints.load_reference(checkpoint, dtype="float32", attention="sdpa")
    return Subject(kind, checkpoint, artifact, plan, model, Remembered(opened(model)),
                   Remembered(source(checkpoint, "float64")))
