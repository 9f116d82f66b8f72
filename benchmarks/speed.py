"""Speed of our artifacts beside eager PyTorch and optimum-onnx's export, CamemBERT-base on a CPU.

    python benchmarks/speed.py batches|shapes|corpus [--rounds N] [--minutes M] [--peer PYTHON]
    python benchmarks/speed.py report

batches: fp32 at batch 1 to 64, sequence 32. shapes: 8×128 and 32×128, reduced precision too.
corpus: token-budget batching against file order in batches of 32, 1,000 sentences. All by
`modelport bench`, a process of its own for each figure; a part that was stopped goes on in the next
call. `report` writes results/speed.json and results/speed.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _paired import venv
from _resumable import TimeUp, published, until
from modelport import pipeline
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.report import Row, RunReport
from modelport.runtimes.benchmark.summary import paces

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench" / "speed"
RESULTS = HERE / "results"
TASK = "text-classification"
MODEL = pipeline.ModelRequest("camembert-base", task=TASK, weights="random")
PEER_REQUIREMENTS = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0")
PEER = """
import sys
from optimum.exporters.onnx import main_export
checkpoint, out, task = sys.argv[1:]
main_export(checkpoint, out, task=task, opset=17, do_validation=False)
"""
OURS: dict[str, list[str]] = {
    "fp32": ["onnx", "--opset", "17"],
    "aotinductor": ["aotinductor"],
    "int8": ["onnx", "--opset", "17", "--quantize", "int8-dynamic"],
}
FP32 = ("fp32", "aotinductor")
PARTS: dict[str, dict[str, Any]] = {
    "batches": {"batches": (1, 2, 4, 8, 16, 32, 64), "sequences": (32,)},
    "shapes": {"batches": (8, 32), "sequences": (128,)},
    "corpus": {"batches": (), "sequences": (), "batchings": ("padded", "token-budget")},
}
MEASURED = {"batches": FP32, "shapes": (*FP32, "int8"), "corpus": ("int8",)}
EAGER, PEERS = "torch_eager", "optimum-onnx/model.onnx"
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
    if not (WORK / PEERS).exists():
        python = python or venv(HERE.parent / ".bench" / "optimum", PEER_REQUIREMENTS)
        root = MODEL.resolve().root
        subprocess.run([str(python), "-c", PEER, str(root), str((WORK / PEERS).parent), TASK],
                       check=True)


def measure(part: str, rounds: int, minutes: float | None) -> RunReport:
    names = MEASURED[part]
    compared = part != "corpus"
    roots = [WORK / name for name in names] + ([WORK / PEERS] if compared else [])
    return pipeline.bench(
        roots, WORK / f"run-{part}",
        pipeline.Grid(
            baseline=MODEL if compared else None, runtimes=("onnxruntime", "aotinductor", EAGER),
            sweep={
                **PARTS[part], "threads": (len(os.sched_getaffinity(0)),), "rounds": rounds,
                "sampling": benchmark.Sampling(warmup=1, samples=40, min_samples=1, seconds=1.0),
                "corpus": benchmark.built_in(), "aa": compared, "timeout": 1200.0,
            },
        ),
        notify=until(minutes),
    )


def _row(report: RunReport, subject: str, work: str) -> Row:
    return next(r for r in report.rows
                if r.cell.subject.endswith(subject) and r.cell.work() == work)


def _rounds(report: RunReport, row: Row) -> dict[int, Any]:
    return paces(r for r in report.results
                 if not r.cell.twin and r.cell.subject == row.cell.subject
                 and r.cell.shape == row.cell.shape)


def _speed(report: RunReport, ours: Row, theirs: Row) -> st.Interval:
    """Throughput of ours over theirs."""
    return st.ratio(_rounds(report, theirs), _rounds(report, ours))


def _best(report: RunReport, work: str) -> Row:
    peers = [_row(report, name, work) for name in (EAGER, PEERS)]
    return min(peers, key=lambda row: row.pace.value if row.pace else float("inf"))


def _interval(found: st.Interval) -> str:
    if not math.isfinite(found.high):  # of one process a side nothing can be said
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _pace(row: Row) -> str:
    assert row.p50 is not None
    margin = f" ± {row.p50.margin:.1%}" if row.p50.basis == "processes" else ""
    return f"{row.p50.value * 1e3:.1f}{margin}"


def _shapes(report: RunReport, names: Sequence[str]) -> list[str]:
    """A table of one part: milliseconds a call, ratios, share of the ceiling, verdicts."""
    shown = [*names, PEERS, EAGER]
    head = ["batch × sequence", *(f"{name}, ms" for name in shown), "best peer",
            *(f"{name}: throughput over it" for name in names),
            *(f"{name}: share of GEMM" for name in FP32), "unstable"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for work in dict.fromkeys(r.cell.work() for r in report.rows):
        rows = {name: _row(report, name, work) for name in shown}
        best = _best(report, work)
        unstable = [n for n, r in rows.items() if r.verdict.word != "stable"]
        lines.append("| " + " | ".join([
            work, *(_pace(row) for row in rows.values()),
            "eager" if best.cell.subject.endswith(EAGER) else "optimum-onnx",
            *(_interval(_speed(report, rows[name], best)) for name in names),
            *(_share(rows[name]) for name in FP32),
            ", ".join(unstable) or "none"]) + " |")
    return lines


def _share(row: Row) -> str:
    return f"{row.share.of_gemm:.0%}" if row.share and row.share.of_gemm else "–"


def _targets(reports: dict[str, RunReport]) -> list[str]:
    """Each target, what was measured, and whether that reaches it."""
    lines = []
    if report := reports.get("batches"):
        for name in FP32:
            least = min((_speed(report, _row(report, name, work), _best(report, work)).value, work)
                        for work in dict.fromkeys(r.cell.work() for r in report.rows))
            lines.append(_judged(f"{name} ≥ {FP32_OF_PEERS} × the best peer at every batch size",
                                 least[0], FP32_OF_PEERS, f"least at {least[1]}"))
    if report := reports.get("shapes"):
        for work in ("8×128", "32×128"):
            for name in FP32:
                share = _row(report, name, work).share
                if share and share.of_gemm:
                    lines.append(_judged(f"{name} ≥ {OF_GEMM:.0%} of the GEMM ceiling at {work}",
                                         share.of_gemm, OF_GEMM))
            speed = _speed(report, _row(report, "int8", work), _best(report, work))
            lines.append(_judged(f"int8 ≥ {RECOMMENDED} × the best peer's fp32 at {work}",
                                 speed.value, RECOMMENDED, _interval(speed)))
    if report := reports.get("corpus"):
        packed, plain = (_row(report, "int8", work) for work in ("token-budget 4096", "padded 32"))
        assert packed.padding is not None
        lines.append(_judged(f"token-budget pads ≤ {PADDING:.0%}", -packed.padding, -PADDING,
                             f"{packed.padding:.1%}"))
        speed = _speed(report, packed, plain)
        lines.append(_judged(f"token-budget ≥ {PACKED} × batches of 32 in file order",
                             speed.value, PACKED))
    return lines


def _judged(target: str, value: float, bound: float, note: str = "") -> str:
    word = "reached" if value >= bound else "**missed**"
    return f"- {target}: {word}, {abs(value):.3g}" + (f" ({note})" if note else "")


def report() -> str:
    reports = {part: benchmark.load_report(WORK / f"run-{part}") for part in PARTS
               if (WORK / f"run-{part}" / "benchmark.json").exists()}
    lines = ["# Speed beside eager PyTorch and optimum-onnx", "",
             "Written by `python benchmarks/speed.py report`. CamemBERT-base, text classification, "
             "seeded weights: fp32 and int8 are ONNX artifacts in ONNX Runtime, aotinductor "
             "is one in float32, too; the other exporter's file in the same sweep. ± and "
             "brackets: 95 % over processes, where there are enough.", ""]
    for part, found in reports.items():
        notes = (f"- {line}" for line in benchmark.footnotes(found))
        lines += [f"## {part}, rounds: {found.rounds}", "", *notes, ""]
        if part != "corpus":
            lines += [*_shapes(found, MEASURED[part]), ""]
        else:
            lines += ["| int8 | sentences/s | tokens/s | padding |", "| --- | --- | --- | --- |"]
            for row in found.rows:
                assert row.throughput is not None
                lines.append(f"| {row.cell.work()} | {row.throughput.value:.2f} | "
                             f"{row.tokens:.0f} | {row.padding:.1%} |")
            lines.append("")
    lines += ["## Targets", "", *_targets(reports), ""]
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.md").write_text(text, encoding="utf-8")
    raw = {part: published(json.loads((WORK / f"run-{part}" / "benchmark.json").read_text()))
           for part in reports}
    (RESULTS / "speed.json").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on another time")
    parser.add_argument("--peer", type=Path, help="interpreter that has optimum-onnx already")
    chosen = parser.parse_args(arguments)
    if chosen.part == "report":
        print(report())
        return 0
    exports(chosen.peer)
    try:
        measure(chosen.part, chosen.rounds, chosen.minutes)
    except TimeUp as pause:
        print(f"stopped at {pause}; the same command goes on from there", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
