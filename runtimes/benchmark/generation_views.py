"""A generation report as tables: for the terminal and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .views import Table, _Fitting, _markdown_table, quantity

if TYPE_CHECKING:
    from rich.console import RenderableType

    from . import statistics as st
    from .generation import GenerationReport, Line

COLUMNS = ("run", "first token", "between tokens", "p95", "tokens/s", "whole call", "cache",
           "decode ×", "whole ×", "same ids", "verdict")


def tables(report: GenerationReport) -> tuple[Table, ...]:
    """One table a shape, and what the processes cost to open."""
    found = []
    for shape in dict.fromkeys(line.shape for line in report.lines):
        rows = tuple(_row(line) for line in report.lines if line.shape == shape)
        found.append(Table(str(shape), COLUMNS, rows))
    opened = []
    for name in dict.fromkeys(p.contestant for p in report.processes):
        mine = [p for p in report.processes if p.contestant == name and not p.failure]
        if mine:
            opened.append((name, quantity(sorted(p.opened for p in mine)[len(mine) // 2], "s"),
                           quantity(max(p.resident for p in mine), "bytes"),
                           quantity(max(p.peak for p in mine), "bytes")))
    return (*found, Table("Opening, and memory of the process",
                          ("run", "to open", "resident then", "peak"), tuple(opened)))


def notes(report: GenerationReport) -> tuple[str, ...]:
    """What a reader must know to trust the figures."""
    rounds = len({p.round for p in report.processes})
    lines = [
        *report.environment.lines(),
        f"{rounds} processes for each line, in turn; ± is the 95 % interval over processes; "
        "p95 is of the pooled intervals between tokens",
        "first token: prefill with the encoder's run; greedy, every row full",
    ]
    if report.baseline:
        lines.append(f"× is how many times faster than {report.baseline}, paired by round")
    return tuple(lines)


def generation_renderable(report: GenerationReport) -> RenderableType:
    """All tables and notes, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    return Group(*map(_Fitting, tables(report)),
                 *(Text(line, style="dim") for line in notes(report)))


def generation_markdown(report: GenerationReport, title: str) -> str:
    """The report as Markdown."""
    parts = [f"# {title}"]
    for table in tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    return "\n\n".join(parts) + "\n"


def _row(line: Line) -> tuple[str, ...]:
    if line.step is None:
        return (line.contestant, line.failure, *("" for _ in COLUMNS[2:]))
    return (
        line.contestant,
        _interval(line.first),
        _interval(line.step),
        quantity(line.p95, "s") if line.p95 else "n too small",
        f"{line.rate:.1f}" if line.rate else "",
        _interval(line.total),
        quantity(line.cache, "bytes") if line.cache is not None else "?",
        _speedup(line.decode_speedup),
        _speedup(line.total_speedup),
        {None: "", True: "yes", False: "no"}[line.same],
        "" if line.verdict is None else "; ".join((line.verdict.word, *line.verdict.reasons)),
    )


def _interval(found: st.Interval | None) -> str:
    if found is None:
        return ""
    shown = quantity(found.value, "s")
    # Samples of one process say nothing of the spread between processes.
    return f"{shown} ± {found.margin:.0%}" if found.basis == "processes" else shown


def _speedup(found: st.Interval | None) -> str:
    if found is None:
        return ""
    bounds = f" [{found.low:.2f}, {found.high:.2f}]" if found.basis == "processes" else ""
    return f"{found.value:.2f}{bounds}"
