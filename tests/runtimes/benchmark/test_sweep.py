"""The parent survives what happens in a cell: each fault below is a real one."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from benchmark_fakes import cell, request, subject
from modelport.errors import IncompleteError, UsageError
from modelport.runtimes.benchmark import sweep as sweeping
from modelport.runtimes.benchmark.cell import Job
from modelport.runtimes.benchmark.summary import run_sweep, summarise
from modelport.runtimes.benchmark.sweep import plan, run_job, sweep

linux = pytest.mark.skipif(sys.platform != "linux", reason="the data limit is Linux's")


def job(limit=None, **options):
    one = cell(options=options)
    return Job(one, one.key("here"), 0.0, limit)


@pytest.mark.parametrize(("fault", "where", "cause", "said"), [
    ("segfault", "call", "crash", "SIGSEGV"),
    ("segfault", "open", "crash", "SIGSEGV"),
    ("abort", "call", "crash", "SIGABRT"),
    ("kill", "call", "killed", "SIGKILL"),
    ("error", "call", "error", "RuntimeError: the fake runtime was told to fail"),
])
def test_a_death_of_the_process_is_recorded(tmp_path, fault, where, cause, said):
    result = run_job(job(fault=fault, where=where), tmp_path, 60.0)
    assert (result.status, result.cause) == ("failed", cause)
    assert said in result.detail
    if cause == "crash":
        assert "Fatal Python error" in result.stderr
    assert sweeping.read_result(tmp_path / f"{result.key}.json") == result


@linux
def test_memory_beyond_the_limit_ends_the_cell(tmp_path):
    result = run_job(job(limit=512 << 20, fault="memory"), tmp_path, 60.0)
    assert (result.status, result.cause) == ("failed", "out of memory")


def test_a_hang_ends_at_its_timeout_even_when_it_ignores_signals(tmp_path):
    start = time.monotonic()
    result = run_job(job(fault="hang"), tmp_path, 1.5)
    assert 1.5 <= time.monotonic() - start < 10
    assert (result.status, result.cause) == ("failed", "timeout")
    assert result.detail == "killed after 1.5 s"


def test_the_parent_sleeps_while_a_cell_runs(tmp_path, monkeypatch):
    def no_polling(seconds):
        raise AssertionError(f"the parent slept {seconds} s, to look again")

    monkeypatch.setattr(time, "sleep", no_polling)  # what waiting with a timeout does inside
    before = resource.getrusage(resource.RUSAGE_SELF)
    run_job(job(latency=0.05, wait="sleep"), tmp_path, 60.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.05


def test_a_crash_after_the_result_was_written_is_still_a_crash(tmp_path, monkeypatch):
    real = sweeping._run

    def killed_at_exit(*arguments):
        real(*arguments)
        return sweeping._Ended(-signal.SIGSEGV, False)

    monkeypatch.setattr(sweeping, "_run", killed_at_exit)
    assert run_job(job(), tmp_path, 60.0).cause == "crash"


def test_the_sweep_goes_on_and_says_what_is_missing(tmp_path):
    asked = request(tmp_path, subject("base"), subject("seg", fault="segfault"),
                    subject("gone", missing="no such package"), batches=(1, 2))
    report = run_sweep(asked)
    status = {(r.cell.subject, r.cell.batch): r.status for r in report.rows}
    assert status == {("base", 1): "ok", ("base", 2): "ok", ("seg", 1): "failed",
                      ("seg", 2): "failed", ("gone", 1): "absent", ("gone", 2): "absent"}
    with pytest.raises(IncompleteError, match="2 of 6 measurements failed") as caught:
        report.require_complete()
    assert caught.value.exit_code == 5
    assert "SIGSEGV" in next(r for r in report.rows if r.cell.subject == "seg").detail


def test_an_absent_backend_is_started_once_and_is_no_failure(tmp_path, monkeypatch):
    started = []
    real = sweeping.run_job
    monkeypatch.setattr(sweeping, "run_job", lambda j, *a: started.append(j) or real(j, *a))
    report = run_sweep(request(tmp_path, subject("gone", missing="why"), batches=(1, 2), rounds=3))
    assert len(started) == 1
    assert {r.status for r in report.results} == {"absent"}
    report.require_complete()


def test_a_rerun_measures_only_what_is_missing(tmp_path):
    asked = request(tmp_path, subject("base"), subject("other"), rounds=2, batches=(1, 2))
    first = sweep(asked)
    assert (first.measured, first.reused) == (8, 0)
    lost = first.results[3]
    (tmp_path / "cells" / f"{lost.key}.json").unlink()
    torn = first.results[5]
    (tmp_path / "cells" / f"{torn.key}.json").write_text('{"cell":')
    second = sweep(asked)
    assert (second.measured, second.reused) == (2, 6)
    assert [r.key for r in second.results] == [r.key for r in first.results]
    kept = [i for i in range(8) if i not in (3, 5)]
    assert all(second.results[i] == first.results[i] for i in kept)


def test_a_failed_cell_is_tried_again_by_the_next_run_and_given_up_after_two_in_one(tmp_path):
    bad = subject("bad", fault="abort")
    outcome = sweep(request(tmp_path, bad, rounds=4))
    assert outcome.measured == 2
    assert [r.detail.startswith("not started") for r in outcome.results] == [
        False, False, True, True]
    again = sweep(request(tmp_path, bad, rounds=4))
    assert again.reused == 0
    # The same cells once the fault is gone: the key is of the cell, so options must be equal.
    for path in (tmp_path / "cells").glob("*.json"):
        assert sweeping.read_result(path).status == "failed"


def test_finished_cells_are_on_disk_when_the_parent_is_killed(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from benchmark_fakes import request, subject\n"
        "from pathlib import Path\n"
        "from modelport.runtimes.benchmark.sweep import sweep\n"
        f"sweep(request(Path({str(tmp_path)!r}), subject('base'), subject('slow', latency=0.05,"
        " wait='sleep'), rounds=20), lambda r, d, n: print(d, flush=True))\n")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with parent:
        for _ in range(3):
            parent.stdout.readline()
        parent.kill()
    done = [p for p in (tmp_path / "cells").glob("*.json") if not p.name.endswith(".job.json")]
    assert len(done) >= 3
    assert all(sweeping.read_result(p).status == "ok" for p in done)
    resumed = sweep(request(tmp_path, subject("base"), subject("slow", latency=0.05, wait="sleep"),
                            rounds=3))
    assert resumed.reused >= 3


@linux
def test_a_cell_dies_with_its_parent(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from benchmark_fakes import request, subject\n"
        "from pathlib import Path\n"
        "from modelport.runtimes.benchmark.sweep import sweep\n"
        f"sweep(request(Path({str(tmp_path)!r}), subject('hang', fault='hang')))\n")
    parent = subprocess.Popen([sys.executable, "-c", code])
    children = psutil.Process(parent.pid)
    deadline = time.monotonic() + 20
    while not (found := children.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()  # whatever the cell is at: it looks for its parent once it can
    parent.wait()
    gone, alive = psutil.wait_procs(found, timeout=10)
    assert gone
    assert not alive


def test_two_sweeps_do_not_write_to_one_directory(tmp_path):
    asked = request(tmp_path, subject("slow", latency=0.05, wait="sleep"))
    running = threading.Thread(target=sweep, args=(asked,))
    running.start()
    time.sleep(0.3)
    with pytest.raises(UsageError, match="another sweep"):
        sweep(asked)
    running.join()


def test_every_round_runs_every_cell_in_an_order_of_its_own(tmp_path):
    asked = request(tmp_path, subject("a"), subject("b"), batches=(1, 2, 4), sequences=(8, 16),
                    rounds=5)
    cells = plan(asked)
    per_round = [[replace(c, round=0) for c in cells if c.round == n] for n in range(5)]
    assert [c.round for c in cells] == sorted(c.round for c in cells)
    assert all(Counter(map(repr, one)) == Counter(map(repr, per_round[0])) for one in per_round)
    assert len({tuple(map(repr, one)) for one in per_round}) == 5
    assert plan(asked) == cells
    assert plan(replace(asked, seed=1)) != cells


def test_the_grid_covers_shapes_batchings_threads_devices_and_the_twin(tmp_path):
    asked = request(
        tmp_path, subject("a"), subject("b"), batches=(1, 8), sequences=(16, 32), threads=(1, 2),
        devices=("cpu", "cuda"), batchings=("padded", "sorted", "token-budget"), aa=True,
        budgets=(1024, 2048), baseline="b")
    cells = plan(asked)
    assert len(cells) == 2 * 4 * (4 + 1 + 1 + 2) + 4 * 2
    twins = [c for c in cells if c.twin]
    assert {c.subject for c in twins} == {"b"}
    assert {(c.batch, c.sequence) for c in twins} == {(1, 16), (8, 32)}


@pytest.mark.parametrize("change", [
    {"rounds": 0}, {"devices": ()}, {"threads": ()}, {"batches": ()}, {"baseline": "nobody"}])
def test_an_empty_grid_is_refused(tmp_path, change):
    with pytest.raises(UsageError):
        request(tmp_path, **change)
    with pytest.raises(UsageError, match="each name once"):
        request(tmp_path, subject("a"), subject("a"))


def test_a_child_does_not_import_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert run_job(job(), tmp_path, 60.0).status == "ok"


def test_ceilings_are_measured_in_each_round_and_kept(tmp_path, monkeypatch):
    ran, rates = [], iter([1e11, 2e11, 4e11])

    def fake_run(arguments, *_):
        ran.append(Path(arguments[-1]).name)
        Path(arguments[-1]).write_text(
            f'{{"device": "cpu", "threads": 1, "gemm": {{"float32": {next(rates)}}},'
            ' "bandwidth": 1e10, "absent": {}}')
        return sweeping._Ended(0, False)

    asked = request(tmp_path, measure_ceilings=True, rounds=3)
    outcome = sweep(replace(asked, measure_ceilings=False))
    monkeypatch.setattr(sweeping, "_run", fake_run)
    for _ in range(2):
        outcome = sweep(asked)
        (found,) = outcome.ceilings
        assert found.gemm["float32"] == pytest.approx(2e11)
        assert found.ranges == {"float32": (1e11, 4e11)}
    assert len(set(ran)) == len(ran) == 3
    assert summarise(asked, outcome).ceilings == outcome.ceilings


def test_what_is_invalid_is_measured_again(tmp_path):
    asked = request(tmp_path, subject("wrong", fault="nan"), subject("right"))
    assert [bool(r.faults) for r in sorted(sweep(asked).results, key=lambda r: r.cell.subject)] == [
        False, True]
    again = sweep(asked)
    assert (again.measured, again.reused) == (1, 1)
