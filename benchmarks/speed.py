"""Speed of our artifacts beside eager PyTorch and optimum-onnx's export, CamemBERT-base on a CPU.

    python benchmarks/speed.py shapes|corpus [--rounds N] [--minutes M] [--peer PYTHON]
    python benchmarks/speed.py report

shapes: batches 1 to 64 of 32 tokens, 8×128 and 32×128; all, and the matrix product that is the
ceiling, take turns, call by call (see _turns.py), in processes started anew N times. corpus:
token-budget batching against file order in batches of 32, 1,000 sentences, by `modelport bench`.
A part that was stopped goes on in the next call. `report` writes results/speed-PROCESSOR.json and
speed-PROCESSOR.md, of which there is a pair for each processor measured so far.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _paired import venv
from _resumable import TimeUp, file_name, published, until
from _turns import SIZE, Job, race, records
from modelport import artifacts, checkpoints, pipeline
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.environment import Environment
from modelport.runtimes.benchmark.environment import read as read_environment
from modelport.runtimes.benchmark.report import Row, RunReport
from modelport.runtimes.benchmark.summary import paces
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench" / "speed"
RESULTS = HERE / "results"
TAKEN, ENVIRONMENT = WORK / "turns.jsonl", WORK / "environment.json"
TASK = "text-classification"
MODEL = pipeline.ModelRequest("camembert-base", task=TASK, weights="random")
PEER_REQUIREMENTS = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0")
PEER_EXPORT = """
import sys
from optimum.exporters.onnx import main_export
checkpoint, out, task = sys.argv[1:]
main_export(checkpoint, out, task=task, opset=17, do_validation=False)
"""
OURS: dict[str, list[str]] = {
    "fp32": ["onnx", "--opset", "17"],
    "aotinductor": ["aotinductor"],
    "torchscript": ["torchscript"],
    "int8": ["onnx", "--opset", "17", "--quantize", "int8-dynamic"],
}
VINO = "fp32 in OpenVINO"
FP32 = ("fp32", VINO, "aotinductor", "torchscript")
SHOWN = (*FP32, "int8")
SHAPES = (*((batch, 32) for batch in (1, 2, 4, 8, 16, 32, 64)), (8, 128), (32, 128))
LARGE = ((8, 128), (32, 128))
TURNS = 5
"""Of each contender at a shape, in one process."""
EAGER, PEER = "eager", "optimum-onnx"
PRODUCTS = ("torch", "onnxruntime")
FP32_OF_PEERS, OF_GEMM, RECOMMENDED, PADDING, PACKED = 0.97, 0.90, 2.5, 0.03, 1.5


def exports(python: Path | None) -> None:
    """Our artifacts, proven, and the other exporter's file; made once."""
    WORK.mkdir(parents=True, exist_ok=True)
    for name, options in OURS.items():
        if not (WORK / name / "manifest.json").exists():
            command = [sys.executable, "-m", "modelport", "export", *options, "--model",
                       MODEL.model, "--weights", MODEL.weights, "--task", TASK, "--output",
                       str(WORK / name)]
            subprocess.run(command, check=True)
    if not (WORK / PEER / "model.onnx").exists():
        python = python or venv(HERE.parent / ".bench" / "optimum", PEER_REQUIREMENTS)
        root = MODEL.resolve().root
        subprocess.run([str(python), "-c", PEER_EXPORT, str(root), str(WORK / PEER), TASK],
                       check=True)


def _jobs() -> dict[str, Job]:
    """The contenders: our artifacts, the peers, and the product of each library."""
    spec = artifacts.verify(WORK / "fp32").spec
    source = {"model": str(MODEL.resolve().root), "task": TASK, "dtype": "float32"}
    file = {"file": str(WORK / PEER / "model.onnx"), "spec": to_jsonable_python(spec)}
    opened = {
        "fp32": (str(WORK / "fp32"), "onnxruntime"),
        VINO: (str(WORK / "fp32"), "openvino"),
        "aotinductor": (str(WORK / "aotinductor"), "aotinductor"),
        "torchscript": (str(WORK / "torchscript"), "torchscript"),
        "int8": (str(WORK / "int8"), "onnxruntime"),
        PEER: (json.dumps(file), "onnxruntime"),
        EAGER: (json.dumps(source), "torch_eager"),
    }
    threads = len(os.sched_getaffinity(0))
    return {
        **{name: {"path": path, "runtime": runtime, "threads": threads}
           for name, (path, runtime) in opened.items()},
        **{library: {"product": library, "threads": threads} for library in PRODUCTS},
    }


