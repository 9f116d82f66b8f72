"""The report as one HTML page that works offline: the answer, charts, then every table."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from ...errors import BackendUnavailable
from . import generation_views
from .generation import GenerationReport
from .views import Table, footnotes, tables

if TYPE_CHECKING:
    from .reading import Report
    from .report import Row

WIDTH, HEIGHT = 340, 240
LONG = 60
"""Characters beyond which the text of a table is broken into lines."""
STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 2rem auto;
       max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th, td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.long { white-space: normal; min-width: 16rem; }
ul { color: var(--soft); font-size: 13px; padding-left: 1.2rem; }
figure { margin: 1rem 0; overflow-x: auto; }
"""


def html(report: Report) -> str:
    """The page.

    Raises:
        BackendUnavailable: altair or vl-convert-python is not installed (extra ``report``).
    """
    try:
        import altair
        import vl_convert
    except ImportError as e:
        raise BackendUnavailable(f"the HTML page needs {e.name}",
                                 hint='pip install "modelport[report]"') from e
    library = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;",
        vl_version=".".join(altair.VEGALITE_VERSION.split(".")[:2]))
    drawn = charts(report)
    figures = "\n".join(
        f'<h2>{escape(title)}</h2>\n<figure><div id="chart{i}"></div></figure>'
        for i, (title, _) in enumerate(drawn))
    specs = _script_safe(json.dumps([spec for _, spec in drawn], allow_nan=False))
    answer, *evidence = map(_table, tables(report))
    body = "\n".join(evidence)
    notes = "\n".join(f"<li>{escape(line)}</li>" for line in footnotes(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmark: against {escape(report.reference)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<script>{_script_safe(library)}</script>
</head>
<body>
<h1>Benchmark</h1>
{answer}
{figures}
{body}
<h2>Notes</h2>
<ul>
{notes}
</ul>
<script>
const specs = {specs};
specs.forEach((spec, i) => vegaEmbed("#chart" + i, spec, {{actions: false, renderer: "svg"}})
  .catch(error => console.error(error)));
</script>
</body>
</html>
"""


def _script_safe(text: str) -> str:
    """Nothing inside a script element may look like its end (HTML standard, 4.12.1.3)."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _table(table: Table) -> str:
    table = table.without()
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    return (f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>")


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def charts(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """Titles and Vega-Lite specifications of the charts for which there are data."""
    if isinstance(report, GenerationReport):
        drawn = generation_views.records(report)
        return [("Tokens per second while decoding, all rows together",
                 _lines(drawn, "rate", "tokens per second")),
                ("Until the first token", _lines(drawn, "first", "ms"))] if drawn else []
    records = [_record(r) for r in report.rows if r.p50 is not None]
    shapes = [r for r in records if not r["batching"]]
    passes = [r for r in records if r["batching"]]
    found: list[tuple[str, dict[str, Any]]] = []
    if shapes:
        found.append(("Latency against batch size (p50, 95 % interval)",
                      _lines(shapes, "p50", "ms per call")))
        found.append(("Throughput against batch size",
                      _lines(shapes, "throughput", "rows per second")))
    if passes:
        found.append(("Time per sentence, corpus of mixed lengths", _batchings(passes)))
    if records:
        found.append(("Latency, throughput and memory; filled: on the Pareto front",
                      _front(records)))
    shares = [r for r in shapes if r["share"] is not None]
    if shares:
        found.append(("Share of the GEMM ceiling", _lines(shares, "share", "% of the ceiling")))
    cold = [r for r in records if r["open"] is not None]
    if cold:
        found.append(("Cold start", _cold(cold)))
    return found


def _record(row: Row) -> dict[str, Any]:
    assert row.p50 is not None
    assert row.throughput is not None
    cell = row.cell
    threads = f" × {cell.threads}" if cell.device == "cpu" else ""
    top = row.share.of_gemm if row.share else None
    memory = (row.memory.gpu or row.memory.peak) if row.memory else 0
    return {
        "column": f"{cell.subject} · {row.runtime or cell.runtime or 'auto'} · {cell.device}"
                  f"{threads}",
        "workload": row.workload, "batch": cell.batch, "sequence": cell.sequence,
        "batching": cell.batching or "", "work": cell.work(), "label": row.label,
        "verdict": row.verdict.word, "pareto": row.pareto, "memory": memory / 2**20,
        "p50": row.p50.value * 1e3, "p50_low": row.p50.low * 1e3, "p50_high": row.p50.high * 1e3,
        "throughput": row.throughput.value, "throughput_low": row.throughput.low,
        "throughput_high": row.throughput.high,
        "pace": row.pace.value * 1e3 if row.pace else None,
        "pace_low": row.pace.low * 1e3 if row.pace else None,
        "pace_high": row.pace.high * 1e3 if row.pace else None,
        "share": top * 100 if top is not None else None,
        "share_low": top * 100 if top is not None else None,
        "share_high": top * 100 if top is not None else None,
        "open": (row.cold.imports + row.cold.open) * 1e3 if row.cold else None,
        "first": row.cold.first * 1e3 if row.cold else None,
    }


def _lines(records: list[dict[str, Any]], name: str, title: str) -> dict[str, Any]:
    """One line a column against batch size, a panel a sequence length, whiskers for intervals."""
    import altair as alt

    scale = (alt.Scale(zero=True, nice=True) if name == "share"
             else alt.Scale(type="log", nice=False, padding=8))
    batches = sorted({r["batch"] for r in records})
    base = alt.Chart().encode(
        x=alt.X("batch:Q", title="batch size", scale=alt.Scale(type="log", base=2),
                axis=alt.Axis(values=batches, format="d")),
        color=alt.Color("column:N", title=None, legend=alt.Legend(orient="bottom", columns=2,
                                                                  labelLimit=420)))
    tooltip = ["column:N", "work:N", f"{name}:Q", "verdict:N"]
    shown = base.mark_line(point=True).encode(
        y=alt.Y(f"{name}:Q", title=title, scale=scale), tooltip=tooltip)
    whiskers = base.mark_rule().encode(y=f"{name}_low:Q", y2=f"{name}_high:Q")
    panel = alt.layer(whiskers, shown).properties(width=WIDTH, height=HEIGHT)
    faceted = panel.facet(
        data=alt.InlineData(values=records), columns=3,
        facet=alt.Facet("workload:N", title=None, sort=_workloads(records)))
    return _spec(faceted.resolve_scale(y="independent"))


def _workloads(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["workload"] for r in records))


def _batchings(records: list[dict[str, Any]]) -> dict[str, Any]:
    import altair as alt

    base = alt.Chart(alt.InlineData(values=records)).encode(
        y=alt.Y("column:N", title=None, axis=alt.Axis(labelLimit=420)),
        yOffset=alt.YOffset("work:N"))
    bars = base.mark_bar().encode(
        x=alt.X("pace:Q", title="ms per sentence"),
        color=alt.Color("work:N", title=None, legend=alt.Legend(orient="bottom")),
        tooltip=["column:N", "work:N", "pace:Q", "verdict:N"])
    whiskers = base.mark_rule().encode(x="pace_low:Q", x2="pace_high:Q")
    return _spec((bars + whiskers).properties(width=2 * WIDTH))


def _front(records: list[dict[str, Any]]) -> dict[str, Any]:
    import altair as alt

    legend = alt.Legend(orient="bottom", columns=2, labelLimit=420)
    panel = alt.Chart().mark_point(strokeWidth=1.5).encode(
        x=alt.X("p50:Q", title="p50, ms",
                scale=alt.Scale(type="log", nice=False, padding=20)),
        y=alt.Y("throughput:Q", title="rows per second",
                scale=alt.Scale(type="log", nice=False, padding=20)),
        size=alt.Size("memory:Q", title="peak memory, MiB", legend=alt.Legend(orient="bottom")),
        stroke=alt.Stroke("column:N", title=None, legend=legend),
        fill=alt.Fill("column:N", title=None, legend=legend),
        fillOpacity=alt.condition("datum.pareto", alt.value(0.8), alt.value(0.0)),
        tooltip=["label:N", "p50:Q", "throughput:Q", "memory:Q", "verdict:N"],
    ).properties(width=WIDTH, height=HEIGHT)
    faceted = panel.facet(
        data=alt.InlineData(values=records), columns=3,
        facet=alt.Facet("workload:N", title=None, sort=_workloads(records)))
    return _spec(faceted.resolve_scale(x="independent", y="independent"))


def _cold(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Opening and first call of each column, at its smallest work."""
    import altair as alt

    smallest: dict[str, dict[str, Any]] = {}
    for record in records:
        smallest.setdefault(record["column"], record)
    values = [
        {"column": r["column"], "work": r["work"], "stage": stage, "order": order,
         "ms": r[key]}
        for r in smallest.values()
        for order, (stage, key) in enumerate((("open", "open"), ("first call", "first")))
    ]
    chart = alt.Chart(alt.InlineData(values=values)).mark_bar().encode(
        x=alt.X("ms:Q", title="ms until the first result of a fresh process"),
        y=alt.Y("column:N", title=None, axis=alt.Axis(labelLimit=420)),
        color=alt.Color("stage:N", title=None, sort=["open", "first call"],
                        legend=alt.Legend(orient="bottom")),
        order="order:Q", tooltip=["column:N", "work:N", "stage:N", "ms:Q"])
    return _spec(chart.properties(width=2 * WIDTH))


def _spec(chart: Any) -> dict[str, Any]:
    import altair as alt

    found: dict[str, Any] = chart.configure(
        font="system-ui, sans-serif", view=alt.ViewConfig(stroke="#d9dee5"),
        axis=alt.AxisConfig(gridColor="#eef1f4", labelColor="#5b6675", titleColor="#5b6675"),
    ).to_dict()
    return found
