"""Views of a report for people: a table for the terminal and Markdown for a job summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .matrix import PADDINGS
from .report import ANY
from .rule import Verdict, worst

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from .effects import Effect
    from .matrix import LeftOut
    from .report import ParityReport, Result

MARKDOWN_LIMIT = 1 << 20
"""Bytes a job summary may have (GitHub Actions, "workflow commands", job summaries: 1 MiB)."""

WIDE = 4
"""Outputs that still fit side by side on a terminal of 80 columns."""

MANY = 16
"""Outputs beyond which only the worst of each shape is shown: those of a cache."""

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
    """A rich table of ρ by shape and output, then verdict, reasons and what was left out.

    A row is a shape, with its worst ρ over paddings and seeds in one column for each output;
    models of more than :data:`WIDE` outputs get one row for each output and shape instead, and of
    more than :data:`MANY` one for the worst output of each shape. Cells are plain text: names come
    from files, and may hold console markup.
    """
    from rich.console import Group
    from rich.text import Text

    found = lines(report)
    outputs = {line.output for line in found}
    wide = len(outputs) > WIDE
    if len(outputs) > MANY:
        found = _worst_by_shape(found)
    view = _long(report, found) if wide else _by_shape(report, found)
    tail = Text(f"\n{headline(report)}", style=_COLOURS[report.verdict])
    legend = Text("padding: n none, r right, l left, m one row masked", style="dim")
    return Group(view, legend, tail, *(Text(text) for text in details(report)))


def _worst_by_shape(found: list[Line]) -> list[Line]:
    worst_lines: dict[str, Line] = {}
    for line in found:
        known = worst_lines.setdefault(line.shape, line)
        if _gravity(line) > _gravity(known):
            worst_lines[line.shape] = line
    return list(worst_lines.values())


def _gravity(line: Line) -> tuple[int, float]:
    return ("pass", "suspect", "fail").index(line.verdict), line.rho or 0.0


def _by_shape(report: ParityReport, found: list[Line]) -> Table:
    from rich.text import Text

    outputs = list(dict.fromkeys(line.output for line in found))
    view = _table(report, *(Text(f"ρ {name}" if name != ANY else "whole case")
                            for name in outputs))
    for shape in sorted(dict.fromkeys(line.shape for line in found), key=by_size):
        row = {line.output: line for line in found if line.shape == shape}
        paddings = max((_initials(line) for line in row.values()), key=len)
        cells = [_verdict(row[name]) if name in row else Text() for name in outputs]
        view.add_row(Text(_sizes(shape)), paddings,
                     str(max(line.samples for line in row.values())), *cells)
    return view


def _long(report: ParityReport, found: list[Line]) -> Table:
    from rich.text import Text

    view = _table(report, Text("ρ"), Text("output", justify="left"))
    for line in sorted(found, key=lambda line: by_size(line.shape)):
        view.add_row(Text(_sizes(line.shape)), _initials(line), str(line.samples), _verdict(line),
                     Text(line.output))
    return view


def _table(report: ParityReport, *columns: Text) -> Table:
    from rich.table import Table

    names = next((_names(case.shape) for case in report.cases), "")
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column(names or "shape", no_wrap=True)
    view.add_column("padding", no_wrap=True)
    view.add_column("samples", justify="right")
    for column in columns:
        view.add_column(column, justify=column.justify or "right", overflow="fold")
    return view


def _verdict(line: Line) -> Text:
    """ρ, or what a verdict without ρ says; a verdict other than pass is spelt out."""
    from rich.text import Text

    number = "equal" if line.rho is None and line.verdict == "pass" and line.samples else ""
    number = number or _rho(line.rho)
    word = "" if line.verdict == "pass" else f"{line.verdict} "
    return Text(word + number, style=_COLOURS[line.verdict])


def by_size(shape: str) -> tuple[tuple[int, str], ...]:
    """Sort key for the text of a shape: by its sizes as numbers."""
    sizes = (part.partition("=")[2] for part in shape.split())
    return tuple((int(size) if size.isdigit() else 0, size) for size in sizes)


def _initials(line: Line) -> str:
    return " ".join(padding[0] for padding in PADDINGS if padding in line.paddings.split(", "))


def _names(shape: str) -> str:
    return " × ".join(part.partition("=")[0] for part in shape.split())


def _sizes(shape: str) -> str:
    return " × ".join(part.partition("=")[2] or part for part in shape.split())


def headline(report: ParityReport) -> str:
    """The outcome in one sentence."""
    rho = "" if report.worst_rho is None else f", worst ρ {report.worst_rho:.3g}"
    return (f"parity {report.verdict}: {report.comparisons} comparisons in {len(report.cases)} "
            f"cases{rho}, {report.seconds:.1f} s")


def details(report: ParityReport, most: int = 5) -> list[str]:
    """Failures with their reasons, effects, notes, and what was left out grouped by reason."""
    texts = [f"{r.verdict}: {r.output} at {r.case}: {r.reason}" for r in report.failures[:most]]
    if len(report.failures) > most:
        texts.append(f"and {len(report.failures) - most} more that did not pass")
    texts.extend(f"fail: effects on the answers: {text}" for text in report.unmet[:most])
    texts.extend(_effect(effect) for effect in report.effects[:most])
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


def _effect(effect: Effect) -> str:
    found = {"SQNR {:.3g} dB": effect.sqnr_db, "agreement {:.4g}": effect.agreement,
             "at least {:.4g}": effect.agreement_low, "KL p99 {:.2g}": effect.kl_p99,
             "cosine {:.4g}": effect.cosine_mean}
    told = [text.format(value) for text, value in found.items() if value is not None]
    return f"effects on {effect.output}, {effect.rows} rows: {', '.join(told) or 'none'}"


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
