"""CamemBERT-base sentence classification: PyTorch, TorchScript and ONNX by batch size.

    make article                       # or: python benchmarks/article.py --sentences 1000 --runs 5

Sentences of mixed lengths in batches of 1 to 64, in file order and sorted by length, several runs,
each pass a process of its own. Every finished pass is kept below ``.bench/camembert``: stopped at
any point, the same command goes on from there. Writes ``benchmarks/camembert/``: README.md with the
table of each machine measured so far, the claims of the article and what was found of them; the
plots; the raw results. Where torch sees a GPU, the same command adds it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _resumable import TimeUp, file_name, published, until
from modelport import pipeline, runtimes
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.records import CellResult
from modelport.runtimes.benchmark.report import Row, RunReport
from modelport.runtimes.benchmark.summary import paces
from pydantic import TypeAdapter

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench" / "camembert"
RESULTS = HERE / "camembert"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ORDERS = {"padded": "unsorted", "sorted": "sorted"}
FORMATS = {"torch_eager": "PyTorch", "torchscript": "TorchScript", "onnxruntime": "ONNX"}
SMALL = (1, 2, 4)
TOGETHER = 1.10
MODEL = pipeline.ModelRequest("camembert-base", task="text-classification", weights="random")


@dataclass(frozen=True, slots=True)
class Found:
    """One machine's report, addressed by format, order and batch size."""

    device: str
    report: RunReport

    @property
    def processor(self) -> str:
        environment = self.report.environment
        return environment.gpus[0]["name"] if self.device == "cuda" else environment.cpu

    @property
    def name(self) -> str:
        """Part of its files' names."""
        return f"{self.device}-{file_name(self.processor)}"

    @property
    def sentences(self) -> int:
        return next(r.corpus.sentences for r in self.report.results if r.corpus)

    def row(self, runtime: str, order: str, batch: int) -> Row:
        return next(
            r for r in self.report.rows
            if (r.cell.runtime, r.cell.batching, r.cell.batch) == (runtime, order, batch))

    def rounds(self, runtime: str, order: str, batch: int) -> dict[int, Any]:
        """Seconds per sentence by run."""
        def mine(result: CellResult) -> bool:
            cell = result.cell
            return not cell.twin and (
                (cell.runtime, cell.batching, cell.batch) == (runtime, order, batch))

        return paces(filter(mine, self.report.results))

    def ratio(self, above: tuple[str, str, int], below: tuple[str, str, int]) -> st.Interval:
        """Time of one setting over that of another."""
        return st.ratio(self.rounds(*above), self.rounds(*below))

    @property
    def formats(self) -> list[str]:
        return [name for name in FORMATS if name not in self.missing]

    @property
    def missing(self) -> dict[str, str]:
        """Formats that were not measured in each setting, and why."""
        return {name: row.detail for name in FORMATS for row in self.report.rows
                if row.cell.runtime == name and row.pace is None}


def artifacts(device: str) -> list[Path]:
    """The two artifacts, exported and proven unless that was done before."""
    found = []
    for name in ("onnx", "torchscript"):
        out = WORK / (name if name == "onnx" else f"{name}-{device}")
        if not (out / "manifest.json").exists():
            options = [] if name == "onnx" else ["--device", device]
            command = ["export", name, "--model", MODEL.model, "--weights", MODEL.weights,
                       "--task", str(MODEL.task), "--output", str(out), *options]
            _modelport(command)
        found.append(out)
    return found


def _modelport(command: Sequence[str]) -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "modelport", *command], check=True)


def measure(device: str, sentences: int, runs: int, minutes: float | None) -> Found:
    report = pipeline.bench(
        artifacts(device), WORK / f"run-{device}-{sentences}",
        pipeline.Grid(
            baseline=MODEL, runtimes=tuple(FORMATS),
            sweep={
                "devices": (device,), "batches": (), "sequences": (),
                "threads": (_threads(device),), "batchings": tuple(ORDERS),
                "corpus_batches": BATCHES, "corpus": benchmark.built_in(0, sentences),
                "rounds": runs, "sampling": benchmark.Sampling(warmup=0), "timeout": 3600.0,
                "measure_ceilings": False,
            },
        ),
        notify=until(minutes),
    )
    found = Found(device, report)
    if not found.formats:
        report.require_complete()  # there is nothing to show
    return found