def measure_shapes(generations: int, minutes: float | None) -> None:
    environment = read_environment()
    if ENVIRONMENT.exists() and _environment().digest != environment.digest:
        sys.exit(f"{TAKEN} was measured elsewhere: remove it and {ENVIRONMENT}")
    ENVIRONMENT.write_text(json.dumps(asdict(environment)), encoding="utf-8")
    race(_jobs(), SHAPES, TAKEN, generations=generations, rounds=TURNS, notify=until(minutes))


def measure_corpus(rounds: int, minutes: float | None) -> None:
    pipeline.bench(
        [WORK / "int8"], WORK / "run-corpus",
        pipeline.Grid(
            runtimes=("onnxruntime",),
            sweep={
                "batches": (), "sequences": (), "batchings": ("padded", "token-budget"),
                "threads": (len(os.sched_getaffinity(0)),), "rounds": rounds,
                "corpus": benchmark.built_in(), "timeout": 1200.0,
            },
        ),
        notify=until(minutes),
    )


def _environment() -> Environment:
    return TypeAdapter(Environment).validate_json(ENVIRONMENT.read_bytes())


class Taken:
    """Turns at one shape: by contender, for each generation of processes, seconds by round."""

    def __init__(self, shape: tuple[int, int], found: Sequence[dict[str, Any]]) -> None:
        self.shape = shape
        mine = [r["seconds"] for r in found if tuple(r["shape"]) == shape]
        self.generations = len(mine)
        self._seconds = {name: [np.array(one[name]) for one in mine] for name in mine[0]}

    def seconds(self, name: str) -> st.Interval:
        return st.centre(self._seconds[name])

    def times(self, ours: str, theirs: str) -> st.Interval:
        """How many times as fast ours is, turn beside turn."""
        return st.centre([below / above for above, below in
                          zip(self._seconds[ours], self._seconds[theirs], strict=True)])

    def of_product(self, ours: str, flops: int) -> st.Interval:
        """Operations a second over those of the faster product beside it."""
        share = flops / (2 * SIZE**3)
        found = self.times(ours, min(PRODUCTS, key=lambda name: self.seconds(name).value))
        return replace(found, low=found.low * share, value=found.value * share,
                       high=found.high * share)

    def best_peer(self) -> str:
        return min((PEER, EAGER), key=lambda name: self.seconds(name).value)

    def best_artifact(self) -> str:
        """The fp32 artifact that `modelport bench` would name here: the least typical time."""
        return min(FP32, key=lambda name: self.seconds(name).value)


def _flops(shape: tuple[int, int], loaded: Any) -> int:
    given = {"input_ids": 5, "attention_mask": 1}
    return benchmark.count_flops(
        loaded.module, tuple(torch.full(shape, given[t.name]) for t in loaded.spec.inputs))


