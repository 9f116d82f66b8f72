"""Measures calls that last seconds: nothing is run that is not a sample, but for one call first.

    python -m modelport.runtimes.benchmark.calls CELL.json RESULT.json

:mod:`.cell` calls a session many times before and after the samples, for the start-up, the copies
and the outputs; where one call generates a minute of speech, that would be most of the time.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BackendUnavailable, ModelportError
from . import feeds, sweep
from .cell import Company, Job, _reset_peak, _settle, _status, classify, follow, sample
from .environment import gpu_readings
from .environment import read as read_environment
from .records import Cell, CellResult, ColdStart, Memory, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...session import Session

OPENER = "...pipeline.combinations"
"""Its ``open_cell`` opens the session of a cell; a cell file cannot name any other code."""


def run(request: sweep.SweepRequest, progress: sweep.Progress | None = None) -> sweep.SweepOutcome:
    """As :func:`~.sweep.sweep` for a grid of shapes, with cells that are measured here."""
    (request.output / sweep.CELLS).mkdir(parents=True, exist_ok=True)
    environment = read_environment()
    runner = _Runner(request, environment.digest, None)
    cells, results = sweep.plan(request), []
    with sweep.alone(request.output):
        for done, cell in enumerate(cells, 1):
            results.append(runner.result(cell))
            if progress:
                progress(results[-1], done, len(cells))
    return sweep.SweepOutcome(environment, tuple(results), (), runner.measured, runner.reused)


class _Runner(sweep._Runner):
    def _measure(self, cell: Cell, key: str) -> CellResult:
        job = Job(cell, key, os.getloadavg()[0])
        return sweep.run_job(job, self._request.output / sweep.CELLS, self._request.timeout,
                             module="calls")


def measure(job: Job) -> CellResult:
    """Measure one cell in this process; failures of the session become a result too."""
    empty = CellResult(job.cell, job.key, "failed")
    try:
        return _measure(job, empty)
    except BackendUnavailable as e:
        return replace(empty, status="absent", cause="backend absent", detail=str(e))
    except ModelportError as e:
        return replace(empty, cause="error", detail=f"{type(e).__name__}: {e}")
    except Exception as e:  # noqa: BLE001 - any failure of a runtime ends this cell only
        return replace(empty, cause=classify(e), detail=f"{type(e).__name__}: {e}"[:2000])


def _measure(job: Job, empty: CellResult) -> CellResult:
    cell, conditions = job.cell, _settle(job)
    t0 = time.perf_counter()
    opener: Callable[[Cell], Session] = importlib.import_module(OPENER, __package__).open_cell
    importlib.import_module("torch")  # the framework is no part of the session's memory
    start = _status()["VmRSS"]
    t1 = time.perf_counter()
    with opener(cell) as session:
        t2 = time.perf_counter()
        opened = _status()
        data = feeds.draw(session.spec, cell.batch, cell.sequence, seed=cell.seed)
        launch = session.bind(data)

        def call() -> None:
            launch()
            session.synchronize()

        call()
        t3 = time.perf_counter()
        _reset_peak()
        if reset := getattr(session, "reset_memory", None):
            reset()
        with Company() as company:
            taken, stopped = sample(call, cell.sampling)
        device = session.placement().device
        memory = Memory(start, opened["VmRSS"], opened["VmHWM"], _status()["VmHWM"],
                        opened["RssAnon"])
        if cell.device != "cpu":
            allocated, reserved = session.device_memory()  # type: ignore[attr-defined]
            memory = replace(memory, gpu_allocated=allocated, gpu_reserved=reserved)
            conditions = replace(
                conditions, gpu=(*conditions.gpu, *gpu_readings(os.getpid())))
        faults = () if device == cell.device else (f"asked for {cell.device}, ran on {device}",)
        return replace(
            empty, status="ok", runtime=session.runtime, samples=taken, stopped=stopped,
            cold=ColdStart(t1 - t0, t2 - t1, t3 - t2, taken[0]), memory=memory, faults=faults,
            conditions=replace(conditions, foreign=company.foreign, stolen=company.stolen))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process: paths of the job and of the result."""
    job_path, result_path = map(Path, sys.argv[1:] if arguments is None else arguments)
    job = Job.read(job_path)
    follow(job.parent)
    write_json(result_path, asdict(measure(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
