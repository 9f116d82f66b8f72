"""``modelport bench ARTIFACT...``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import click

from ..console import Output
from ..errors import ParityError
from ._shared import DEVICE, FILE, SETTINGS, common, percent, sizes


@click.command(context_settings=SETTINGS)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@click.option("--baseline", help="Model to compare with, run eagerly.")
@click.option("--baseline-weights", type=click.Choice(["pretrained", "random"]),
              default="pretrained", show_default=True)
@DEVICE
@click.option("--runtimes", "runtime_names", help="Names, such as onnxruntime,openvino.")
@click.option("--batch-sizes", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--seq-lens", default="16,128,384", show_default=True)
@click.option("--threads", default=None, help="Thread counts, such as 1,2; default: all cores.")
@click.option("--batching", help="Cut a corpus: padded,sorted,token-budget.")
@click.option("--corpus", type=FILE,
              help="Text, one sentence a line; default: the built-in lengths.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True,
              help="Fresh processes for each cell; claims need 5.")
@click.option("--seconds", type=click.FloatRange(0), default=10.0, show_default=True,
              help="Sampling time of one cell.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0,
              show_default=True, help="Seconds until a cell is killed.")
@click.option("--memory-limit", type=click.FloatRange(0, min_open=True), metavar="GB")
@click.option("--p95", type=click.FloatRange(0, min_open=True), metavar="MS",
              help="Recommend the best within this latency.")
@click.option("--against", type=click.Path(exists=True, path_type=Path),
              help="An older run, or an artifact with a benchmark.")
@click.option("--max-regression", callback=percent, default="5%", show_default=True)
@click.option("--output", "destination", type=click.Path(path_type=Path), default="run",
              show_default=True, help="Where cells and the report are kept.")
@click.option("--self-test", is_flag=True, help="Show that the statistics hold what they say.")
@common
def bench(
    output: Output, paths: tuple[Path, ...], destination: Path, self_test: bool,
    against: Path | None, max_regression: float, **chosen: Any,
) -> int:
    """Measure artifacts against their source and say which one to deploy."""
    from .. import pipeline
    from ..runtimes import benchmark

    if self_test:
        test = benchmark.self_test()
        output.result(dataclasses.asdict(test), lambda: "\n".join(test.lines()))
        return 0 if test.passed else 1
    if not paths:
        raise click.UsageError("name at least one artifact")
    with output.progress() as notify:
        report = pipeline.bench(paths, destination, _grid(**chosen), notify=notify)
    output.result(
        json.loads((destination / "benchmark.json").read_text(encoding="utf-8")),
        lambda: benchmark.renderable(report),
    )
    if against is not None:
        comparison = pipeline.against(report, against, max_regression)
        output.aside(benchmark.comparison_renderable(comparison))
        if comparison.past_limit:
            return ParityError.exit_code
    report.require_complete()
    return 0


def _grid(
    *, baseline: str | None, baseline_weights: str, device: str, runtime_names: str | None,
    batch_sizes: str, seq_lens: str, threads: str | None, batching: str | None,
    corpus: Path | None, rounds: int, seconds: float, timeout: float,
    memory_limit: float | None, p95: float | None,
) -> Any:
    """What to measure, from the options of ``bench``."""
    from .. import pipeline
    from ..runtimes import benchmark

    names = {"runtimes": tuple(runtime_names.split(","))} if runtime_names else {}
    weights: Any = baseline_weights
    return pipeline.Grid(
        baseline=pipeline.ModelRequest(baseline, weights=weights) if baseline else None,
        corpus=corpus,
        sweep={
            "devices": (device,),
            "batches": sizes(batch_sizes),
            "sequences": sizes(seq_lens),
            "threads": sizes(threads) or (os.cpu_count() or 1,),
            "batchings": tuple(batching.split(",")) if batching else (),
            "rounds": rounds,
            "sampling": benchmark.Sampling(seconds=seconds),
            "timeout": timeout,
            "memory_limit": int(memory_limit * 1e9) if memory_limit else None,
            "p95_limit": p95 / 1e3 if p95 else None,
        },
        **names,
    )


COMMAND = bench
