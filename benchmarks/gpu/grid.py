"""Variants of one encoder side by side: over a grid of shapes, and over sentences in batches.

Every variant is a process of its own, in turn, round after round, as long as the time allows; the
first round is complete or says what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from modelport import checkpoints, pipeline
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.ceilings import Ceilings, share

HERE = Path(__file__).resolve().parent
SHAPES = tuple((b, s) for b in (1, 8, 32) for s in (16, 32, 64, 128, 256, 384, 512))
LEAST_DB = {"float32": 60.0, "float16": 30.0, "bfloat16": 20.0}
"""Below this a variant is wrong, not merely rounded: TF32 keeps 10 bits of mantissa as float16
does, so a float32 variant that runs in TF32 is held to float16's."""
BASELINE = "eager fp32"
LEAST_SECONDS, COMPILING = 10.0, 60.0
"""Time that must be left for a variant that was not measured yet, and for one that compiles."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One column.

    Attributes:
        export: arguments of ``modelport export`` that make its artifact; empty for the source.
        ours: an artifact or runtime of this project, rather than a peer of it.
        compiles: for a minute or so, before it runs at all; such variants come last.
    """

    name: str
    runtime: str
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    export: tuple[str, ...] = ()
    tf32: bool = False
    ours: bool = False
    compiles: bool = False

    @property
    def artifact(self) -> str:
        return "-".join(a.strip("-") for a in self.export)


def variants(device: str) -> tuple[Variant, ...]:
    """What is compared; on a CPU only what is the same code as on a GPU."""
    onnx, half = ("onnx",), ("onnx", "--optimize", "fuse", "--dtype", "fp16")
    everywhere = (
        Variant(BASELINE, "torch_eager"),
        Variant("eager bf16", "torch_eager", "bfloat16"),
        Variant("TorchScript fp32", "torchscript", export=("torchscript", "--device", device),
                ours=True),
        Variant("ONNX Runtime fp32", "onnxruntime", export=onnx, ours=True),
    )  # fmt: skip
    if device == "cpu":
        return everywhere
    graphs = {"cuda_graph": True}
    compiled = ("aotinductor", "--device", device)
    return (
        *everywhere,
        Variant("eager fp32, TF32", "torch_eager", tf32=True),
        Variant("eager fp16", "torch_eager", "float16"),
        Variant("compile reduce-overhead fp16", "torch_compile", "float16",
                {"mode": "reduce-overhead"}, compiles=True),
        Variant("CUDA graphs by bucket fp16", "torch_cudagraphs", "float16",
                {"compiled": False}, ours=True),
        Variant("CUDA graphs by bucket, compiled fp16", "torch_cudagraphs", "float16", ours=True,
                compiles=True),
        Variant("AOTInductor bf16", "aotinductor", "bfloat16",
                export=(*compiled, "--dtype", "bf16"), ours=True),
        Variant("ONNX Runtime fp16, fused", "onnxruntime", "float16", export=half,
                ours=True),
        Variant("ONNX Runtime fp16, fused, CUDA graphs", "onnxruntime", "float16", graphs,
                half, ours=True),
        Variant("TensorRT fp16", "tensorrt", "float16",
                export=("tensorrt", "--dtype", "fp16", "--batch-profiles", "1,8,32"), ours=True),
        Variant("compile max-autotune fp16", "torch_compile", "float16",
                {"mode": "max-autotune"}, compiles=True),
    )  # fmt: skip


SENTENCES_ONLY = ("TorchScript fp32", "ONNX Runtime fp32", "eager bf16")
"""Left out of the grid, whose time is short: the sentences show the first two."""
TINY = {"model": "demo", "weights": "pretrained", "task": "feature-extraction"}


