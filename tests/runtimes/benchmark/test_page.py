"""The page of a run, looked at with a real browser."""

from __future__ import annotations

import browser
import pytest
from benchmark_fakes import outcome, request, result, subject
from modelport.runtimes.benchmark import environment, page
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.ceilings import Ceilings, Work
from modelport.runtimes.benchmark.corpus import batches, built_in
from modelport.runtimes.benchmark.generation import GenerationReport, Line, Shape
from modelport.runtimes.benchmark.records import Corpus, Load, Traffic
from modelport.runtimes.benchmark.summary import summarise

pytestmark = pytest.mark.skipif(browser.ABSENT is not None, reason=str(browser.ABSENT))
HOSTILE = "</script><img src=x onerror=boom()>int8"
SPEED = {"camembert-base/torch_eager": 4e-3, "onnx": 3e-3, HOSTILE: 1.4e-3}
LOAD = Load("6.0.17", False, "Reduce target QPS to improve latency.", "* Run unsuccessful.", {
    "result_completed_samples_per_sec": 19.2, "result_99.00_percentile_latency_ns": 2.4e8},
    {"target_qps": 20.0, "target_latency_ns": 1e8}, "")


def measured(cell):
    seconds = SPEED[cell.subject] * (1 + 0.002 * cell.round)
    if cell.traffic:
        return result(cell, seconds, load=LOAD)
    if not cell.batching:
        return result(cell, seconds * (1 + cell.batch * cell.sequence / 128), peak=(3 << 27))
    lengths = built_in(0, 200).lengths
    plan = batches(lengths, cell.batching, batch=cell.batch, budget=cell.budget)
    found = Corpus(len(lengths), sum(lengths), sum(b.padded for b in plan),
                   tuple(len(b.rows) for b in plan), tuple(b.tokens for b in plan))
    samples = tuple(seconds * (1 + b.padded / 128) for b in plan)
    return result(cell, seconds, corpus=found, samples=samples)


@pytest.fixture
def report(tmp_path):
    asked = request(
        tmp_path, *map(subject, SPEED), batches=(1, 8, 64), sequences=(16, 128, 384), rounds=5,
        aa=True, batchings=("padded", "sorted", "token-budget"), corpus=built_in(0, 200),
        traffic=(Traffic("Server"),),
        work=lambda cell: Work(1.7e8 * cell.batch * cell.sequence, 4.4e8))
    ceilings = (Ceilings("cpu", 1, {"float32": 2e14, "int8": 4e14}, 3e10),)
    return summarise(asked, outcome(asked, measured, ceilings))


def test_it_is_drawn_and_asks_nobody_for_anything(report, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page.html(report), encoding="utf-8")
    seen = browser.look(file, tmp_path)
    assert seen.console == ()
    assert seen.requests == ()
    drawn = seen.charts()
    assert set(drawn) == {f"chart{i}" for i in range(len(page.charts(report)))}
    assert len(drawn) == 6
    assert all(marks >= len(SPEED) for marks in drawn.values()), drawn
    assert "INVALID" in seen.dom
    assert seen.screenshot.stat().st_size > 50_000


def test_a_run_of_a_model_that_generates_is_drawn_too(tmp_path):
    step, whole = st.Interval(0.009, 0.01, 0.011), st.Interval(0.3, 0.33, 0.36)
    lines = tuple(
        Line(name, Shape(batch, prompt, 32), step, step, batch / 0.01, 0.01, 0.012, whole, 1 << 20,
             verdict=st.Verdict("stable"))
        for name in ("eager, dynamic", HOSTILE) for batch in (1, 8) for prompt in (16, 128))
    report = GenerationReport("eager, dynamic", lines, (), environment.read())
    file = tmp_path / "report.html"
    file.write_text(page.html(report), encoding="utf-8")
    seen = browser.look(file, tmp_path)
    assert seen.console == ()
    assert len(seen.charts()) == 2
    assert all(marks >= 8 for marks in seen.charts().values())
    assert "batch 8, prompt 128, 32 tokens" in seen.dom


def test_the_browser_notices_what_it_is_asked_to_notice(tmp_path):
    file = tmp_path / "bad.html"
    file.write_text('<div id="chart0"></div><script>fetch("http://192.0.2.1/x").catch(e => 0);'
                    'nothing()</script>', encoding="utf-8")
    seen = browser.look(file, tmp_path)
    assert ["nothing is not defined" in line for line in seen.console] == [True]
    assert seen.requests == ("http://192.0.2.1/x",)
    assert seen.charts() == {}