def _interval(found: st.Interval) -> str:
    if found.basis != "processes":  # of so few processes nothing can be said
        return f"{found.value:.2f}"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _table(taken: Sequence[Taken], flops: Mapping[tuple[int, int], int]) -> list[str]:
    """Milliseconds a call, rates of the products, ratios, shares of the ceiling."""
    shown = (*SHOWN, PEER, EAGER)
    head = ["batch × length", *(f"{name}, ms" for name in shown),
            *(f"product, {name}, G/s" for name in PRODUCTS), "best peer", "best of ours, fp32",
            "that over it",
            *(f"{name} over it" for name in SHOWN), *(f"{name} of the product" for name in FP32)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for at in taken:
        lines.append("| " + " | ".join([
            f"{at.shape[0]} × {at.shape[1]}",
            *(f"{at.seconds(name).value * 1e3:.1f}" for name in shown),
            *(f"{2 * SIZE**3 / at.seconds(name).value / 1e9:.0f}" for name in PRODUCTS),
            at.best_peer(), at.best_artifact(),
            _interval(at.times(at.best_artifact(), at.best_peer())),
            *(_interval(at.times(name, at.best_peer())) for name in SHOWN),
            *(_interval(at.of_product(name, flops[at.shape])) for name in FP32)]) + " |")
    return lines


def _targets(
    taken: Sequence[Taken], flops: Mapping[tuple[int, int], int], corpus: RunReport | None
) -> list[str]:
    """Each target, what was measured, and whether that reaches it."""
    lines = []
    least = min(taken, key=lambda at: at.times(at.best_artifact(), at.best_peer()).value)
    lines.append(_judged(f"the best fp32 artifact ≥ {FP32_OF_PEERS} × the best peer at every shape",
                         least.times(least.best_artifact(), least.best_peer()), FP32_OF_PEERS,
                         f"least at {least.shape[0]} × {least.shape[1]}"))
    for name in FP32:
        least = min(taken, key=lambda at, name=name: at.times(name, at.best_peer()).value)
        lines.append(_judged(f"{name} ≥ {FP32_OF_PEERS} × the best peer at every shape",
                             least.times(name, least.best_peer()), FP32_OF_PEERS,
                             f"least at {least.shape[0]} × {least.shape[1]}"))
    for at in taken:
        if at.shape not in LARGE:
            continue
        text = f"{at.shape[0]} × {at.shape[1]}"
        for name in FP32:
            lines.append(_judged(f"{name} ≥ {OF_GEMM:.0%} of the product at {text}",
                                 at.of_product(name, flops[at.shape]), OF_GEMM))
        lines.append(_judged(f"int8 ≥ {RECOMMENDED} × the best peer's fp32 at {text}",
                             at.times("int8", at.best_peer()), RECOMMENDED))
    if corpus:
        packed, plain = (_row(corpus, work) for work in ("token-budget 4096", "padded 32"))
        assert packed.padding is not None
        lines.append(f"- token-budget pads ≤ {PADDING:.0%}: "
                     f"{'reached' if packed.padding <= PADDING else '**missed**'}, "
                     f"{packed.padding:.1%}")
        lines.append(_judged(
            f"token-budget ≥ {PACKED} × batches of 32 in file order",
            st.ratio(_rounds(corpus, plain), _rounds(corpus, packed)), PACKED))
    return lines


def _judged(target: str, found: st.Interval, bound: float, note: str = "") -> str:
    """An interval that holds the bound says neither."""
    word = "reached" if found.low >= bound else "**missed**" if found.high < bound else \
        "not decided"
    return f"- {target}: {word}, {_interval(found)}" + (f" ({note})" if note else "")


def _row(report: RunReport, work: str) -> Row:
    return next(r for r in report.rows if r.cell.work() == work)


def _rounds(report: RunReport, row: Row) -> dict[int, Any]:
    return paces(r for r in report.results if r.cell.shape == row.cell.shape)


def report() -> str:
    found = records(TAKEN)
    taken = [Taken(shape, found) for shape in SHAPES
             if any(tuple(r["shape"]) == shape for r in found)]
    loaded = checkpoints.load(MODEL.resolve(), attention="eager")
    flops = {at.shape: _flops(at.shape, loaded) for at in taken}
    environment = _environment()
    place = WORK / "run-corpus"
    corpus = benchmark.load_report(place) if (place / "benchmark.json").exists() else None
    lines = [
        "# Speed beside eager PyTorch and optimum-onnx", "",
        "Written by `python benchmarks/speed.py report`. CamemBERT-base, text classification, "
        "seeded weights: fp32 and int8 are ONNX artifacts, in ONNX Runtime where nothing else is "
        "said; aotinductor and torchscript are in float32, too.", "",
        *(f"- {line}" for line in environment.lines()), "",
        "## Shapes", "",
        f"All take turns, call by call, {TURNS} times in each of "
        f"{min(at.generations for at in taken)} generations of processes; ratios are of turns "
        "beside each other, with their 95 % interval over generations. The product is that of two "
        f"float32 matrices of {SIZE} × {SIZE}, taking its turns as well: shares are of the faster "
        "library's.", "",
        *_table(taken, flops), "",
    ]
    if corpus:
        lines += ["## Corpus", "", *(f"- {line}" for line in benchmark.footnotes(corpus)), "",
                  "| int8 | sentences/s | tokens/s | padding |", "| --- | --- | --- | --- |"]
        for row in corpus.rows:
            assert row.throughput is not None
            lines.append(f"| {row.cell.work()} | {row.throughput.value:.2f} | "
                         f"{row.tokens:.0f} | {row.padding:.1%} |")
        lines.append("")
    lines += ["## Targets", "", *_targets(taken, flops, corpus), ""]
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    name = f"speed-{file_name(environment.cpu)}"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    raw = {"environment": asdict(environment), "shapes": found, "flops": {
        f"{b}×{s}": count for (b, s), count in flops.items()}}
    if corpus:
        raw["corpus"] = published(json.loads((place / "benchmark.json").read_text()))
    (RESULTS / f"{name}.json").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["shapes", "corpus", "report"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on another time")
    parser.add_argument("--peer", type=Path, help="interpreter that has optimum-onnx already")
    chosen = parser.parse_args(arguments)
    if chosen.part == "report":
        print(report())
        return 0
    exports(chosen.peer)
    measure = measure_shapes if chosen.part == "shapes" else measure_corpus
    try:
        measure(chosen.rounds, chosen.minutes)
    except TimeUp as pause:
        print(f"stopped at {pause}; the same command goes on from there", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
