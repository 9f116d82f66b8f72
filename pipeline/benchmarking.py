"""Measure artifacts side by side with their source, and keep the evidence with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, checkpoints, runtimes
from ..errors import UsageError
from ..runtimes import benchmark
from .opening import open_artifact
from .request import ModelRequest, Notify

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, LoadedModel
    from ..runtimes.benchmark import Cell, CorpusSource, RunComparison, RunReport, Subject, Work
    from ..session import Session

DEFAULT_RUNTIMES = ("onnxruntime", "torchscript", "aotinductor", "tensorrt", "torch_eager")
"""What is measured unless ``--runtimes`` says otherwise; the rest is for comparison."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure, as the command line says it.

    Attributes:
        baseline: model that the artifacts are compared with, run by the runtimes of a checkpoint;
            None compares with the first artifact.
        runtimes: names; one that is absent here becomes an empty column with its reason.
        corpus: text file, one sentence a line; None is the built-in one.
        sweep: everything that the sweep itself takes; ``subjects`` and ``corpus`` are filled in.
    """

    baseline: ModelRequest | None = None
    runtimes: tuple[str, ...] = DEFAULT_RUNTIMES
    corpus: Path | None = None
    sweep: Mapping[str, Any] = field(default_factory=dict)


def bench(
    roots: Sequence[Path], output: Path, grid: Grid, *, notify: Notify = lambda _: None
) -> RunReport:
    """Measure every artifact with every runtime that opens it.

    Finished cells are on disk at once; the same call again measures only what is missing. The
    report is kept in ``output`` and, where an artifact was measured, in the artifact.

    Args:
        roots: artifacts, verified before anything runs.

    Raises:
        UsageError, UnsafeError: an artifact cannot be read, or its files were changed.
    """
    measured = [artifacts.verify(root) for root in roots]
    source = _baseline(grid, measured)
    subjects = [*_of_artifacts(measured, grid.runtimes), *_of_baseline(source, grid.runtimes)]
    if not subjects:
        raise UsageError(
            f"none of the runtimes {', '.join(grid.runtimes)} opens any of these",
            allowed=", ".join(runtimes.names()),
        )
    options = dict(grid.sweep)
    if options.get("batchings"):
        options["corpus"] = _corpus(grid.corpus, roots)
    request = benchmark.SweepRequest(
        tuple(subjects),
        output,
        baseline=next((s.name for s in subjects if source and s.path == _spelled(source)), None),
        work=_work(source or _source(measured[0])),
        **options,
    )
    report: RunReport = benchmark.run_sweep(
        request, lambda result, done, total: notify(f"{done}/{total} {result.cell.label()}")
    )
    text = (output / artifacts.BENCHMARK).read_text(encoding="utf-8")
    for artifact in measured:
        artifacts.with_report(artifact, artifacts.BENCHMARK, text)
    return report


def open_path(
    path_or_model: str,
    *,
    runtime: str | None,
    device: str,
    options: Mapping[str, Any],
) -> Session:
    """What a measured process opens: an artifact's directory, or a source as :func:`bench` spells
    it (a JSON object with the fields of :class:`ModelRequest`, and ``dtype``)."""
    if not path_or_model.startswith("{"):
        return open_artifact(
            Path(path_or_model), runtime=runtime, device=device, options=options
        )[1]
    fields = json.loads(path_or_model)
    dtype = fields.pop("dtype", "float32")
    model = checkpoints.load_reference(
        ModelRequest(**fields).resolve(), dtype=dtype, attention="sdpa"
    )
    chosen = runtimes.get(runtime or "torch_eager")
    return chosen.open(model, device, options)


def _baseline(grid: Grid, measured: Sequence[Artifact]) -> Checkpoint | None:
    if grid.baseline is None:
        return None
    request = grid.baseline
    if request.task is None and measured:
        request = replace(request, task=measured[0].manifest.source.task)
    return request.resolve()


def _source(artifact: Artifact) -> Checkpoint | None:
    """The artifact's source, if it still can be had: only for counting its operations."""
    from ..errors import ModelportError

    try:
        return ModelRequest.of(artifact.manifest.source).resolve()
    except ModelportError:
        return None


def _of_artifacts(measured: Sequence[Artifact], wanted: Sequence[str]) -> list[Subject]:
    found = []
    for artifact in measured:
        manifest = artifact.manifest
        able = [r.name for r in runtimes.for_format(artifact.format) if r.name in wanted]
        for name in able:
            parity = manifest.parity.verdict if manifest.parity_is_current and manifest.parity \
                else "not validated"
            found.append(
                benchmark.Subject(
                    name=artifact.root.name if len(able) == 1 else f"{artifact.root.name}/{name}",
                    path=str(artifact.root.absolute()),
                    identity=manifest.identity,
                    runtime=name,
                    dtype=str(manifest.facts.get("precision") or "float32"),
                    parity=parity,
                    weight_bytes=sum(manifest.facts.get("weight_bytes", {}).values()),
                )
            )
    return found


def _of_baseline(source: Checkpoint | None, wanted: Sequence[str]) -> list[Subject]:
    if source is None:
        return []
    able = [r.name for r in runtimes.for_format(runtimes.CHECKPOINT) if r.name in wanted]
    return [
        benchmark.Subject(
            name=f"{Path(source.origin.model).name}/{name}",
            path=_spelled(source),
            identity=source.scan.digest,
            runtime=name,
            parity="source",
            weight_bytes=sum(t.nbytes for t in source.tensors.values()),
        )
        for name in able
    ]


def _spelled(source: Checkpoint) -> str:
    """A source as :func:`open_path` reads it: by its directory, so that no hub is asked again."""
    return json.dumps({"model": str(source.root), "task": source.task}, sort_keys=True)


def _corpus(path: Path | None, roots: Sequence[Path]) -> CorpusSource:
    if path is None:
        return benchmark.built_in()
    tokenizer = checkpoints.tokenizer(roots[0])
    longest = artifacts.read(roots[0]).spec.dims["sequence"].max

    def encode(texts: Sequence[str]) -> list[list[int]]:
        made = tokenizer(list(texts), truncation=True, max_length=longest)
        return [list(ids) for ids in made["input_ids"]]

    return benchmark.from_text(path, encode)


def _work(source: Checkpoint | None) -> Callable[[Cell], Work | None]:
    """Operations and bytes of a cell, counted on the source's module, which holds no weights."""
    if source is None:
        return lambda cell: None
    model: list[LoadedModel] = []

    @cache
    def counted(batch: int, sequence: int) -> Work:
        import torch

        if not model:
            model.append(checkpoints.load(source, attention="eager"))
        loaded = model[0]
        sizes = {name: dim.opt for name, dim in loaded.spec.dims.items()}
        sizes |= {"batch": batch, "sequence": sequence}
        inputs = tuple(
            torch.zeros(loaded.spec.shape(t, sizes), dtype=getattr(torch, t.dtype))
            for t in loaded.spec.inputs
        )
        weights = sum(ref.nbytes for ref in {id(r): r for r in loaded.weights.values()}.values())
        return benchmark.Work(float(benchmark.count_flops(loaded.module, inputs)), float(weights))

    return lambda cell: None if cell.batching else counted(cell.batch, cell.sequence)


def against(new: RunReport, old: Path, limit: float) -> RunComparison:
    """Compare a run with an older one, given as its directory, file, or a measured artifact."""
    before = benchmark.load_report(old)
    found: RunComparison = benchmark.compare_runs(new, before, max_regression=limit)
    return found