def _threads(device: str) -> int:
    import os

    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def table(found: Found) -> list[str]:
    """Milliseconds per sentence and sorting's gain, a line a batch size."""
    names = found.formats
    head = ["batch", "padding, unsorted", "padding, sorted"]
    for order in ORDERS.values():
        head += [f"{FORMATS[n]}, {order}" for n in names]
    head += [f"gain of sorting, {FORMATS[n]}" for n in names]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for batch in BATCHES:
        cells = [str(batch)]
        cells += [f"{found.row(names[0], order, batch).padding or 0:.0%}" for order in ORDERS]
        for order in ORDERS:
            rows = [found.row(name, order, batch) for name in names]
            cells += [_milliseconds(row) for row in rows]
        for name in names:
            cells.append(_times(found.ratio((name, "padded", batch), (name, "sorted", batch))))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _milliseconds(row: Row) -> str:
    assert row.pace is not None
    mark = "" if row.verdict.word == "stable" else " †" if row.verdict.word == "unstable" else " ‡"
    margin = f" ± {row.pace.margin:.1%}" if row.pace.basis == "processes" else ""
    return f"{row.pace.value * 1e3:.1f}{margin}{mark}"


def _times(ratio: st.Interval) -> str:
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)):
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def claims(found: Found) -> list[str]:
    """The article's claims and what was found of each, in words that follow from the figures."""
    if found.missing:
        return ["Not judged: " + ", ".join(FORMATS[name] for name in found.missing)
                + " was not measured in each setting.", ""]
    return [*_ahead(found), *_together(found), *_growing(found)]


def _ahead(found: Found) -> list[str]:
    lines = ["**ONNX is ahead at small batches on CPU.** Time of ONNX over that of the others, "
             "unsorted:", ""]
    seen = sure = True
    for batch in SMALL:
        shown = []
        for name in found.formats:
            if name == "onnxruntime":
                continue
            ratio = found.ratio(("onnxruntime", "padded", batch), (name, "padded", batch))
            seen &= ratio.value < 1
            sure &= ratio.high < 1
            shown.append(f"{_times(ratio)} of {FORMATS[name]}")
        lines.append(f"- batch {batch}: {', '.join(shown)}")
    if sure:
        word = "Confirmed: each interval lies below 1."
    elif seen:
        word = ("Seen in each, but not every interval excludes 1, which also depends on the number "
                f"of runs (here {found.report.rounds}).")
    else:
        word = "Not confirmed."
    return [*lines, "", word, ""]


def _together(found: Found) -> list[str]:
    lines = ["**The formats are within 10 % of each other at batch 64.** Slowest over fastest:", ""]
    held = True
    for order, shown in ORDERS.items():
        times = {name: found.row(name, order, 64).pace for name in found.formats}
        values = {name: pace.value for name, pace in times.items() if pace}
        slow, fast = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        ratio = found.ratio((slow, order, 64), (fast, order, 64))
        held &= ratio.value <= TOGETHER
        lines.append(f"- {shown}: {_times(ratio)} ({FORMATS[slow]} over {FORMATS[fast]})")
    return [*lines, "", "Confirmed." if held else "Not confirmed.", ""]


def _growing(found: Found) -> list[str]:
    lines = ["**What sorting gains grows with the batch size.** Time unsorted over sorted; beside "
             "it the ratio of token slots computed, padding included:", ""]
    held = True
    for name in found.formats:
        gains = [found.ratio((name, "padded", b), (name, "sorted", b)).value for b in BATCHES]
        held &= gains == sorted(gains)
        lines.append(f"- {FORMATS[name]}: " + ", ".join(
            f"{gain:.2f}" for gain in gains))
    slots = []
    for batch in BATCHES:
        kept = [1 - (found.row(found.formats[0], order, batch).padding or 0) for order in ORDERS]
        slots.append(kept[1] / kept[0])
    lines.append("- token slots: " + ", ".join(f"{ratio:.2f}" for ratio in slots))
    word = "Confirmed." if held else "Not confirmed throughout: it does not rise at every step."
    if slots != sorted(slots):
        word += (" The token slots say why: cut from so many sentences, even a sorted batch of the "
                 "largest size holds long and short ones alike.")
    return [*lines, "", f"Batch sizes {', '.join(map(str, BATCHES))}. {word}", ""]


