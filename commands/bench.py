"""``modelport bench ARTIFACT...``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ..console import Output
from ..errors import ParityError, UsageError
from ._shared import (
    DEVICE,
    FILE,
    SETTINGS,
    common,
    percent,
    refuse_given,
    sizes,
    source_options,
)

SCENARIOS = {"single-stream": "SingleStream", "multi-stream": "MultiStream", "server": "Server",
             "offline": "Offline"}
BATCHINGS = ("padded", "sorted", "token-budget")
GENERATING = ("new_tokens", "eager")
"""Options of models that generate."""
OF_ONE_GRAPH = (
    "runtime_names", "batching", "corpus", "token_budget", "scenario", "duration", "target_rate",
    "target_latency", "samples", "seconds", "memory_limit", "p95",
)
"""Options that are not theirs."""
OF_SENTENCES = ("seq_lens", "batching", "corpus", "scenario")
"""Options of models that read tokens."""
SAMPLES = 140
"""Calls of a cell: five processes then support a 99th percentile, which takes 662."""


class _Bench(click.Command):
    """``bench``, but for the one model whose optimisations have options of their own."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        from . import _combinations

        if _combinations.FLAG in args:
            return _combinations.combinations.make_context(info_name, args, *rest, **extra)
        return super().make_context(info_name, args, *rest, **extra)


@click.command(cls=_Bench, context_settings=SETTINGS)
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@click.option("--baseline", help="Model to compare with, run eagerly.")
@click.option("--baseline-revision", "--revision", "baseline_revision",
              help="Commit, tag or branch of a hub model as --baseline.")
@click.option("--baseline-weights", "--weights", "baseline_weights",
              type=click.Choice(["pretrained", "random"]), default="pretrained", show_default=True)
@DEVICE
@click.option("--runtimes", "runtime_names",
              help="Names, with options where wanted: onnxruntime,openvino:precision=bf16,"
                   "torch_eager:dtype=bfloat16.")
@click.option("--batch-sizes",
              help="Default: 1,2,4,8,16,32,64; 32 where only a corpus is measured; 1,8,64 for a "
                   "model that generates.")
@click.option("--seq-lens",
              help="Default: 16,128,384; none where only a corpus is measured; prompts of "
                   "16,128,512 for a model that generates.")
@click.option("--new-tokens", type=click.IntRange(2), default=32, show_default=True,
              help="To generate, for models that do.")
@click.option("--eager", "eager", default="dynamic,static,compiled", show_default=True,
              help="How transformers generates beside them, or none.")
@click.option("--threads", default=None,
              help="Thread counts, such as 1,2; default: every core this process may use.")
@click.option("--batching", help="Measure a corpus, cut like this: padded,sorted,token-budget.")
@click.option("--corpus", type=FILE,
              help="Text, one sentence a line; default: the built-in lengths.")
@click.option("--token-budget", type=click.IntRange(1), default=4096, show_default=True,
              help="Most padded tokens of a batch, for token-budget.")
@click.option("--scenario", help="Drive with MLPerf's load generator: " + ",".join(SCENARIOS) + ".")
@click.option("--duration", type=click.FloatRange(0, min_open=True), default=60.0,
              show_default=True, help="Seconds of a scenario.")
@click.option("--target-rate", type=click.FloatRange(0, min_open=True), metavar="PER SECOND",
              help="Sentences sent in scenario server; default: half of what single calls sustain.")
@click.option("--target-latency", type=click.FloatRange(0, min_open=True), metavar="MS",
              default=100.0, show_default=True, help="For 99 % of the answers in scenario server.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True,
              help="Fresh processes for each cell; claims need 5.")
@click.option("--samples", type=click.IntRange(11), default=SAMPLES, show_default=True,
              help="Timed calls of one cell; p99 needs 662 over all rounds.")
