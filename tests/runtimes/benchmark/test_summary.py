"""From results to rows, comparisons, front and recommendations; nothing is measured here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_fakes import outcome, request, result, subject, typical
from modelport.errors import IncompleteError, UsageError
from modelport.runtimes.benchmark.ceilings import Ceilings, Work
from modelport.runtimes.benchmark.reading import load_report
from modelport.runtimes.benchmark.records import Corpus
from modelport.runtimes.benchmark.report import REPORT
from modelport.runtimes.benchmark.summary import run_sweep, summarise
from modelport.runtimes.benchmark.views import footnotes


@pytest.fixture
def asked(tmp_path):
    return request(tmp_path, subject("base"), subject("quick"), subject("same"), batches=(1, 4),
                   rounds=5, aa=True)


def row(report, name, batch=1):
    return next(r for r in report.rows if (r.cell.subject, r.cell.batch) == (name, batch))


def test_a_row_holds_the_figures_of_all_its_processes(asked):
    report = summarise(asked, outcome(asked, typical({"base": 1.0, "quick": 0.5, "same": 1.0})))
    found = row(report, "base", 4)
    assert found.processes == 5
    assert found.p50.value == pytest.approx(2.0, rel=0.01)
    assert found.p50.basis == "processes"
    assert found.throughput.value == pytest.approx(4 / found.p50.value)
    assert found.throughput.low < found.throughput.value < found.throughput.high
    assert found.tokens == pytest.approx(8 * found.throughput.value)
    assert [p.n for p in found.tails] == [150] * 3
    assert found.percentile(0.95).interval is not None
    assert found.percentile(0.99).interval is None
    assert found.verdict.word == "stable", found.verdict
    assert found.memory.peak == 100 << 20
    assert found.memory.weights == 50 << 20
    assert len(report.rows) == 6  # the A/A twin is no row


def test_claims_are_made_only_where_they_hold(asked):
    report = summarise(asked, outcome(asked, typical({"base": 1.0, "quick": 0.9, "same": 1.0})))
    assert row(report, "base").comparison is None
    assert row(report, "quick").comparison.word == "faster"
    assert row(report, "same").comparison.word == "no difference shown"
    assert 0 < report.floors["cpu/1"] < 0.02


def test_without_an_a_a_pair_nothing_is_claimed(asked):
    plain = replace(asked, aa=False)
    report = summarise(plain, outcome(plain, typical({"base": 1.0, "quick": 0.5, "same": 1.0})))
    found = row(report, "quick").comparison
    assert found.word == "not compared"
    assert "A/A" in found.reason


def test_an_invalid_measurement_is_neither_compared_nor_recommended(asked):
    def make(cell):
        faults = ("asked for cuda, ran on cpu",) if cell.subject == "quick" else ()
        return result(cell, 0.1 if cell.subject == "quick" else 1.0, faults=faults)

    report = summarise(asked, outcome(asked, make))
    assert row(report, "quick").verdict.word == "invalid"
    assert row(report, "quick").comparison.word == "not compared"
    assert not row(report, "quick").pareto
    assert not any("quick" in r.row for r in report.recommendations)


def test_what_failed_parity_is_not_recommended(asked):
    wrong = replace(asked, subjects=(asked.subjects[0], replace(asked.subjects[1], parity="fail")))
    report = summarise(wrong, outcome(wrong, typical({"base": 1.0, "quick": 0.1})))
    assert all(r.row.startswith("base") for r in report.recommendations)


def advice(report, objective):
    return next(r for r in report.recommendations if r.objective == objective)


def test_each_objective_names_a_row_with_its_margin_and_its_ties(asked):
    def make(cell):
        seconds = {"base": 1.0, "quick": 0.5, "same": 0.5}[cell.subject] * cell.batch**0.5
        return result(cell, seconds, peak={"base": 90 << 20}.get(cell.subject, 200 << 20))

    report = summarise(replace(asked, p95_limit=0.8), outcome(asked, make))
    fastest = advice(report, "lowest p50")
    assert "1×8" in fastest.row
    assert {fastest.row.split()[0], fastest.ties[0].split()[0]} == {"quick", "same"}
    assert 0 < fastest.margin < 0.05
    assert "4×8" in advice(report, "highest throughput").row
    assert advice(report, "smallest").row.startswith("base")
    within = advice(report, "p95 within limit")
    assert "1×8" in within.row  # 4×8 has more throughput and too long a tail
    assert within.value < 0.8


def test_a_limit_that_no_row_keeps_says_so(asked):
    report = summarise(replace(asked, p95_limit=0.01),
                       outcome(asked, typical({"base": 1.0, "quick": 0.5, "same": 1.0})))
    found = advice(report, "p95 within limit")
    assert found.row == ""
    assert "no row" in found.note


def test_the_front_holds_what_nothing_beats(asked):
    def make(cell):
        seconds = {"base": 1.0, "quick": 0.5, "same": 1.2}[cell.subject] * cell.batch**0.5
        return result(cell, seconds, peak={"base": 90 << 20}.get(cell.subject, 200 << 20))

    report = summarise(asked, outcome(asked, make))
    front = {(r.cell.subject, r.cell.batch) for r in report.rows if r.pareto}
    assert front == {("base", 1), ("base", 4), ("quick", 1), ("quick", 4)}


def test_the_share_of_the_ceiling_is_of_the_rows_own_dtype_and_threads(asked):
    top = (Ceilings("cpu", 2, {"float32": 1.0}, 1.0), Ceilings("cpu", 1, {"float32": 1e9}, 1e8))
    report = summarise(replace(asked, work=lambda c: Work(5e8 * c.batch, 1e7)),
                       outcome(asked, typical({"base": 1.0, "quick": 1.0, "same": 1.0}), top))
    found = row(report, "base").share
    assert found.of_gemm == pytest.approx(0.5, rel=0.01)
    assert found.of_bandwidth == pytest.approx(0.1, rel=0.01)


def test_failed_rounds_are_told_and_make_a_row_unstable(asked):
    def make(cell):
        good = result(cell, 1.0)
        if cell.subject == "quick" and cell.round == 2:
            return replace(good, status="failed", cause="killed", detail="by the kernel",
                           samples=())
        return good

    report = summarise(asked, outcome(asked, make))
    assert row(report, "quick").processes == 4
    assert "1 of 5 processes failed" in row(report, "quick").verdict.reasons
    assert row(report, "quick").comparison.word == "not compared"
    with pytest.raises(IncompleteError, match="killed: by the kernel"):
        report.require_complete()


def test_throttling_and_company_make_a_row_unstable(asked):
    def make(cell):
        one = result(cell, 1.0)
        hot = replace(one.conditions, gpu=({"throttle": ["GpuIdle", "SwThermalSlowdown"]},))
        busy = replace(one.conditions, foreign=0.4, stolen=0.2)
        return replace(one, conditions={"quick": hot, "same": busy}.get(
            cell.subject, one.conditions))

    report = summarise(asked, outcome(asked, make))
    assert row(report, "quick").verdict.reasons == ("GPU throttled: SwThermalSlowdown",)
    assert row(report, "same").verdict.reasons == ("others used 0.60 cores meanwhile",)


def test_a_corpus_is_judged_by_its_passes_and_shown_per_sentence(tmp_path):
    asked = request(tmp_path, subject("base"), batches=(), sequences=(), rounds=5,
                    batchings=("padded",))

    def make(cell):
        return result(cell, 1.0, samples=(1.0, 3.0), corpus=Corpus(8, 40, 80, (6, 2), (30, 10)))

    found = summarise(asked, outcome(asked, make)).rows[0]
    assert found.pace.value == pytest.approx(0.5)
    assert found.throughput.value == pytest.approx(2.0)
    assert found.tokens == pytest.approx(10.0)
    assert found.p50.value == 1.0  # six of eight sentences waited for the first batch
    assert found.padding == 0.5
    assert found.verdict.word == "stable"
    assert found.with_text is None


def test_a_report_survives_its_file(tmp_path):
    asked = request(tmp_path, subject("base"), subject("gone", missing="why"), rounds=2, aa=True)
    report = run_sweep(asked)
    assert (tmp_path / REPORT).exists()
    assert load_report(tmp_path) == report
    assert load_report(tmp_path / REPORT).results[0].samples == report.results[0].samples


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no benchmark"):
        load_report(tmp_path)
    (tmp_path / REPORT).write_text('{"schema": 1}')
    with pytest.raises(UsageError, match="not a benchmark"):
        load_report(tmp_path)
    with pytest.raises(UsageError, match="no benchmark"):
        load_report(Path("/nowhere/at/all"))


def test_a_percentile_of_sentences_needs_that_many_timed_batches(tmp_path):
    """Sixty-four sentences of a batch share one time."""
    asked = request(tmp_path, subject("base"), rounds=1, batches=(), sequences=(),
                    batchings=("padded",), corpus_batches=(64,), p95_limit=10.0)
    text = Corpus(256, 2560, 3000, (64,) * 4, (640,) * 4)
    report = summarise(asked, outcome(asked, lambda c: replace(
        result(c, 1.0), samples=(1.0, 1.01, 0.99, 1.0), corpus=text)))
    (found,) = report.rows
    assert [(p.n, p.interval) for p in found.tails] == [(4, None)] * 3
    assert found.verdict.word == "unstable"
    assert advice(report, "p95 within limit").row == ""


def test_passes_that_cut_the_sentences_shorter_are_no_rivals_of_the_whole_ones(tmp_path):
    asked = request(tmp_path, subject("base"), subject("short"), subject("whole"), rounds=5,
                    aa=True, batches=(), sequences=(), batchings=("sorted",))

    def make(cell):
        tokens = 30 if cell.subject == "short" else 40
        seconds = {"base": 1.0, "short": 0.2, "whole": 0.9}[cell.subject]
        return result(cell, seconds, corpus=Corpus(30, tokens, 80, (1,) * 30, (10,) * 30))

    report = summarise(asked, outcome(asked, make))
    found = {r.cell.subject: r for r in report.rows}
    assert found["short"].comparison.word == "not compared"
    assert "short takes shorter sentences" in found["short"].comparison.reason
    assert found["whole"].comparison.word == "faster"
    assert found["short"].workload == "corpus, cut to 30 tokens"
    best = {r.workload: r.row.split()[0] for r in report.recommendations
            if r.objective == "highest throughput"}
    assert best == {"corpus": "whole", "corpus, cut to 30 tokens": "short"}


def test_why_operations_were_not_counted_is_told_once_for_each(asked):
    report = summarise(
        replace(asked, work=lambda c: "it decides by values" if c.subject == "quick"
                else Work(5e8, 1e7)),
        outcome(asked, typical({"base": 1.0, "quick": 1.0, "same": 1.0})))
    assert row(report, "quick").share is None
    assert row(report, "base").share is not None
    assert report.notes == ("operations of quick were not counted: it decides by values",)
    assert report.notes[0] in footnotes(report)


def test_a_model_without_a_sequence_has_no_tokens(tmp_path):
    asked = request(tmp_path, subject("base"), sequences=(0,), batches=(1, 4))
    report = summarise(asked, outcome(asked, typical({"base": 1.0})))
    assert {(r.tokens, r.workload) for r in report.rows} == {(None, "by batch size")}
    assert "base · fake · cpu × 1 · batch 4" in {r.label for r in report.rows}


def test_what_is_absent_is_no_verdict_on_the_artifact(asked):
    def make(cell):
        if cell.subject == "quick":
            return replace(result(cell, 1.0), status="absent", cause="backend absent", samples=())
        return result(cell, 1.0)

    report = summarise(asked, outcome(asked, make))
    assert report.verdicts("identity of quick") == {}
    assert {v.word for v in report.verdicts("identity of base").values()} == {"stable"}
    report.require_complete()
    report.require_valid()


def test_what_must_not_be_believed_is_no_success(asked):
    def make(cell):
        faults = ("output logits is not finite",) if cell.subject == "quick" else ()
        return result(cell, 1.0, faults=faults)

    report = summarise(asked, outcome(asked, make))
    report.require_complete()
    with pytest.raises(IncompleteError, match=r"2 of 6 lines are invalid.*not finite"):
        report.require_valid()
