"""What :mod:`.views` and :mod:`.page` show of models that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .views import Table, judged, quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from . import statistics as st
    from .generation import GenerationReport, Line, Process

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
                           quantity(max(p.peak for p in mine), "bytes"), _on_gpu(mine)))
    return (*found, Table("Opening, and memory of the process",
                          ("run", "to open", "resident then", "peak", "GPU"),
                          tuple(opened)).without())


def _on_gpu(processes: Sequence[Process]) -> str:
    """The most that the driver saw a process use on the GPU after a shape."""
    seen = [reading.get("process_bytes") or 0 for p in processes for m in p.shapes
            for reading in m.gpu]
    return quantity(max(seen), "bytes") if any(seen) else ""


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
        "" if line.verdict is None else judged(line.verdict),
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


def records(report: GenerationReport) -> list[dict[str, Any]]:
    """What charts draw: tokens a second while decoding, and ms to the first token."""
    return [
        {
            "column": line.contestant, "workload": f"prompt {line.shape.prompt}",
            "batch": line.shape.batch, "work": str(line.shape),
            "verdict": line.verdict.word if line.verdict else "",
            "rate": line.shape.batch / line.step.value,
            "rate_low": line.shape.batch / line.step.high,
            "rate_high": line.shape.batch / line.step.low,
            "first": line.first.value * 1e3, "first_low": line.first.low * 1e3,
            "first_high": line.first.high * 1e3,
        }
        for line in report.lines if line.step is not None and line.first is not None
    ]