@click.option("--seconds", type=click.FloatRange(0), default=10.0, show_default=True,
              help="After so long a cell is sampled no more, once it has 11 samples.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0,
              show_default=True,
              help="Seconds until a cell is killed; of a model that generates, for each shape.")
@click.option("--memory-limit", type=click.FloatRange(0, min_open=True), metavar="GB")
@click.option("--p95", type=click.FloatRange(0, min_open=True), metavar="MS",
              help="Recommend the best within this latency.")
@click.option("--against", type=click.Path(exists=True, path_type=Path),
              help="An older run, or an artifact with a benchmark.")
@click.option("--max-regression", callback=percent, default="5%", show_default=True,
              help="Of --against: exit code 3 where something is surely slower by more.")
@click.option("--output", "destination", type=click.Path(path_type=Path), default="run",
              show_default=True, help="Where cells and the report are kept.")
@click.option("--any-kind", is_flag=True,
              help="Pass over options that are only for models of another kind: that generate, "
                   "that do not, or that read tokens.")
@click.option("--self-test", is_flag=True, help="Show that the statistics hold what they say.")
@source_options
@common
def bench(
    output: Output, paths: tuple[Path, ...], destination: Path, self_test: bool,
    any_kind: bool, against: Path | None, max_regression: float, new_tokens: int, eager: str,
    **chosen: Any,
) -> int:
    """Measure artifacts against their source and say which one to deploy.

    An artifact that generates is measured beside its source in transformers, prefill and decode
    apart. ``bench bark --combinations`` measures what each optimisation of Bark brings instead.

    Beside artifacts, ARTIFACT may be a bare model file that somebody else made.
    """
    from .. import pipeline
    from ..runtimes import benchmark

    if self_test:
        test = benchmark.self_test()
        output.result(dataclasses.asdict(test), lambda: "\n".join(test.lines()))
        return 0 if test.passed else 1
    if not paths:
        raise click.UsageError("name at least one artifact")
    if chosen["baseline"] is None:
        refuse_given("goes with --baseline", "baseline_revision", "baseline_weights")
    generates = pipeline.generates(paths[0])
    if any_kind:  # what is for models of another kind is passed over
        if not generates and not pipeline.takes_sequence(paths[0]):
            chosen |= dict.fromkeys(OF_SENTENCES)
    elif generates:
        refuse_given(f"cannot be used with {paths[0]}, a model that generates", *OF_ONE_GRAPH)
    else:
        refuse_given(f"cannot be used with {paths[0]}, which is one graph", *GENERATING)
    # Read before anything is measured: it may lie where the new report goes.
    past = None if against is None else _past(against, destination)
    report: Any
    with output.progress() as notify:
        if generates:
            file = destination / benchmark.GENERATION
            grid = _generation(new_tokens=new_tokens, eager=eager, **chosen)
            report = pipeline.bench_generation(paths, destination, grid, notify=notify)
        else:
            file = destination / benchmark.REPORT
            report = pipeline.bench(paths, destination, _grid(**chosen), notify=notify)
    output.result(json.loads(file.read_text(encoding="utf-8")),
                  lambda: benchmark.renderable(report))
    if past is not None:
        comparison = benchmark.compare_runs(report, past, max_regression=max_regression)
        output.aside(benchmark.comparison_renderable(comparison))
        if not comparison.changes:
            # What failed or is invalid says more than that nothing is left to compare.
            report.require_complete()
            report.require_valid()
        comparison.require_counterparts(against)
        if comparison.past_limit:
            return ParityError.exit_code
    report.require_complete()
    report.require_valid()
    return 0


def _past(against: Path, destination: Path) -> Any:
    """The older report; a run cannot be compared with itself."""
    from ..runtimes import benchmark

    run = against if against.is_dir() else against.parent
    if run.resolve() == destination.resolve():
        raise UsageError(f"{against} is where this run goes, and would be replaced",
                         hint="another --output")
    return benchmark.load_report(against)


