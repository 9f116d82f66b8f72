"""The measured process: what it records, in this process and in one of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from benchmark_fakes import QUICK, cell
from modelport.runtimes.benchmark import cell as measured
from modelport.runtimes.benchmark import corpus
from modelport.runtimes.benchmark.cell import Job, classify, inner_loop, sample
from modelport.runtimes.benchmark.fake import FakeSession
from modelport.runtimes.benchmark.records import Sampling
from modelport.runtimes.benchmark.sweep import run_job


def job(**changes):
    one = cell(**changes)
    return Job(one, one.key("here"), 0.0)


def test_warm_ups_are_not_sampled_and_the_count_ends_sampling():
    calls = []
    samples, stopped = sample(lambda: calls.append(1), Sampling(warmup=3, samples=20, seconds=9))
    assert (len(samples), len(calls), stopped) == (20, 23, "samples")


def test_time_ends_sampling_but_not_before_the_minimum():
    plan = Sampling(warmup=0, samples=50, min_samples=4, seconds=0.0)
    samples, stopped = sample(lambda: None, plan)
    assert (len(samples), stopped) == (4, "seconds")


def test_a_sample_is_the_mean_of_its_inner_loop(monkeypatch):
    now = [0]
    monkeypatch.setattr(measured.time, "perf_counter_ns", lambda: now[0])

    def call():
        now[0] += 250

    samples, _ = sample(call, Sampling(warmup=0, samples=11, min_samples=11), inner=4)
    assert samples == pytest.approx([250e-9] * 11)
    assert now[0] == 11 * 4 * 250


def test_the_collector_is_off_while_sampling_and_on_again_after_a_failure():
    seen = []

    def call():
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        sample(call, Sampling(warmup=0))
    assert seen == [False] * 3
    assert gc.isenabled()


@pytest.mark.parametrize(("seconds", "inner"), [(1e-3, 1), (1e-4, 1), (1e-5, 8), (1e-6, 64)])
def test_the_inner_loop_lasts_a_thousand_steps_of_the_clock(seconds, inner):
    assert inner_loop(seconds, 60e-9) == inner
    assert inner_loop(0.0, 60e-9) == measured.MAX_INNER


def test_synchronize_is_part_of_the_time():
    order = []
    session = FakeSession({"latency": 0.0})
    session.synchronize = lambda: order.append("synchronize")
    measured._call(session, lambda: order.append("launch"))()
    assert order == ["launch", "synchronize"]


@pytest.mark.parametrize(("error", "cause"), [
    (MemoryError(), "out of memory"), (RuntimeError("std::bad_alloc"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (RuntimeError("CUDA out of memory"), "out of memory"), (RuntimeError("shape"), "error"),
    (KeyboardInterrupt(), "interrupted")])
def test_failures_are_told_apart(error, cause):
    assert classify(error) == cause


def test_a_cell_in_its_own_process_records_the_evidence(tmp_path):
    result = run_job(job(batch=4, options={"weights": 64 << 20, "activations": 32 << 20,
                                           "latency": 1e-3}), tmp_path, 60.0)
    assert result.status == "ok", result
    assert result.runtime == "fake"
    assert len(result.samples) == QUICK.samples
    assert 1e-3 <= np.median(result.samples) < 0.05
    assert result.placement == {"device": "cpu", "providers": ["fake"],
                                "nodes": {"fake": 10, "cpu": 0}, "fallback": {}}
    assert result.faults == ()
    assert result.cold.first >= 1e-3
    assert result.cold.open > 0
    assert result.transfer_samples
    assert not list(tmp_path.glob("*.log")) + list(tmp_path.glob("*.job.json"))


def test_weights_and_activations_are_told_apart(tmp_path):
    none = run_job(job(), tmp_path, 60.0).memory
    heavy = run_job(job(options={"weights": 64 << 20}), tmp_path, 60.0).memory
    wide = run_job(job(options={"activations": 48 << 20}), tmp_path, 60.0).memory
    assert heavy.weights - none.weights == pytest.approx(64 << 20, rel=0.1)
    assert heavy.activations < 8 << 20
    assert wide.weights < 16 << 20
    assert wide.activations - none.activations == pytest.approx(48 << 20, rel=0.1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK),
                    reason="the kernel does not let a process reset its peak")
def test_what_opening_needs_for_a_moment_is_not_counted_as_activations(tmp_path):
    memory = run_job(job(options={"spike": 96 << 20}), tmp_path, 60.0).memory
    assert memory.peak_open - memory.start > 90 << 20
    assert memory.activations < 16 << 20
    assert memory.peak == memory.peak_open


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and /proc are Linux's")
def test_threads_and_affinity_are_set_and_read_back(tmp_path):
    result = run_job(job(threads=1, spinning=False), tmp_path, 60.0)
    assert result.conditions.affinity == (max(os.sched_getaffinity(0)),)
    assert result.conditions.variables["OMP_NUM_THREADS"] == "1"
    assert result.conditions.variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < result.conditions.clock_step < 1e-5


def test_a_session_on_another_device_is_a_fault(tmp_path):
    result = run_job(job(options={"device": "cuda"}), tmp_path, 60.0)
    assert result.faults == ("asked for cpu, ran on cuda",)


def test_outputs_that_are_not_finite_are_a_fault(tmp_path):
    assert run_job(job(options={"fault": "nan"}), tmp_path, 60.0).faults == (
        "output logits is not finite",)


def test_an_absent_backend_is_no_failure(tmp_path):
    result = run_job(job(options={"missing": "no such package"}), tmp_path, 60.0)
    assert (result.status, result.cause) == ("absent", "backend absent")
    assert "no such package" in result.detail


def test_an_unknown_option_is_an_error(tmp_path):
    result = run_job(job(options={"colour": 1}), tmp_path, 60.0)
    assert (result.status, result.cause) == ("failed", "error")
    assert "colour" in result.detail


def test_a_pass_over_the_corpus_times_every_batch(tmp_path):
    source = corpus.CorpusSource("ten", (3, 9, 5, 7, 2, 8, 8, 4, 6, 5000))
    corpus.save(source, tmp_path / "corpus.json")
    one = cell(batching="padded", batch=4, sequence=0, options={"per_token": 1e-6})
    result = run_job(replace(Job(one, one.key("h"), 0.0), corpus=str(tmp_path / "corpus.json")),
                     tmp_path, 60.0)
    assert result.status == "ok", result
    assert len(result.samples) == 3
    found = result.corpus
    assert found.batches == (4, 4, 2)
    assert found.tokens == 52 + 4096  # the last sentence is cut to what the session takes
    assert found.padded == 4 * 9 + 4 * 8 + 2 * 4096
    assert result.samples[2] > result.samples[0]


def test_a_token_budget_cuts_no_more_rows_than_the_session_takes(tmp_path):
    source = corpus.CorpusSource("short", (2,) * 5000)
    corpus.save(source, tmp_path / "corpus.json")
    one = cell(batching="token-budget", batch=1 << 20, budget=1 << 20, sequence=0)
    result = run_job(replace(Job(one, one.key("h"), 0.0), corpus=str(tmp_path / "corpus.json")),
                     tmp_path, 60.0)
    assert result.status == "ok", result
    assert sum(result.corpus.batches) == 5000
    assert max(result.corpus.batches) <= 4096


def test_company_is_looked_for_until_it_would_show(tmp_path):
    seen = []
    with measured.Company() as company:
        company.outlast(lambda: seen.append(time.sleep(0.01)), 10.0)
    assert seen
    assert company.foreign is not None
    with measured.Company() as company:
        company.outlast(lambda: seen.append("called"), 1.0)
    assert "called" not in seen  # not for longer than the sampling itself might take
    assert company.foreign is None


def test_the_files_opener_names_no_code_of_its_own(tmp_path):
    data = {**asdict(job()), "cell": {**asdict(cell()), "opener": "os:system"}}
    (tmp_path / "job.json").write_text(json.dumps(data))
    done = measured.measure(Job.read(tmp_path / "job.json"))
    assert done.status == "failed"
    assert "os:system" in done.detail


def test_the_measured_process_loads_no_framework(tmp_path):
    code = ("import sys, modelport.runtimes.benchmark.cell\n"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'altair', 'scipy'}\n"
            "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_on_a_device_its_own_clock_and_memory_are_asked(tmp_path):
    found = run_job(job(device="cuda", options={"weights": 1 << 20, "fallback": 2}), tmp_path, 60.0)
    assert found.status == "ok"
    assert len(found.device_samples) == min(len(found.samples), 100)
    assert min(found.device_samples) > 1e-4
    assert (found.memory.gpu_allocated, found.memory.gpu_reserved) == (1 << 20, 3 << 20)
    assert found.placement["fallback"] == {"Gather": 2}
    assert found.faults == ()


def test_a_graph_that_runs_mostly_on_the_cpu_is_no_measurement_of_the_device(tmp_path):
    found = run_job(job(device="cuda", options={"fallback": 7}), tmp_path, 60.0)
    assert found.faults == ("only 30% of the nodes ran on cuda; on the CPU: 7 Gather",)


def test_on_a_cpu_there_is_no_device_clock(tmp_path):
    assert run_job(job(), tmp_path, 60.0).device_samples == ()
