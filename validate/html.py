"""One self-contained HTML page: verdict, heat map of error by shape, histograms, failures.

Charts are Vega-Lite with all JavaScript inline: the page loads nothing. Names come from files, so
every text is escaped where it is written, in markup and in the embedded data alike.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable
from .report import HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_STEP, ParityReport
from .terminal import by_size, details, headline, lines

if TYPE_CHECKING:
    import altair

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 2rem auto;
  max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .9rem } th, td { padding: .2rem .7rem;
  text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.pass { color: #14632c } .suspect { color: #7a4d00 } .fail { color: #a3131b; font-weight: 600 }
.chart { overflow-x: auto }
"""
_COLOURS = {"pass": "#14632c", "suspect": "#b87300", "fail": "#a3131b"}


def to_html(report: ParityReport, title: str = "Parity report") -> str:
    """The report as one HTML document of about 1 MiB, without any external reference.

    Raises:
        BackendUnavailable: altair or vl-convert-python is not installed.
    """
    charts = {"heat": _heat(report), "errors": _histogram(report)}
    drawn = {name: chart for name, chart in charts.items() if chart is not None}
    specs = json.dumps({name: chart.to_dict() for name, chart in drawn.items()})
    body = [f"<h1>{escape(title)}</h1>",
            f'<p class="{report.verdict}">{escape(headline(report))}</p>',
            _list(details(report)), _gates(report)]
    captions = {"heat": "Error by output and shape", "errors": "Distribution of the error"}
    for name in drawn:
        body.append(f'<h2>{captions[name]}</h2><div class="chart" id="{name}"></div>')
    body += [_effects(report), _results(report), _left_out(report)]
    # "<" cannot end a script element or open a comment in it once it is written as an escape.
    data = specs.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
            f'</title><style>{_STYLE}</style></head><body>{"".join(body)}'
            f'<script type="module">{_bundle()}\nconst charts = {data};\n'
            "for (const [id, spec] of Object.entries(charts)) "
            'vegaEmbed("#" + id, spec, {actions: false, renderer: "svg"});'
            "</script></body></html>\n")


@cache
def _bundle() -> str:
    """JavaScript of Vega, Vega-Lite and vega-embed in the version altair's specs are for."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise BackendUnavailable("HTML reports need altair and vl-convert-python",
                                 hint="pip install 'modelport[report]'") from error
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;",
                                            version if version in known else known[-1]))


def _heat(report: ParityReport) -> altair.Chart | None:
    rows = [{"output": line.output, "shape": line.shape, "rho": line.rho, "verdict": line.verdict,
             "samples": line.samples, "label": _short(line.rho)}
            for line in lines(report) if line.samples or line.verdict != "pass"]
    if not rows:
        return None
    alt = _altair()
    shapes = sorted({str(row["shape"]) for row in rows}, key=by_size)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("shape:N", sort=shapes, title=None, axis=alt.Axis(labelAngle=-45, labelLimit=240)),
        y=alt.Y("output:N", title=None, axis=alt.Axis(labelLimit=240)),
        tooltip=[alt.Tooltip(f"{name}:{kind}") for name, kind in
                 (("output", "N"), ("shape", "N"), ("rho", "Q"), ("verdict", "N"),
                  ("samples", "Q"))])
    cells = base.mark_rect(stroke="#fff").encode(color=alt.Color(
        "verdict:N", scale=alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))))
    chart = cells + base.mark_text(color="#fff", fontSize=11).encode(text="label:N")
    return chart.properties(width=alt.Step(44), height=alt.Step(32))


def _histogram(report: ParityReport) -> altair.Chart | None:
    totals: dict[str, list[int]] = {}
    for result in report.results:
        if result.histogram:
            known = totals.setdefault(result.output, [0] * HISTOGRAM_BINS)
            totals[result.output] = [a + b for a, b in zip(known, result.histogram, strict=True)]
    rows = [{"output": output, "low": HISTOGRAM_LOW + i * HISTOGRAM_STEP,
             "high": HISTOGRAM_LOW + (i + 1) * HISTOGRAM_STEP, "share": count / sum(counts)}
            for output, counts in totals.items() if sum(counts)
            for i, count in enumerate(counts) if count]
    if not rows:
        return None
    alt = _altair()
    return alt.Chart(alt.Data(values=rows)).mark_bar(color="#2f5d8a").encode(
        x=alt.X("low:Q", bin="binned", title="log10 of |candidate - truth| / RMS of the truth",
                scale=alt.Scale(domain=[HISTOGRAM_LOW, 1])),
        x2="high:Q", y=alt.Y("share:Q", title="share of elements"),
        row=alt.Row("output:N", title=None, header=alt.Header(labelAngle=0, labelAlign="left")),
    ).properties(width=560, height=110)


def _altair() -> Any:
    _bundle()
    import altair

    return altair


def _gates(report: ParityReport) -> str:
    rows: list[tuple[str, str]] = list(report.gates.items())
    rows += [(side, text) for side, text in report.sides.items() if text]
    return _table(("gate or side", "found"), rows)


def _effects(report: ParityReport) -> str:
    if not report.effects:
        return ""
    names = ("rows", "sqnr_db", "kl_mean", "kl_p99", "kl_max", "agreement", "agreement_low",
             "decided", "cosine_mean", "cosine_min", "rank_correlation")
    rows = [(e.output, *(_short(getattr(e, name)) for name in names), "; ".join(e.broken))
            for e in report.effects]
    by = f" (budget set by {report.budget.set_by})" if report.budget else ""
    return f"<h2>Effects{escape(by)}</h2>" + _table(("output", *names, "broken"), rows)


def _results(report: ParityReport) -> str:
    rows = [(r.output, r.case, _short(r.rho), _short(r.excess), _short(r.rmse), _short(r.noise),
             r.verdict, r.reason)
            for r in sorted(report.results, key=lambda r: (r.verdict == "pass", -(r.rho or 0)))]
    head = ("output", "case", "ρ", "excess", "RMSE", "reference's RMSE", "verdict", "reason")
    return "<h2>Comparisons, worst first</h2>" + _table(head, rows[:500]) + (
        f"<p>{len(rows) - 500} more are in parity.json.</p>" if len(rows) > 500 else "")


def _left_out(report: ParityReport) -> str:
    if not report.left_out:
        return ""
    rows = [(left.case, left.reason) for left in report.left_out]
    return "<h2>Left out</h2>" + _table(("case", "reason"), rows)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    titles = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(_cell(str(text)) for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    kind = text if text in _COLOURS else "number" if text[:1].isdigit() else ""
    return f'<td class="{kind}">{escape(text)}</td>'


def _list(texts: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _short(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.3g}"
