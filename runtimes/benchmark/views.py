"""A report for people: the terminal and Markdown. The page is in :mod:`.page`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from . import statistics as st
    from .against import RunComparison
    from .ceilings import Ceilings
    from .reading import Report
    from .records import Load
    from .report import Loaded, Recommendation, Row

SHAPES = ("artifact", "runtime", "device", "batch", "p50", "device p50", "with copies", "p95",
          "p99", "rows/s", "against", "peak memory", "of GEMM", "nodes there", "verdict", "parity")
PASSES = ("artifact", "runtime", "device", "batching", "per sentence", "latency p50",
          "latency p95", "sentences/s", "with text", "tokens/s", "padding", "against",
          "peak memory", "verdict", "parity")
LOAD = ("artifact", "runtime", "device", "scenario", "result", "figure", "why", "parity")
MEMORY = ("artifact", "runtime", "device", "work", "peak", "weights", "activations", "GPU",
          "GPU allocated", "GPU reserved")
COLD = ("artifact", "runtime", "device", "work", "open", "first call", "second call", "warm")

TIES = 3
"""Rows that cannot be told from the recommended one, named in a table; the JSON has all."""

SPARE = (
    "p99", "latency p95", "latency p50", "with copies", "nodes there", "device p50",
    "not told apart", "second call", "with text", "peak memory", "p95", "device", "of GEMM",
    "tokens/s", "note", "why", "runtime",
)
"""Columns that a narrow terminal can do without, the least needed first."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells, before any markup."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without(self, names: Collection[str] = ()) -> Table:
        """Without these columns, and those that are empty throughout."""
        keep = [i for i, name in enumerate(self.columns)
                if name not in names and any(row[i] for row in self.rows)]
        return Table(self.title, tuple(self.columns[i] for i in keep),
                     tuple(tuple(row[i] for i in keep) for row in self.rows))


def tables(report: Report) -> tuple[Table, ...]:
    """Everything a report shows as tables, in reading order: the answer first."""
    from . import generation_views
    from .generation import GenerationReport

    if isinstance(report, GenerationReport):
        return generation_views.tables(report)
    found = []
    if report.recommendations:
        found.append(Table(
            "Recommendations",
            ("workload", "objective", "use", "figure", "not told apart", "note"),
            tuple(map(_advice, report.recommendations))))
    for workload in dict.fromkeys(r.workload for r in report.rows):
        rows = [r for r in report.rows if r.workload == workload]
        corpus = rows[0].cell.batching is not None
        columns = PASSES if corpus else SHAPES
        make = _pass if corpus else _shape
        title = f"{workload}: against {report.reference}"
        found.append(Table(title, columns, tuple(make(r) for r in rows)))
    if report.loads:
        known = {line.load.version for line in report.loads if line.load}
        found.append(Table(" ".join(["MLPerf LoadGen", *sorted(known)]), LOAD,
                           tuple(map(_load, report.loads))))
    largest = {(r.cell.column, r.workload): r for r in report.rows if r.memory}
    smallest = {r.cell.column: r for r in reversed(report.rows) if r.cold and r.p50}
    named = (("Memory (resident, at the largest work)", MEMORY, map(_footprint, largest.values())),
             ("Cold start (a fresh process)", COLD, map(_cold, reversed(smallest.values()))))
    return (*found, *(Table(title, columns, lines) for title, columns, made in named
                      if (lines := tuple(made))))


def footnotes(report: Report) -> tuple[str, ...]:
    """What a reader must know to trust the figures."""
    from . import generation_views
    from .generation import GenerationReport

    if isinstance(report, GenerationReport):
        return generation_views.notes(report)
    lines = [*report.environment.lines()]
    for top in report.ceilings:
        rates = ", ".join(_rate(top, dtype) for dtype in top.gemm)
        often = ", anew in each round (geometric mean, least to most)" if top.ranges else ""
        lines.append(f"ceiling on {top.device}, {top.threads} threads{often}: GEMM {rates}; "
                     f"memory {top.bandwidth / 1e9:.1f} GB/s")
    for place, floor in report.floors.items():
        lines.append(f"noise floor on {place.replace('/', ', ')} threads: {floor:.1%} "
                     "(same artifact measured twice)")
    lines.append(f"p50: geometric mean of the medians of {report.rounds} processes; ± is the 95 % "
                 "interval over processes; percentiles are of the pooled samples")
    lines += [f"{line.cell.label()}: INVALID: {_why(line.load)}"
              for line in report.loads if line.load and not line.load.valid]
    if report.corpus:
        lines.append(f"corpus: {report.corpus}; time per sentence is that of the pass over their "
                     "number, a sentence's latency that of the batch it was in")
    if report.tokenise_seconds:
        times = sorted(report.tokenise_seconds)
        lines.append(f"tokenising the corpus takes {quantity(times[len(times) // 2], 's')} "
                     f"(median of {len(times)}); \"with text\" includes it")
    lines.append("* on the front of latency, throughput and memory")
    lines += report.notes
    if report.failed:
        lines.append(f"{len(report.failed)} of {len(report.results)} measurements failed")
    return tuple(lines)