@dataclass(frozen=True, slots=True)
class Pass:
    """All sentences once; ``order`` is one of the benchmark's batchings."""

    sentences: int
    order: str
    batch: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        seconds: for everything, exports included.
        cell_seconds: sampling time of one cell in one process.
        rounds: processes of each variant; claims need 3 (an interval) or 5.
        passes: over the built-in sentences, beside or instead of the shapes.
        names: of the variants.
    """

    model: str = "camembert-base"
    weights: str = "random"
    task: str = "text-classification"
    device: str = "cuda"
    shapes: tuple[tuple[int, int], ...] = SHAPES
    seconds: float = 240.0
    cell_seconds: float = 0.06
    rounds: int = 5
    passes: tuple[Pass, ...] = ()
    names: tuple[str, ...] = ()
    small: bool = False


def planned(device: str, small: bool, seconds: float = 240.0) -> Plan:
    """The grid's plan; small: a few shapes of a small model."""
    names = tuple(v.name for v in variants(device) if v.name not in SENTENCES_ONLY)
    plan = Plan(device=device, seconds=seconds, names=names)
    if not small:
        return plan
    return replace(plan, **TINY, shapes=((1, 16), (2, 32)), rounds=2, cell_seconds=0.05,
                   names=tuple(v.name for v in variants(device)), small=True)  # fmt: skip


def run(plan: Plan, work: Path, made: Mapping[str, str | None]) -> dict[str, Any]:
    """Measure and return everything: samples by variant and round, absences, ceilings, work.

    Args:
        made: why an artifact is missing below ``work``, by its name; None where it is there.
    """
    deadline = time.monotonic() + plan.seconds
    work.mkdir(parents=True, exist_ok=True)
    source = pipeline.ModelRequest(plan.model, task=plan.task, weights=plan.weights).resolve()  # type: ignore[arg-type]
    chosen = tuple(v for v in variants(plan.device) if v.name in plan.names)
    absent = {v.name: str(why) for v in chosen if v.export
              and (why := made.get(v.artifact, "it was not exported"))}
    ceilings = _ceilings(plan.device, work) if plan.shapes else None
    able = [v for v in chosen if v.name not in absent]
    runs: dict[str, dict[int, Any]] = {v.name: {} for v in able}
    queue = deque((r, v) for r in range(plan.rounds) for v in _shuffled(able, r))
    longest: dict[str, float] = {}
    waiting = _next(queue, absent, plan, source.root, work)
    while waiting is not None:
        number, variant, process = waiting
        needed = longest.get(variant.name, COMPILING if variant.compiles else LEAST_SECONDS)
        if time.monotonic() + needed > deadline:
            break
        waiting = _next(queue, absent, plan, source.root, work)
        start = time.monotonic()
        found = _finish(process, variant, number, work, deadline - start)
        longest[variant.name] = time.monotonic() - start
        if found["status"] != "ok":
            absent[variant.name] = found["reason"]
        runs[variant.name][number] = found
        print(f"round {number} {variant.name}: {found.get('reason', 'ok')}, "
              f"{longest[variant.name]:.1f} s", file=sys.stderr, flush=True)
    if waiting is not None:
        waiting[2].kill()
        waiting[2].communicate()
        absent |= {v.name: "no time was left for it" for v in able
                   if not runs[v.name] and v.name not in absent}  # fmt: skip
    return {
        "plan": {"model": plan.model, "weights": plan.weights, "device": plan.device,
                 "task": plan.task},
        "shapes": plan.shapes, "runs": runs, "absent": absent, "ceilings": ceilings,
        "work": _work(source, plan.shapes),
    }  # fmt: skip


def _next(
    queue: deque[tuple[int, Variant]], absent: Mapping[str, str], plan: Plan, model: Path,
    work: Path,
) -> tuple[int, Variant, subprocess.Popen[str]] | None:
    """Start the next process that has a chance: what failed once is not tried again."""
    while queue:
        number, variant = queue.popleft()
        if variant.name not in absent:
            return number, variant, _start(variant, number, plan, model, work)
    return None


def _shuffled(able: Sequence[Variant], number: int) -> list[Variant]:
    """A seeded order; in the first round the baseline comes first and leaves its outputs. What
    compiles comes last: a round that runs out of time drops it."""
    rest = [v for v in able if not v.compiles and (v.name != BASELINE or number)]
    random.Random(number).shuffle(rest)
    return [*(v for v in able if v.name == BASELINE and not number), *rest,
            *(v for v in able if v.compiles)]  # fmt: skip


