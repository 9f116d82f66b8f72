"""Views of a report for people: a table for the terminal and Markdown for a job summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rule import Verdict, worst

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from .matrix import LeftOut
    from .report import ParityReport, Result

MARKDOWN_LIMIT = 1 << 20
"""Bytes a job summary may have (GitHub Actions, "workflow commands", job summaries: 1 MiB)."""

_COLOURS: dict[str, str] = {"pass": "green", "suspect": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Line:
    """Worst result of one output at one shape, over its paddings and seeds."""

    output: str
    shape: str
    paddings: str
    samples: int
    rho: float | None
    verdict: Verdict
    reason: str


def lines(report: ParityReport) -> list[Line]:
    """One line for each output and shape, in the order they ran."""
    cases = {case.label: case for case in report.cases}
    groups: dict[tuple[str, str], list[tuple[str, Result]]] = {}
    for result in report.results:
        case = cases.get(result.case)
        shape = case.shape if case else result.case
        padding = case.padding if case else ""
        groups.setdefault((result.output, shape), []).append((padding, result))
    return [_line(output, shape, found) for (output, shape), found in groups.items()]


def table(report: ParityReport) -> RenderableType:
    """A rich table, one row for each output and shape, then verdict, notes and what was left out.

    Cells are plain text: names come from files, and may hold console markup.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("output", "shape", "padding"):
        view.add_column(name, overflow="fold")
    view.add_column("samples", justify="right")
    view.add_column("ρ", justify="right")
    view.add_column("verdict")
    for line in lines(report):
        view.add_row(Text(line.output), Text(line.shape), line.paddings, str(line.samples),
                     _rho(line.rho), Text(line.verdict, style=_COLOURS[line.verdict]))
    tail = Text(f"\n{headline(report)}", style=_COLOURS[report.verdict])
    rest = [Text(text) for text in details(report)]
    return Group(view, tail, *rest)


def headline(report: ParityReport) -> str:
    """The outcome in one sentence."""
    rho = "" if report.worst_rho is None else f", worst ρ {report.worst_rho:.3g}"
    return (f"parity {report.verdict}: {report.comparisons} comparisons in {len(report.cases)} "
            f"cases{rho}, {report.seconds:.1f} s")


def details(report: ParityReport, most: int = 5) -> list[str]:
    """Failures with their reasons, notes, and what was left out grouped by reason."""
    texts = [f"{r.verdict}: {r.output} at {r.case}: {r.reason}" for r in report.failures[:most]]
    if len(report.failures) > most:
        texts.append(f"and {len(report.failures) - most} more that did not pass")
    texts.extend(report.notes)
    if report.left_out:
        texts.append(f"left out: {len(report.left_out)} planned cases were not run "
                     f"({', '.join(_shapes(report.left_out))})")
    return texts


def markdown(report: ParityReport, limit: int = MARKDOWN_LIMIT) -> str:
    """The report as GitHub Markdown of at most ``limit`` bytes; a cut is said at the end."""
    head = [f"## {headline(report)}", "", *(f"- {_cell(t)}" for t in details(report)), "",
            "| output | shape | padding | samples | ρ | verdict |", "| --- " * 6 + "|"]
    found = sorted(lines(report), key=lambda line: line.verdict == "pass")
    rows = ["| " + " | ".join(map(_cell, (line.output, line.shape, line.paddings,
                                          str(line.samples), _rho(line.rho), line.verdict))) + " |"
            for line in found]
    rows += ["", f"<details><summary>left out: {len(report.left_out)}</summary>", "",
             *(f"- {_cell(left.case)}: {_cell(left.reason)}" for left in report.left_out),
             "", "</details>"] if report.left_out else []
    return _cut([*head, *rows], limit)


def _cut(rows: list[str], limit: int) -> str:
    text = "\n".join(rows) + "\n"
    if len(text.encode()) <= limit:
        return text
    notice = "\n\nCut here: the whole report is in parity.json.\n"
    room, kept = limit - len(notice.encode()), []
    for row in rows:
        room -= len(row.encode()) + 1
        if room < 0:
            break
        kept.append(row)
    return ("\n".join(kept) + notice).encode()[:limit].decode(errors="ignore")


def _line(output: str, shape: str, found: list[tuple[str, Result]]) -> Line:
    paddings = ", ".join(dict.fromkeys(p for p, _ in found if p))
    verdict = worst(r.verdict for _, r in found)
    return Line(output, shape, paddings, sum(r.samples for _, r in found),
                max((r.rho for _, r in found if r.rho is not None), default=None), verdict,
                next((r.reason for _, r in found if r.verdict == verdict), ""))


def _shapes(left_out: Iterable[LeftOut], most: int = 6) -> list[str]:
    shapes = list(dict.fromkeys(" ".join(left.case.split()[:-3]) or "fixed" for left in left_out))
    return [*shapes[:most], *(["…"] if len(shapes) > most else [])]


def _rho(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