def plots(found: Found) -> dict[str, dict[str, Any]]:
    """Vega-Lite specifications by file name."""
    import altair as alt

    values = []
    for name in found.formats:
        for order, shown in ORDERS.items():
            for batch in BATCHES:
                pace = found.row(name, order, batch).pace
                assert pace is not None
                values.append({"format": FORMATS[name], "order": shown, "batch": batch,
                               "ms": pace.value * 1e3, "low": pace.low * 1e3,
                               "high": pace.high * 1e3})
    gains = [
        {"format": FORMATS[name], "batch": batch, "ms": found.ratio(
            (name, "padded", batch), (name, "sorted", batch)).value}
        for name in found.formats for batch in BATCHES
    ]
    axis = alt.X("batch:Q", title="batch size", scale=alt.Scale(type="log", base=2),
                 axis=alt.Axis(values=list(BATCHES), format="d"))
    colour = alt.Color("format:N", title=None, sort=list(FORMATS.values()))

    def lines(title: str) -> Any:
        return alt.Chart().mark_line(point=True).encode(
            x=axis, y=alt.Y("ms:Q", title=title, scale=alt.Scale(zero=True)), color=colour)

    whiskers = alt.Chart().mark_rule().encode(x=axis, y="low:Q", y2="high:Q", color=colour)
    both = alt.layer(whiskers, lines("ms per sentence")).properties(width=320, height=240)
    time = both.facet(data=alt.InlineData(values=values),
                      facet=alt.Facet("order:N", title=None, sort=list(ORDERS.values())))
    gain = lines("time unsorted / time sorted").properties(
        data=alt.InlineData(values=gains), width=420, height=240)
    return {"time": time.to_dict(), "gain": gain.to_dict()}


def write(found: Sequence[Found], absent: Sequence[tuple[str, str]]) -> str:
    """Keep what was found, and write the page on every machine whose results are kept."""
    RESULTS.mkdir(exist_ok=True)
    for one in found:
        raw = WORK / f"run-{one.device}-{one.sentences}" / "benchmark.json"
        plain = json.dumps(published(json.loads(raw.read_text("utf-8"))))
        # A time for each batch and run: two megabytes, packed a quarter of that.
        (RESULTS / f"results-{one.name}.json.gz").write_bytes(
            gzip.compress(plain.encode(), mtime=0))
    kept = [_kept(file) for file in sorted(RESULTS.glob("results-*.json.gz"))]
    lines = [
        "# CamemBERT-base sentence classification by batch size",
        "",
        "Written by `make article` (`benchmarks/article.py`), which goes on where it was stopped.",
        "CamemBERT-base (110 M parameters, fp32, seeded weights), sentences of mixed lengths "
        "(log-normal, median 20 tokens, 95th percentile 120, longest 512; the same distribution "
        "whatever their number), each pass in a process of its own, runs interleaved. Tokenisation "
        "is not included. The whole experiment is 1,000 sentences and 5 runs (`make article` "
        "without arguments).",
        "",
    ]
    for one in kept:
        lines += _section(one)
    have = {one.device for one in kept}
    lines += [f"## {name}\n\nNot measured: {why}.\n" for name, why in absent if name not in have]
    text = "\n".join(lines)
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    return text


def _kept(file: Path) -> Found:
    report = TypeAdapter(RunReport).validate_json(gzip.decompress(file.read_bytes()))
    return Found(report.rows[0].cell.device, report)


def _section(one: Found) -> list[str]:
    """One machine's part of the page; writes its plots."""
    import vl_convert

    runs = one.report.rounds
    # Its load is that of now, not of the days in which the runs were made.
    steady = (line for line in one.report.environment.lines()
              if not line.startswith("load"))
    lines = [f"## {one.processor}: {one.sentences:,} sentences, {runs} runs", ""]
    if (one.sentences, runs) != (1000, 5):
        lines += ["**This is not the whole experiment.**", ""]
    lines += [*(f"- {line}" for line in steady),
              *(f"- noise floor {floor:.1%} (the same model measured twice)"
                for floor in one.report.floors.values()), "",
              "Milliseconds per sentence ± the 95 % interval over runs (from 3 runs on); "
              "brackets are 95 % intervals too; † unstable, ‡ invalid.",
              "", *(f"Left out: {FORMATS[name]}: {why}\n" for name, why in one.missing.items()),
              *table(one), ""]
    for name, spec in plots(one).items():
        file = RESULTS / f"{name}-{one.name}.svg"
        file.write_text(vl_convert.vegalite_to_svg(json.dumps(spec)), encoding="utf-8")
        lines += [f"![{name}]({file.name})", ""]
    return [*lines, "### The article's claims", "", *claims(one)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on another time")
    chosen = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    found, absent = [], []
    for device in ("cpu", "cuda"):
        why = runtimes.get("torch_eager").unavailable(device)
        if why:
            absent.append((device, why))
            continue
        try:
            found.append(measure(device, chosen.sentences, chosen.runs, chosen.minutes))
        except TimeUp as pause:
            print(f"stopped at {pause}; the same command goes on from there", file=sys.stderr)
            return 75
    print(write(found, absent))
    for one in found:
        one.report.require_complete()
    return 0


if __name__ == "__main__":
    sys.exit(main())