def _start(
    variant: Variant, number: int, plan: Plan, model: Path, work: Path
) -> subprocess.Popen[str]:
    references = work / "references"
    references.mkdir(exist_ok=True)
    shapes = list(plan.shapes)
    if number:
        random.Random(number).shuffle(shapes)
    job = {
        "model": str(model), "task": plan.task, "device": plan.device, "runtime": variant.runtime,
        "dtype": variant.dtype, "options": dict(variant.options), "tf32": variant.tf32,
        "artifact": str(work / variant.artifact) if variant.export else None, "shapes": shapes,
        "seconds": plan.cell_seconds, "references": str(references),
        "is_reference": variant.name == BASELINE, "checked": number == 0,
        "passes": [dataclasses.asdict(p) for p in plan.passes],
    }
    stem = _stem(variant, number, work)
    stem.with_suffix(".job.json").write_text(json.dumps(job), "utf-8")
    stem.with_suffix(".result.json").unlink(missing_ok=True)
    return subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), str(stem.with_suffix(".job.json")),
         str(stem.with_suffix(".result.json"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _finish(
    process: subprocess.Popen[str], variant: Variant, number: int, work: Path, timeout: float
) -> dict[str, Any]:
    try:
        _, errors = process.communicate("go\n", timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"status": "failed", "reason": f"killed after {timeout:.0f} s"}
    path = _stem(variant, number, work).with_suffix(".result.json")
    if process.returncode or not path.exists():
        last = [line for line in errors.strip().splitlines() if line][-1:] or ["no message"]
        return {"status": "failed", "reason": f"status {process.returncode}: {last[0][:300]}"}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _stem(variant: Variant, number: int, work: Path) -> Path:
    plain = "".join(c if c.isalnum() else "-" for c in variant.name)
    return work / f"{plain}.{number}"


def _ceilings(device: str, work: Path) -> dict[str, Any]:
    path = work / "ceilings.json"
    subprocess.run([sys.executable, "-m", "modelport.runtimes.benchmark.ceilings", "1", device,
                    str(path)], check=True)  # fmt: skip
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _work(source: Any, shapes: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Operations and weight bytes (float32) of each shape, counted without computing."""
    import torch

    model = checkpoints.load(source, attention="eager")
    weights = sum(ref.nbytes for ref in {id(r): r for r in model.weights.values()}.values())
    found = []
    for batch, sequence in shapes:
        inputs = tuple(
            torch.zeros(model.spec.shape(t, {"batch": batch, "sequence": sequence}),
                        dtype=getattr(torch, t.dtype))
            for t in model.spec.inputs
        )  # fmt: skip
        found.append({"flops": float(benchmark.count_flops(model.module, inputs)),
                      "bytes": float(weights)})  # fmt: skip
    return found


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant and shape, with its ratio to the baseline and its verdict."""
    declared = {v.name: v for v in variants(found["plan"]["device"])}
    ceilings = Ceilings(**found["ceilings"])
    rows = []
    for shape, work in zip(found["shapes"], found["work"], strict=True):
        cells = {name: _cells(runs, shape) for name, runs in found["runs"].items()}
        base = {n: np.array(c["samples"]) for n, c in cells.get(BASELINE, {}).items()}
        for name, mine in cells.items():
            if not mine:
                continue
            variant = declared[name]
            samples = {n: np.array(c["samples"]) for n, c in mine.items()}
            seconds = st.centre(list(samples.values()))
            ratio = st.ratio(base, samples) if base and min(len(base), len(samples)) > 1 else None
            narrow = 1.0 if variant.dtype == "float32" else 0.5
            rates = share(benchmark.Work(work["flops"], work["bytes"] * narrow), seconds.value,
                          "tf32" if variant.tf32 else variant.dtype, ceilings)  # fmt: skip
            worst = min((c["sqnr_db"] for c in mine.values() if c["sqnr_db"] is not None),
                        default=None)  # fmt: skip
            least = LEAST_DB["float16" if variant.tf32 else variant.dtype]
            rows.append({
                "variant": name, "batch": shape[0], "sequence": shape[1], "ours": variant.ours,
                "ms": seconds.value * 1e3, "low": seconds.low * 1e3, "high": seconds.high * 1e3,
                "rounds": len(samples),
                "speedup": ratio.value if ratio else
                st.centre(list(base.values())).value / seconds.value if base else None,
                "speedup_low": ratio.low if ratio else None,
                "speedup_high": ratio.high if ratio else None,
                "host_ms": float(np.median([c["host"] for c in mine.values()])) * 1e3,
                "copies_ms": float(np.median([np.median(c["with_copies"])
                                              for c in mine.values()])) * 1e3,
                "first_s": max(c["first"] for c in mine.values()),
                "of_gemm": rates.of_gemm, "of_bandwidth": rates.of_bandwidth,
                "sqnr_db": worst,
                "verdict": "not compared" if worst is None else
                "right" if worst >= least else f"wrong: {worst:.0f} dB, {least:.0f} needed",
            })  # fmt: skip
    return rows


def _cells(runs: Mapping[Any, Any], shape: Sequence[int]) -> dict[int, Any]:
    return {
        int(number): cell
        for number, run in runs.items() if run.get("status") == "ok"
        for cell in run["cells"] if [cell["batch"], cell["sequence"]] == list(shape)
    }  # fmt: skip


def warm_up(found: Mapping[str, Any]) -> dict[str, float]:
    """Seconds from opening to the last first call, over the whole grid, in the first round."""
    return {
        name: runs[0]["opened"] + sum(c["first"] for c in runs[0]["cells"])
        for name, runs in ((n, {int(k): v for k, v in r.items()})
                           for n, r in found["runs"].items())
        if runs.get(0, {}).get("status") == "ok"
    }  # fmt: skip


def decided(reached: bool, whole: bool) -> bool | None:
    """What one variant reaches is reached; that none does is known once all were measured."""
    return True if reached else False if whole else None


def claims(
    rows: Sequence[Mapping[str, Any]], warm: Mapping[str, float], absent: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The targets, and what was found of each; None where what was not measured might decide."""
    whole = not absent
    right = [r for r in rows if r["verdict"] == "right"]
    ours = [r for r in right if r["ours"]]
    peers = [r for r in right if not r["ours"]]
    smallest = [r for r in ours if (r["batch"], r["sequence"]) == (1, 16) and r["speedup"]]
    best = max(smallest, key=lambda r: r["speedup"], default=None)
    behind = []
    compared = 0
    for shape in sorted({(r["batch"], r["sequence"]) for r in right}):
        mine = [r["ms"] for r in ours if (r["batch"], r["sequence"]) == shape]
        theirs = [r["ms"] for r in peers if (r["batch"], r["sequence"]) == shape]
        if mine and theirs:
            compared += 1
            if min(mine) > 1.05 * min(theirs):
                behind.append(f"{shape[0]}×{shape[1]} ({min(mine) / min(theirs):.2f})")
    graphs = {n: s for n, s in warm.items() if "bucket" in n}
    slowest = max(graphs.values(), default=None)
    return [
        {"claim": "at (1, 16) at least 12 × eager fp32",
         "found": f"{best['speedup']:.1f} ×, {best['variant']}" if best else "not measured",
         "reached": decided(best["speedup"] >= 12, whole) if best else None},
        {"claim": "in each cell ahead of every peer or within 5 %",
         "found": f"{compared - len(behind)} of {compared} cells"
         + (f"; behind at {', '.join(behind)}" if behind else ""),
         "reached": not behind if compared and whole else None},
        {"claim": "the whole grid warmed up within 60 s",
         "found": f"{slowest:.1f} s" if slowest is not None else "not measured",
         "reached": slowest <= 60 if slowest is not None else None},
    ]  # fmt: skip


