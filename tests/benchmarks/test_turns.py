"""Contenders that take turns, as real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import _turns

JOBS = {name: {"product": name, "threads": 1} for name in ("torch", "onnxruntime")}
SHAPES = [(1, 2), (3, 4)]


def test_each_takes_its_turns_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    record, told = tmp_path / "turns.jsonl", []

    def race() -> None:
        _turns.race(JOBS, SHAPES, record, generations=2, rounds=3, notify=told.append)

    race()
    found = _turns.records(record)
    assert [(r["generation"], tuple(r["shape"])) for r in found] == [
        (generation, shape) for generation in (0, 1) for shape in SHAPES]
    for one in found:
        assert set(one["seconds"]) == set(JOBS)
        assert all(len(taken) == 3 and min(taken) > 1e-3 for taken in one["seconds"].values())
    kept = record.read_text("utf-8").splitlines(keepends=True)
    record.write_text("".join(kept[:3]), encoding="utf-8")
    race()
    assert record.read_text("utf-8").splitlines(keepends=True)[:3] == kept[:3]
    assert len(told) == 5


def test_who_waits_is_stopped_and_who_is_done_is_gone() -> None:
    with _turns.contenders(JOBS) as opened:
        processes = [psutil.Process(c.process.pid) for c in opened.values()]
        opened["torch"].ask(shape=(1, 1))
        assert opened["torch"].ask(turn=0.01) > 1e-3
        assert [p.status() for p in processes] == [psutil.STATUS_STOPPED] * 2
    assert not any(p.is_running() for p in processes)


def test_one_that_ends_is_an_error() -> None:
    with _turns.contenders(JOBS) as opened:
        opened["torch"].process.kill()
        with pytest.raises(RuntimeError, match=f"status {-signal.SIGKILL}"):
            opened["torch"].ask(shape=(1, 1))


def test_none_outlives_its_parent() -> None:
    code = f"""
import sys, os
sys.path.insert(0, {str(BENCHMARKS)!r})
import _turns
print(_turns.Contender({JOBS["torch"]!r}).process.pid, flush=True)
os._exit(0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left = int(done.stdout)
    end = time.monotonic() + 10
    while time.monotonic() < end and psutil.pid_exists(left) \
            and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
