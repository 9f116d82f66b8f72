"""Models that generate: T5-small beside eager and compiled transformers, and Bark's two tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from modelport import artifacts, pipeline
from modelport.bark import SHORT
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import combinations
from modelport.runtimes import benchmark
from pydantic_core import to_jsonable_python

PLAIN, FUSED = "no optimisation", "fused attention"
BARK_CLAIMS = (
    # What the article on Bark prints for its GPU, each relative to the first row at batch 1.
    ("fused attention: latency at least 27 % lower", FUSED, "latency", -0.27),
    ("fused attention + offload: memory at least 59 % lower", f"{FUSED} + offload", "memory",
     -0.59),
    ("fused attention + float16 + offload: memory at least 80 % lower",
     f"{FUSED} + float16 + offload", "memory", -0.80),
)  # fmt: skip
HALF_CLAIM = ("float16 at batch 8: throughput at least 87 % higher", 0.87)


def t5(device: str, small: bool, work: Path) -> dict[str, Any]:
    """Greedy generation, prompts of 16 to 256, 64 new tokens: the article's second claim is 6 ×."""
    model = pipeline.ModelRequest("t5-small", weights="random")
    place = work / "t5-onnx"
    if not place.exists():
        pipeline.export("onnx", model, place, OnnxOptions(), validate=False)
    artifacts.verify(place)
    prompts, tokens, rounds = ((16,), 4, 1) if small else ((16, 256), 64, 2)
    shapes = tuple(benchmark.Shape(1, prompt, tokens) for prompt in prompts)
    eager = ("dynamic",) if small else ("dynamic", "compiled")
    report = pipeline.bench_generation(
        [place], work / "t5", pipeline.GenerationGrid(
            shapes, model, eager, {"rounds": rounds, "repeats": 2, "device": device}),
    )  # fmt: skip
    speedups = [(line.total_speedup.value, line.contestant, str(line.shape))
                for line in report.lines if line.total_speedup is not None]  # fmt: skip
    best = max(speedups, default=None)
    return {
        "report": to_jsonable_python(report),
        "markdown": benchmark.markdown(report, "T5-small, greedy"),
        "claims": [{
            "claim": "T5-small: 6 × eager float32",
            "found": f"{best[0]:.2f} ×, {best[1]}, {best[2]}" if best else "not measured",
            "reached": best[0] >= 6 if best else None,
        }],
    }  # fmt: skip


def bark_request(device: str, small: bool) -> pipeline.ModelRequest:
    """Bark's real architecture with seeded weights; large on a GPU."""
    name = "suno/bark-small" if small or device == "cpu" else "suno/bark"
    return pipeline.ModelRequest(name, task=combinations.TASK, weights="random")


def bark(device: str, small: bool, work: Path) -> dict[str, Any]:
    """Every combination, batch 1 and 8, fixed token counts, bark-large's architecture."""
    plan = combinations.Plan.usual(device)
    request = bark_request(device, small)
    setting = replace(plan.setting, new_tokens=64)
    if small:
        setting = replace(SHORT, new_tokens=4, text_window=8, fine_window=32)
    plan = replace(plan, model=request, setting=setting, rounds=1, samples=1 if small else 2,
                   batches=(1,) if small else (1, 8), prove=False)  # fmt: skip
    report = combinations.combinations(plan, work / "bark")
    return {"markdown": report.markdown(), "claims": bark_claims(report)}


def bark_claims(report: combinations.Report) -> list[dict[str, Any]]:
    """The article's relative figures beside ours."""
    rows = {(row.cell.subject, row.cell.batch): row for row in report.run.rows}
    made = []
    for claim, name, what, least in BARK_CLAIMS:
        change = _change(rows.get((name, 1)), rows.get((PLAIN, 1)), what)
        made.append(_claim(claim, change, change is not None and change <= least))
    half = next((n for n, _ in rows if n in ("float16", "bfloat16")), "float16")
    change = _change(rows.get((half, 8)), rows.get((PLAIN, 8)), "throughput")
    made.append(_claim(HALF_CLAIM[0], change, change is not None and change >= HALF_CLAIM[1]))
    return made


def _claim(claim: str, change: float | None, reached: bool) -> dict[str, Any]:
    return {"claim": claim, "found": "not measured" if change is None else f"{change:+.0%}",
            "reached": None if change is None else reached}  # fmt: skip


def _change(row: Any, first: Any, what: str) -> float | None:
    """Relative to the first row; None where either was not measured."""
    if row is None or first is None or row.p50 is None or first.p50 is None:
        return None
    if what == "memory":
        if row.memory is None or row.memory.gpu_allocated is None:
            return None
        return float(row.memory.gpu_allocated / first.memory.gpu_allocated - 1)
    attribute = {"latency": "p50", "throughput": "throughput"}[what]
    return float(getattr(row, attribute).value / getattr(first, attribute).value - 1)
