"""What a search compares: how long one row takes, how many rows a second, at which peak memory.

A model of one graph is called; one that generates is asked for tokens, by its own ``generate``.
Every figure comes from fresh processes, and what was measured is on disk at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoints.parts import DECODER
from ..errors import UsageError
from ..runtimes import benchmark

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..runtimes.benchmark import Row

MANY = 8
"""Rows of the call that throughput and memory are measured at."""

TOKENS = 16
"""Of each prompt, and generated for it, as far as the model reaches."""

SAMPLING = benchmark.Sampling(warmup=2, samples=30, min_samples=3, seconds=3.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one artifact.

    Attributes:
        latency_s: seconds of a call with one row.
        rows_per_s: of calls with :data:`MANY` rows.
        peak_bytes: resident, of the process that ran those.
    """

    runtime: str
    latency_s: float
    rows_per_s: float
    peak_bytes: int


def require_measurable(model: LoadedModel) -> None:
    """Refuse a model that is neither called nor asked for tokens.

    Raises:
        UsageError: it is several graphs, none of them a decoder.
    """
    if model.parts and DECODER not in model.parts:
        raise UsageError(
            "--optimize auto measures models of one graph and models that generate tokens, and "
            f"this one is {', '.join(model.parts)}",
            allowed="one of --optimize, --dtype and --quantize",
            hint="--quantize int8-weights")


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of its weights; of several graphs, which share them, those of the files."""
    manifest = artifact.manifest
    if manifest.components:
        return sum(entry.size for name, entry in manifest.files.items()
                   if name.endswith(".safetensors"))
    return sum(manifest.facts["weight_bytes"].values())


def measure(
    model: LoadedModel, made: Mapping[str, Artifact], output: Path, rounds: int
) -> dict[str, Figures | str]:
    """Figures of so many rounds by name, or why there are none; those of before are used again."""
    return (_of_generation if model.parts else _of_calls)(model, made, output, rounds)


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _of_calls(
    model: LoadedModel, made: Mapping[str, Artifact], output: Path, rounds: int
) -> dict[str, Figures | str]:
    dims = model.spec.dims
    length = dims["sequence"].opt if "sequence" in dims else 1
    many = min(MANY, dims["batch"].max) if "batch" in dims else 1
    subjects = tuple(
        benchmark.Subject(
            name, str(artifact.root.absolute()), artifact.manifest.identity, parity="pass",
            dtype=str(artifact.manifest.facts.get("precision") or "float32"),
            weight_bytes=weight_bytes(artifact))
        for name, artifact in made.items())
    request = benchmark.SweepRequest(
        subjects, output, batches=tuple(sorted({1, many})), sequences=(length,),
        threads=(threads(),), rounds=rounds, aa=False, sampling=SAMPLING, measure_ceilings=False)
    rows: dict[tuple[str, int], Row] = {
        (row.cell.subject, row.cell.batch): row for row in benchmark.run_sweep(request).rows}
    return {name: _called(rows[name, 1], rows[name, many]) for name in made}


def _called(one: Row, many: Row) -> Figures | str:
    for row in (one, many):
        if row.p50 is None or row.throughput is None or row.memory is None:
            return str(row.detail or row.status)
    assert one.p50 is not None
    assert many.throughput is not None
    assert many.memory is not None
    return Figures(one.runtime, one.p50.value, many.throughput.value, many.memory.peak)


def _of_generation(
    model: LoadedModel, made: Mapping[str, Artifact], output: Path, rounds: int
) -> dict[str, Figures | str]:
    longest = min(dim.max for part in model.parts.values() for name, dim in part.spec.dims.items()
                  if "sequence" in name)
    tokens = max(2, min(TOKENS, longest // 2))
    one, many = (benchmark.Shape(rows, tokens, tokens) for rows in (1, MANY))
    contestants = tuple(
        benchmark.Contestant(name, str(artifact.root.absolute()), artifact.manifest.identity,
                             "sessions")
        for name, artifact in made.items())
    report = benchmark.run_generation(benchmark.GenerationRequest(
        contestants, (one, many), output, rounds=rounds, repeats=2, threads=threads()))
    peaks: dict[str, int] = {}
    for process in report.processes:
        peaks[process.contestant] = max(process.peak, peaks.get(process.contestant, 0))
    found: dict[str, Figures | str] = {}
    for name, artifact in made.items():
        alone, together = (report.line(name, shape) for shape in (one, many))
        if alone.total is None or together.total is None:
            found[name] = alone.failure or together.failure
            continue
        runtime = artifact.manifest.target.get("runtime", "sessions")
        found[name] = Figures(runtime, alone.total.value, MANY / together.total.value, peaks[name])
    return found
