from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace

import pytest
from benchmark_fakes import outcome, request, result, subject
from modelport.cli import execute
from modelport.errors import BackendUnavailable
from modelport.runtimes.benchmark import page, views
from modelport.runtimes.benchmark.ceilings import Ceilings, Work
from modelport.runtimes.benchmark.records import Corpus, write_json
from modelport.runtimes.benchmark.summary import summarise
from rich.console import Console

NASTY = "</script><b>a|b</b> [red]"


@pytest.fixture
def report(tmp_path):
    asked = request(tmp_path, subject("base"), subject(NASTY), subject("gone"), batches=(1, 4),
                    rounds=5, aa=True, batchings=("padded", "sorted"), p95_limit=0.01,
                    work=lambda c: Work(1e9, 1e6))

    def make(cell):
        if cell.subject == "gone":
            return replace(result(cell, 1.0), status="absent", cause="backend absent", samples=(),
                           detail="no such package")
        if cell.batching:
            return result(cell, 1.0, corpus=Corpus(60, 90, 100, (2,) * 30, (3,) * 30))
        return result(cell, 0.5 if cell.subject == NASTY else 1.0)

    top = (Ceilings("cpu", 1, {"float32": 1e10}, 1e10),)
    return summarise(asked, outcome(asked, make, top))


def test_the_terminal_shows_every_row_its_verdict_and_the_answer_first(report):
    stream = io.StringIO()
    Console(file=stream, width=250).print(views.renderable(report))
    text = stream.getvalue()
    assert text.index("Recommendations") < text.index("sequence 8")
    for expected in ("stable", "no such package", "n too small", "faster: ×0.5", "noise floor",
                     "lowest p50", NASTY, "10.0%"):
        assert expected in text, expected


def test_a_ceiling_of_several_rounds_is_shown_with_its_range(report):
    def line(**changes):
        found = replace(report, ceilings=(replace(report.ceilings[0], **changes),))
        return next(line for line in views.footnotes(found) if line.startswith("ceiling"))

    assert line() == ("ceiling on cpu, 1 threads: GEMM float32 10 G/s (torch); memory 10.0 GB/s")
    assert line(ranges={"float32": (8e9, 2e10)}, libraries={"float32": "onnxruntime"}) == (
        "ceiling on cpu, 1 threads, anew in each round (geometric mean, least to most): "
        "GEMM float32 10 G/s (onnxruntime, 8 to 20); memory 10.0 GB/s")


def test_markdown_tables_keep_their_columns_whatever_the_names(report):
    text = views.markdown(report)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1
    assert "<b>" not in text


@pytest.mark.parametrize(("value", "unit", "text"), [
    (1.5, "s", "1.5 s"), (0.0123, "s", "12.3 ms"), (45e-6, "s", "45 µs"), (7e-9, "s", "7 ns"),
    (3 << 20, "bytes", "3 MiB"), (1234.5, "rows/s", "1234 rows/s"), (5.0, "", "5")])
def test_quantities_have_a_unit_that_fits(value, unit, text):
    assert views.quantity(value, unit) == text


def test_the_page_is_self_contained_and_escapes_what_it_shows(report):
    pytest.importorskip("vl_convert", reason="the page needs the extra 'report'")
    text = page.html(report)
    tags = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "src=" not in tags
    assert 'href="http' not in tags
    assert "<b>a|b" not in tags
    assert text.count("<script>") == text.count("</script>") == 2
    assert tags.count('<div id="chart') == len(page.charts(report)) == 6
    assert "no such package" in tags


def test_the_command_shows_a_run_again_and_writes_it(report, tmp_path, capsys):
    pytest.importorskip("vl_convert", reason="the page needs the extra 'report'")
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "benchmark.json", asdict(report))
    wanted = tmp_path / "report.html", tmp_path / "report.md"
    assert execute(["report", str(run), "--html", str(wanted[0]), "--markdown",
                    str(wanted[1])]) == 0
    assert "Recommendations" in capsys.readouterr().out
    html, markdown = (file.read_text(encoding="utf-8") for file in wanted)
    assert html.count('<div id="chart') == len(page.charts(report))
    assert "no such package" in html
    assert markdown == views.markdown(report)
    assert execute(["report", str(run / "benchmark.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]
    assert execute(["report", str(tmp_path)]) == 2
    assert "there is no benchmark at" in capsys.readouterr().err


def test_every_chart_renders(report):
    convert = pytest.importorskip("vl_convert", reason="drawing needs the extra 'report'")
    altair = pytest.importorskip("altair")
    version = ".".join(altair.VEGALITE_VERSION.split(".")[:2])
    for title, spec in page.charts(report):
        drawn = convert.vegalite_to_svg(spec, vl_version=version)
        assert drawn.count("<path") > 5, title


def test_without_the_extra_the_error_names_it(report, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(BackendUnavailable, match="vl_convert") as caught:
        page.html(report)
    assert "modelport[report]" in str(caught.value)