def _baseline(model: str | None, revision: str | None, weights: Any) -> Any:
    """The model that ``--baseline`` names, with what is allowed for this command."""
    from .. import pipeline
    from ..checkpoints import consent

    if model is None:
        return None
    return pipeline.ModelRequest(model, revision=revision, weights=weights,
                                 **dataclasses.asdict(consent.given()))


def _cores(threads: str | None) -> tuple[int, ...]:
    from ..runtimes import benchmark

    return sizes(threads) or (benchmark.cores(),)


def _generation(
    *, new_tokens: int, eager: str, baseline: str | None, baseline_revision: str | None,
    baseline_weights: Any, device: str, batch_sizes: str | None, seq_lens: str | None,
    threads: str | None, rounds: int, timeout: float, **_: Any,
) -> Any:
    """What to measure of models that generate, from the options of ``bench``."""
    from .. import pipeline
    from ..runtimes import benchmark

    shapes = tuple(benchmark.Shape(batch, prompt, new_tokens)
                   for batch in sizes(batch_sizes or "1,8,64")
                   for prompt in sizes(seq_lens or "16,128,512"))
    cores = _cores(threads)
    if len(cores) > 1:
        raise click.BadParameter("one thread count at a time, for models that generate")
    return pipeline.GenerationGrid(
        shapes,
        _baseline(baseline, baseline_revision, baseline_weights),
        () if eager == "none" else tuple(eager.split(",")),
        {"rounds": rounds, "threads": cores[0], "device": device, "timeout": timeout})


def _grid(
    *, baseline: str | None, baseline_revision: str | None, baseline_weights: str, device: str,
    runtime_names: str | None, batch_sizes: str | None, seq_lens: str | None, threads: str | None,
    batching: str | None, corpus: Path | None, token_budget: int, rounds: int, samples: int,
    seconds: float, timeout: float, memory_limit: float | None, p95: float | None, **traffic: Any,
) -> Any:
    """What to measure, from the options of ``bench``."""
    from .. import pipeline
    from ..runtimes import benchmark

    names = {"runtimes": tuple(runtime_names.split(","))} if runtime_names else {}
    loads = _traffic(**traffic)
    batchings = _chosen(batching, BATCHINGS)
    if corpus is not None and not (batchings or loads):
        batchings = BATCHINGS
    shapes = seq_lens is not None or not (batchings or loads)
    usual = {"batch": batch_sizes, "sequence": seq_lens}
    return pipeline.Grid(
        usual=tuple(axis for axis, given in usual.items() if given is None),
        baseline=_baseline(baseline, baseline_revision, baseline_weights),
        corpus=corpus,
        sweep={
            "devices": (device,),
            "batches": sizes(batch_sizes or "1,2,4,8,16,32,64") if shapes else (),
            "sequences": sizes(seq_lens or "16,128,384") if shapes else (),
            "threads": _cores(threads),
            "batchings": batchings,
            "corpus_batches": sizes(batch_sizes or "32"),
            "budgets": (token_budget,),
            "traffic": loads,
            "rounds": rounds,
            "sampling": benchmark.Sampling(samples=samples, seconds=seconds),
            "timeout": timeout,
            "memory_limit": int(memory_limit * 1e9) if memory_limit else None,
            "p95_limit": p95 / 1e3 if p95 else None,
        },
        **names,
    )


def _traffic(
    *, scenario: str | None, duration: float, target_rate: float | None, target_latency: float
) -> tuple[Any, ...]:
    from ..runtimes import benchmark

    return tuple(
        benchmark.Traffic(SCENARIOS[name], duration, rate=target_rate, limit=target_latency / 1e3)
        for name in _chosen(scenario, tuple(SCENARIOS))
    )


def _chosen(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """A comma-separated choice."""
    found = tuple(text.split(",")) if text else ()
    if unknown := [name for name in found if name not in known]:
        raise click.BadParameter(f"{', '.join(unknown)} is none of {', '.join(known)}")
    return found


COMMAND = bench
