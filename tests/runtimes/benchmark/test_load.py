"""The load generator drives a session; what it says is passed on."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from benchmark_fakes import cell, request, subject
from modelport.errors import BackendUnavailable
from modelport.runtimes.benchmark import corpus, load, sweep
from modelport.runtimes.benchmark.cell import Job
from modelport.runtimes.benchmark.fake import SPEC
from modelport.runtimes.benchmark.feeds import draw
from modelport.runtimes.benchmark.records import CellResult, Traffic, cell_from
from modelport.runtimes.benchmark.summary import run_sweep, summarise
from modelport.runtimes.benchmark.sweep import plan, run_job
from modelport.runtimes.benchmark.views import footnotes, tables

real = pytest.mark.skipif(
    importlib.util.find_spec("mlperf_loadgen") is None,
    reason='mlcommons-loadgen is not installed: pip install "modelport[loadgen]"')


def run(folder, traffic, **options):
    source = corpus.built_in(0, 50)
    corpus.save(source, folder / "corpus.json")
    asked = cell(traffic=traffic, batch=16, sequence=0, budget=1024, options=options)
    job = Job(asked, asked.key("", source.digest), 0.0, corpus=str(folder / "corpus.json"))
    return run_job(job, folder, 120.0)


@real
def test_a_single_stream_that_is_long_enough_is_valid(tmp_path):
    found = run(tmp_path, Traffic("SingleStream", seconds=0.3))
    assert found.status == "ok", found.stderr
    assert found.load.valid
    assert found.load.reason == ""
    assert "Result is : VALID" in found.load.summary
    assert len(found.samples) >= 100
    p90 = found.load.figures["result_90.00_percentile_latency_ns"] * 1e-9
    assert p90 == pytest.approx(np.quantile(found.samples, 0.9), rel=0.5, abs=1e-3)
    assert found.load.settings["scenario"] == "SingleStream"
    assert found.load.settings["min_duration_ms"] == 300


@real
def test_a_server_that_answers_too_late_is_invalid_and_says_why(tmp_path):
    traffic = Traffic("Server", seconds=0.3, queries=20, rate=100.0, limit=1e-4)
    found = run(tmp_path, traffic, latency=2e-3)
    assert found.status == "ok", found.stderr
    assert not found.load.valid
    assert "latency" in found.load.reason
    assert found.load.settings["target_qps"] == 100
    assert found.load.figures["result_overlatency_query_count"] > 0


@real
@pytest.mark.parametrize("scenario", ["MultiStream", "Offline"])
def test_the_verdict_is_that_of_the_summary(scenario, tmp_path):
    found = run(tmp_path, Traffic(scenario, seconds=0.3, queries=50))
    assert found.status == "ok", found.stderr
    assert f"Scenario : {scenario}" in found.load.summary
    assert ("Result is : VALID" in found.load.summary) == found.load.valid
    assert found.samples


@real
def test_a_session_that_fails_under_load_ends_its_cell(tmp_path):
    found = run(tmp_path, Traffic("SingleStream", seconds=30), fault="error", at=80)
    assert found.status == "failed"
    assert found.cause == "error"
    assert "told to fail" in found.stderr


@real
def test_a_run_is_shown_with_its_verdict(tmp_path):
    asked = request(tmp_path, subject("base"), batches=(), sequences=(), corpus_batches=(16,),
                    corpus=corpus.built_in(0, 50), rounds=2,
                    traffic=(Traffic("SingleStream", 0.2), Traffic("Server", 0.2, 10, 50.0, 1e-6)))
    report = run_sweep(asked)
    table = next(t for t in tables(report) if t.title.startswith("MLPerf LoadGen"))
    shown = {row[3]: row for row in table.rows}
    assert [row[3] for row in table.rows] == [x.cell.traffic.scenario for x in report.loads]
    assert set(shown) == {"SingleStream", "Server"}
    assert shown["SingleStream"][4] == "VALID"
    assert shown["SingleStream"][6] == ""
    assert shown["Server"][4] == "INVALID"
    assert "latency" in shown["Server"][6]
    assert any("Server: INVALID: " in line and "latency" in line for line in footnotes(report))
    assert report.rows == ()
    assert report.corpus == "built-in, 50 sentences"


def test_scenarios_run_once_whatever_the_rounds(tmp_path):
    cells = plan(request(tmp_path, traffic=(Traffic("Offline"),), rounds=3))
    assert [c.round for c in cells if c.traffic] == [0]
    assert sorted(c.round for c in cells if not c.traffic) == [0, 1, 2]


def test_a_cell_of_traffic_is_read_back_whole():
    asked = cell(traffic=Traffic("Server", rate=5.0), sequence=0)
    assert cell_from(json.loads(json.dumps(sweep.asdict(asked)))) == asked


@pytest.mark.parametrize("seed", range(4))  # in some order the scenarios come first
def test_a_missing_load_generator_leaves_the_shapes_measured(seed, tmp_path, monkeypatch):
    def instead(job, folder, timeout):
        absent = job.cell.traffic is not None
        return CellResult(job.cell, job.key, "absent" if absent else "ok", samples=(1e-3,) * 11,
                          cause="backend absent" if absent else "", detail="not installed")

    monkeypatch.setattr(sweep, "run_job", instead)
    asked = request(tmp_path, traffic=(Traffic("Offline"), Traffic("Server")), seed=seed)
    report = summarise(asked, sweep.sweep(asked))
    assert [row.status for row in report.rows] == ["ok"]
    assert [line.status for line in report.loads] == ["absent", "absent"]
    report.require_complete()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(BackendUnavailable, match="mlcommons-loadgen") as caught:
        load.require()
    assert "modelport[loadgen]" in caught.value.hint


def test_sentences_are_padded_to_the_longest_of_their_batch():
    rows = [draw(SPEC, 1, n, seed=n) for n in (2, 5)]
    found = load.collate(SPEC, rows)
    assert found["input_ids"].shape == (2, 5)
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert found["input_ids"][0].tolist() == [*rows[0]["input_ids"][0].tolist(), 0, 0, 0]


def test_the_logs_are_read_as_they_are(tmp_path):
    entries = {"result_validity": "INVALID", "result_invalid_reason": "too short ",
               "result_samples_per_second": 12.5, "effective_target_qps": 3.0, "loadgen": "x"}
    lines = [":::MLLOG " + json.dumps({"key": k, "value": v}) for k, v in entries.items()]
    (tmp_path / "mlperf_log_detail.txt").write_text("\n".join(lines))
    (tmp_path / "mlperf_log_summary.txt").write_text("the summary")
    if importlib.util.find_spec("mlperf_loadgen") is None:
        pytest.skip("its version cannot be read where it is not installed")
    found = load.read_logs(tmp_path)
    assert (found.valid, found.reason, found.summary) == (False, "too short", "the summary")
    assert found.figures == {"result_samples_per_second": 12.5}
    assert found.settings == {"target_qps": 3.0}