def _rate(top: Ceilings, dtype: str) -> str:
    least, most = top.ranges.get(dtype, (0.0, 0.0))
    spread = f", {least / 1e9:.0f} to {most / 1e9:.0f}" if most else ""
    library = top.libraries.get(dtype, "torch")
    return f"{dtype} {top.gemm[dtype] / 1e9:.0f} G/s ({library}{spread})"


def renderable(report: Report) -> RenderableType:
    """All tables and notes, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    notes = [Text(line, style="dim") for line in footnotes(report)]
    return Group(*map(_Fitting, tables(report)), *notes)


def comparison_renderable(comparison: RunComparison) -> RenderableType:
    """What changed between two runs, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    notes = [] if comparison.same_machine else ["the two runs were made in different environments"]
    notes += [f"{what}: {', '.join(labels)}" for what, labels in (
        ("only in the new run", comparison.only_new), ("only in the old run", comparison.only_old),
        ("the old run's own samples", comparison.repeated)) if labels]
    return Group(_Fitting(comparison_table(comparison)),
                 *(Text(line, style="yellow") for line in notes))


def comparison_table(comparison: RunComparison) -> Table:
    """New against old, slowest first."""
    ordered = sorted(comparison.changes, reverse=True,
                     key=lambda c: c.comparison.ratio.value if c.comparison.ratio else 0.0)
    return Table(
        "new against old", ("work", "time", "claim", "why"),
        tuple((c.label, _bounds(c.comparison),
               c.comparison.word + (f", beyond {comparison.limit:.0%}" if c.past_limit else ""),
               c.comparison.reason) for c in ordered))


