"""Generation on sessions beside eager transformers: prefill, decode, memory of the cache.

    python benchmarks/generation.py            # GPT-2 and T5-small architectures, seeded weights
    python benchmarks/generation.py --only gpt2-modes

Every process that has finished is kept below ``.bench/``: a run that was ended goes on where it
stopped. Results go to ``benchmarks/results/generation.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelport import ModelRequest, artifacts, pipeline
from modelport.exporters.onnx import OnnxOptions
from modelport.runtimes import benchmark
from pydantic_core import to_jsonable_python

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench" / "generation"
RESULTS = HERE / "results"
Shape = benchmark.Shape


@dataclass(frozen=True, slots=True)
class Run:
    """One table: artifacts of a bundled architecture, by name with their options, and shapes.

    The wide tables show how speed goes with batch and prompt; ratios have an interval from five
    rounds.
    """

    model: str
    title: str
    exports: Mapping[str, OnnxOptions]
    shapes: tuple[Any, ...]
    eager: tuple[str, ...]
    rounds: int
    repeats: int = 2


FP32, INT8 = OnnxOptions(), OnnxOptions(quantize="int8-weights")
WIDE = (Shape(1, 16, 16), Shape(1, 128, 16), Shape(1, 512, 16), Shape(8, 128, 16),
        Shape(64, 16, 16))
RUNS = {
    "gpt2-modes": Run("gpt2", "GPT-2, batch 1", {"onnx": FP32, "onnx-int8": INT8},
                      (Shape(1, 32, 32),), ("dynamic", "static", "compiled"), 5),
    "t5-modes": Run("t5-small", "T5-small, batch 1", {"onnx": FP32},
                    (Shape(1, 32, 32),), ("dynamic", "static", "compiled"), 5),
    "gpt2-wide": Run("gpt2", "GPT-2, batch and prompt", {"onnx": FP32}, WIDE, ("dynamic",), 1, 1),
    "t5-wide": Run("t5-small", "T5-small, batch and prompt", {"onnx": FP32}, WIDE,
                   ("dynamic",), 3, 1),
}  # fmt: skip


def exported(run: Run) -> list[Path]:
    """The artifacts of a run; parity is the test suite's business, not this script's."""
    places = []
    for name, options in run.exports.items():
        place = WORK / run.model / name
        if not place.exists():
            request = ModelRequest(run.model, weights="random")
            pipeline.export("onnx", request, place, options, validate=False)
        places.append(artifacts.verify(place).root)
    return places


def measure(name: str, run: Run) -> Any:
    grid = pipeline.GenerationGrid(run.shapes, ModelRequest(run.model, weights="random"),
                                   run.eager, {"rounds": run.rounds, "repeats": run.repeats})
    return pipeline.bench_generation(
        exported(run), WORK / name, grid, notify=lambda text: print(name, text, flush=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RUNS, action="append", help="default: all")
    chosen = parser.parse_args().only or list(RUNS)
    RESULTS.mkdir(exist_ok=True)
    data = RESULTS / "generation.json"
    found = json.loads(data.read_text("utf-8")) if data.exists() else {}
    for name in chosen:
        report = measure(name, RUNS[name])
        text = benchmark.markdown(report, RUNS[name].title)
        found[name] = {"report": to_jsonable_python(report), "markdown": text}
        data.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    parts = [found[name]["markdown"] for name in RUNS if name in found]
    (RESULTS / "generation.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