def markdown(report: Report, title: str = "Benchmark") -> str:
    """The report as Markdown."""
    parts = [f"# {title}"]
    for table in tables(report):
        parts += [f"## {_escape(table.title)}", _markdown_table(table.without())]
    parts += ["## Notes", "\n".join(f"- {_escape(line)}" for line in footnotes(report))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


@dataclass(frozen=True, slots=True)
class _Fitting:
    """A table that gives up its least needed columns where the terminal is narrow.

    What it leaves out is in the page, in Markdown and in the JSON.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement
        from rich.table import Table as RichTable
        from rich.text import Text

        for count in range(len(SPARE) + 1):
            table = self.table.without(SPARE[:count])
            shown = RichTable(title=table.title, title_justify="left", box=None,
                              pad_edge=False, header_style="bold")
            for name in table.columns:
                shown.add_column(name, overflow="fold")
            for row in table.rows:
                # A verdict's reasons are long; its word is what a table can say.
                shown.add_row(*(Text(text.split(": ")[0] if name == "verdict" else text)
                                for name, text in zip(table.columns, row, strict=True)))
            natural = Measurement.get(console, options.update(max_width=1 << 12), shown)
            if natural.maximum <= options.max_width:
                break
        yield shown
        yield Text("")


def _advice(advice: Recommendation) -> tuple[str, ...]:
    figure = "" if advice.value is None else quantity(advice.value, advice.unit)
    if advice.margin is not None:
        figure += f" ± {advice.margin:.1%}"
    ties = "; ".join(advice.ties[:TIES])
    if len(advice.ties) > TIES:
        ties += f"; and {len(advice.ties) - TIES} more"
    return (advice.workload, advice.objective, advice.row or "none", figure, ties, advice.note)


def _name(row: Row) -> tuple[str, str, str]:
    threads = f" × {row.cell.threads}" if row.cell.device == "cpu" else ""
    return (row.cell.subject, row.runtime or row.cell.runtime or "auto",
            row.cell.device + threads)


def _shape(row: Row) -> tuple[str, ...]:
    size = str(row.cell.batch)
    if row.p50 is None:
        return (*_name(row), size, f"{row.status}: {row.detail}"[:120], *[""] * 11)
    tails = [_tail(row, q) for q in (0.95, 0.99)]
    return (
        *_name(row), size + (" *" if row.pareto else ""), _interval(row.p50, "s"), *_device(row),
        *tails,
        _interval(row.throughput, ""), _ratio(row.comparison), _memory(row),
        f"{row.share.of_gemm:.0%}" if row.share and row.share.of_gemm is not None else "",
        f"{row.placed:.0%}" if row.placed is not None and row.cell.device != "cpu" else "",
        judged(row.verdict), row.parity or "not checked")


def _device(row: Row) -> tuple[str, str]:
    """Between events on the device, and from host arrays to host arrays; "" on a CPU."""
    if row.cell.device == "cpu":
        return ("", "")
    times = (row.device_p50, row.transfer_p50)
    device, copies = ("" if t is None else quantity(t, "s") for t in times)
    return device, copies


def _pass(row: Row) -> tuple[str, ...]:
    work = row.cell.work()
    if row.pace is None:
        return (*_name(row), work, f"{row.status}: {row.detail}"[:120], *[""] * 10)
    return (
        *_name(row), work + (" *" if row.pareto else ""), _interval(row.pace, "s"),
        _interval(row.p50, "s"), _tail(row, 0.95), _interval(row.throughput, ""),
        "" if row.with_text is None else f"{row.with_text:.4g}",
        f"{row.tokens:.4g}" if row.tokens is not None else "",
        f"{row.padding:.1%}" if row.padding is not None else "", _ratio(row.comparison),
        _memory(row), judged(row.verdict), row.parity or "not checked")


def _cold(row: Row) -> tuple[str, ...]:
    cold = row.cold
    assert cold is not None
    assert row.p50 is not None
    return (*_name(row), row.cell.work(), quantity(cold.imports + cold.open, "s"),
            quantity(cold.first, "s"), quantity(cold.second, "s"), quantity(row.p50.value, "s"))


def _footprint(row: Row) -> tuple[str, ...]:
    found = row.memory
    assert found is not None
    gpu = (found.gpu, found.gpu_allocated, found.gpu_reserved)
    return (*_name(row), row.cell.work(), quantity(found.peak, "bytes"),
            quantity(found.weights, "bytes"), quantity(found.activations, "bytes"),
            *("" if size is None else quantity(size, "bytes") for size in gpu))


def _load(line: Loaded) -> tuple[str, ...]:
    cell, load = line.cell, line.load
    assert cell.traffic is not None
    threads = f" × {cell.threads}" if cell.device == "cpu" else ""
    name = (cell.subject, line.runtime or cell.runtime or "auto", cell.device + threads)
    if load is None:
        return (*name, cell.traffic.scenario, line.status, "", line.detail, line.parity)
    return (*name, cell.traffic.scenario, "VALID" if load.valid else "INVALID",
            _delivered(cell.traffic.scenario, load), _why(load), line.parity)


def _why(load: Load) -> str:
    """Why a run is INVALID, in the load generator's words."""
    words = "" if load.valid else f"{load.reason} {load.early_stopping}"
    return " ".join(words.split())


def _delivered(scenario: str, load: Load) -> str:
    """The figure that the scenario is about, as the load generator's summary has it."""
    def latency(name: str) -> str:
        return quantity(load.figures[f"result_{name}_latency_ns"] * 1e-9, "s")

    if scenario == "SingleStream":
        return f"p90 {latency('90.00_percentile')}"
    if scenario == "MultiStream":
        count = load.settings["samples_per_query"]
        return f"p99 {latency('99.00_percentile_per_query')} for {count} sentences"
    if scenario == "Server":
        limit = quantity(load.settings["target_latency_ns"] * 1e-9, "s")
        return (f"{load.figures['result_completed_samples_per_sec']:.4g} of "
                f"{load.settings['target_qps']:.4g} sentences/s, "
                f"p99 {latency('99.00_percentile')} (limit {limit})")
    return f"{load.figures['result_samples_per_second']:.4g} sentences/s"


def _tail(row: Row, q: float) -> str:
    found = row.percentile(q)
    if found is None or found.interval is None:
        return str(found or "")
    return quantity(found.interval.value, "s")


def _interval(interval: st.Interval | None, unit: str) -> str:
    if interval is None:
        return ""
    shown = quantity(interval.value, unit)
    # Samples of one process say nothing of the spread between processes.
    return f"{shown} ± {interval.margin:.1%}" if interval.basis == "processes" else shown


def _ratio(comparison: st.Comparison | None) -> str:
    """How much faster or slower, as a time ratio with its interval."""
    if comparison is None or comparison.ratio is None:
        return comparison.word if comparison else ""
    return f"{comparison.word}: {_bounds(comparison)}"


def _bounds(comparison: st.Comparison) -> str:
    found = comparison.ratio
    return f"×{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]" if found else ""


def _memory(row: Row) -> str:
    if row.memory is None:
        return ""
    host = quantity(row.memory.peak, "bytes")
    return f"{host}, GPU {quantity(row.memory.gpu, 'bytes')}" if row.memory.gpu else host


def judged(verdict: st.Verdict) -> str:
    """The word, then its reasons, which a narrow table leaves out."""
    return verdict.word + (f": {'; '.join(verdict.reasons)}" if verdict.reasons else "")


def quantity(value: float, unit: str) -> str:
    """A figure with a unit that fits its size: s, bytes, or rows/s."""
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if value >= scale:
                return f"{value / scale:.4g} {name}"
        return f"{value * 1e9:.4g} ns"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.4g} {unit}".rstrip()
