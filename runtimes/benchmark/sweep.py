"""Run every cell of a grid in a fresh process, in seeded rounds, and survive what happens there.

The parent blocks in ``waitid`` while a cell runs; it never polls. Every finished cell is a file at
once; a rerun measures only what is missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from ...errors import UsageError
from . import corpus as _corpus
from .ceilings import Ceilings, Work, over_rounds
from .cell import Job, says_memory, thread_environment
from .environment import Environment
from .environment import read as read_environment
from .records import Batching, Cause, Cell, CellResult, Sampling, Traffic, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from .corpus import CorpusSource

CELLS = "cells"
CORPUS = "corpus.json"
LOCK = ".lock"
TAIL = 4000
GIVE_UP = 2
"""After so many failed rounds a configuration is not started again in this run."""
_RESULT = TypeAdapter(CellResult)
_CEILINGS = TypeAdapter(Ceilings)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: an artifact with one runtime and one set of options.

    Attributes:
        name: shown to the user; unique in a request.
        path: artifact directory or model.
        identity: digest of its bytes.
        parity: verdict of its validation, shown beside its numbers; "" when unknown.
        weight_bytes: size of its weights.
    """

    name: str
    path: str
    identity: str
    runtime: str | None = None
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    parity: str = ""
    weight_bytes: int = 0
    opener: Literal["pipeline", "fake"] = "pipeline"


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """A grid of cells and how to run it.

    Attributes:
        subjects: the first one, or ``baseline``, is what the others are compared with.
        batches, sequences: of the fixed shapes.
        batchings: ways to cut the corpus; each with every size of ``corpus_batches``, and
            ``token-budget`` with every ``budgets`` (padded tokens) and at most ``max_rows`` rows.
        traffic: runs of MLPerf's load generator over the corpus, once each: they carry a verdict
            of their own.
        rounds: fresh processes per cell; comparisons need 5.
        aa: measure the baseline twice at the smallest and largest shape, or without shapes at
            the first and last pass, for the noise floor.
        timeout: seconds until a cell is killed, beside those its traffic lasts.
        memory_limit: bytes of private writable memory a cell may map (RLIMIT_DATA); on a GPU
            device it is not applied, because drivers reserve far more than they use.
        work: operations and bytes of one call, injected; or a sentence on why they are unknown.
        p95_limit: seconds, for the recommendation "p95 below".
    """

    subjects: tuple[Subject, ...]
    output: Path
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    sequences: tuple[int, ...] = (16, 128, 384)
    devices: tuple[str, ...] = ("cpu",)
    threads: tuple[int, ...] = (1,)
    spinning: bool = True
    batchings: tuple[Batching, ...] = ()
    corpus_batches: tuple[int, ...] = (32,)
    budgets: tuple[int, ...] = (4096,)
    max_rows: int = 256
    traffic: tuple[Traffic, ...] = ()
    corpus: CorpusSource | None = None
    baseline: str | None = None
    rounds: int = 5
    seed: int = 0
    aa: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    timeout: float = 600.0
    memory_limit: int | None = None
    measure_ceilings: bool = True
    work: Callable[[Cell], Work | str] | None = None
    p95_limit: float | None = None

    def __post_init__(self) -> None:
        names = [s.name for s in self.subjects]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"subjects are named {', '.join(names) or 'nothing'}",
                             allowed="at least one, each name once",
                             hint="rename one of the directories")
        if self.baseline is not None and self.baseline not in names:
            raise UsageError(f"the baseline {self.baseline!r} is not measured",
                             allowed=", ".join(names))
        if self.rounds < 1 or not self.devices or not self.threads:
            raise UsageError("an empty grid", allowed="at least 1 round, 1 device, 1 thread count")
        shapes = self.batches and self.sequences
        if not (shapes or self.batchings or self.traffic):
            raise UsageError("an empty grid", allowed="shapes, batchings of a corpus, or traffic")

    @property
    def reference(self) -> str:
        """Name of the subject that the others are compared with."""
        return self.baseline or self.subjects[0].name


@dataclass(frozen=True, slots=True)
class SweepOutcome:
    """All results of a sweep, in the order of the plan, with what they were measured on.

    Attributes:
        measured, reused: how many were measured now, and found on disk.
        corpus: name of the corpus; "" without one.
    """

    environment: Environment
    results: tuple[CellResult, ...]
    ceilings: tuple[Ceilings, ...]
    measured: int
    reused: int
    corpus: str = ""


Progress = Callable[[CellResult, int, int], None]


def plan(request: SweepRequest) -> tuple[Cell, ...]:
    """Every cell in the order it will run: rounds, each shuffled by the request's seed."""
    grid = list(_grid(request))
    cells: list[Cell] = []
    for number in range(request.rounds):
        order = np.random.default_rng([request.seed, number]).permutation(len(grid))
        cells.extend(replace(grid[i], round=number) for i in order
                     if number == 0 or grid[i].traffic is None)
    return tuple(cells)


def _grid(request: SweepRequest) -> Iterator[Cell]:
    shapes: list[dict[str, Any]] = [
        {"batch": b, "sequence": s} for b in request.batches for s in request.sequences
    ]
    passes = list(_passes(request))
    timed = shapes or passes
    ends = [timed[0], timed[-1]] if timed else []
    work: list[dict[str, Any]] = [*shapes, *passes, *_loads(request)]
    for subject in request.subjects:
        base = Cell(
            subject.name, subject.path, subject.identity, subject.runtime, dtype=subject.dtype,
            spinning=request.spinning, options=subject.options, dims=subject.dims,
            seed=request.seed, opener=subject.opener, sampling=request.sampling)
        for device in request.devices:
            for threads in request.threads:
                here = replace(base, device=device, threads=threads)
                yield from (replace(here, **item) for item in work)
                if request.aa and subject.name == request.reference:
                    distinct = {tuple(item.values()): item for item in ends}
                    yield from (replace(here, twin=True, **e) for e in distinct.values())


def _passes(request: SweepRequest) -> Iterator[dict[str, Any]]:
    for batching in request.batchings:
        if batching == "token-budget":
            for budget in request.budgets:
                yield {"batching": batching, "batch": request.max_rows, "budget": budget,
                       "sequence": 0}
        else:
            for batch in request.corpus_batches:
                yield {"batching": batching, "batch": batch, "sequence": 0}


def _loads(request: SweepRequest) -> Iterator[dict[str, Any]]:
    for traffic in request.traffic:
        yield {"traffic": traffic, "batch": max(request.corpus_batches), "sequence": 0,
               "budget": max(request.budgets)}


def sweep(request: SweepRequest, progress: Progress | None = None) -> SweepOutcome:
    """Measure what is missing in ``request.output`` and return all results of the plan.

    Raises:
        UsageError: another sweep is writing there.
    """
    (request.output / CELLS).mkdir(parents=True, exist_ok=True)
    with alone(request.output):
        return _sweep(request, progress)


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the lock of a run's directory: two that measure at once would time each other.

    Raises:
        UsageError: another one is writing there.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise UsageError(f"another sweep is writing to {output}",
                         hint="wait for it, or name another directory") from e
    try:
        yield
    finally:
        lock.release()


def _sweep(request: SweepRequest, progress: Progress | None) -> SweepOutcome:
    environment = read_environment()
    corpus = _store_corpus(request)
    cells = plan(request)
    runner = _Runner(request, environment.digest, corpus)
    ceilings: dict[tuple[str, int], list[Ceilings]] = {}
    results: list[CellResult] = []
    for number, started in groupby(cells, key=lambda cell: cell.round):
        for found in _measured_ceilings(request, environment, number):
            ceilings.setdefault((found.device, found.threads), []).append(found)
        for cell in started:
            result = runner.result(cell)
            results.append(result)
            if progress:
                progress(result, len(results), len(cells))
    return SweepOutcome(environment, tuple(results), tuple(map(over_rounds, ceilings.values())),
                        runner.measured, runner.reused, corpus.name if corpus else "")


def _store_corpus(request: SweepRequest) -> CorpusSource | None:
    if not (request.batchings or request.traffic):
        return None
    source = request.corpus or _corpus.built_in(request.seed)
    _corpus.save(source, request.output / CORPUS)
    return source


class _Runner:
    """Decides for each cell whether to reuse, skip or measure it."""

    def __init__(
        self, request: SweepRequest, environment: str, corpus: CorpusSource | None
    ) -> None:
        self._request = request
        self._environment = environment
        self._corpus = corpus
        self._absent: dict[tuple[object, ...], CellResult] = {}
        self._failures: dict[str, list[CellResult]] = {}
        self.measured = self.reused = 0

    def result(self, cell: Cell) -> CellResult:
        key = cell.key(self._environment, self._corpus.digest if self._corpus else "")
        path = self._request.output / CELLS / f"{key}.json"
        found = read_result(path)
        if found is not None and found.status == "ok" and not found.faults and found.key == key:
            self.reused += 1
            return found
        skipped = self._skip(cell, key)
        if skipped is not None:
            write_json(path, asdict(skipped))
            return skipped
        self.measured += 1
        result = self._measure(cell, key)
        if result.status == "absent":
            self._absent[_backend(cell)] = result
        elif result.status == "failed":
            self._failures.setdefault(_config(cell), []).append(result)
        return result

    def _skip(self, cell: Cell, key: str) -> CellResult | None:
        absent = self._absent.get(_backend(cell))
        if absent is not None:
            return replace(absent, cell=cell, key=key)
        failures = self._failures.get(_config(cell), [])
        if len(failures) < GIVE_UP:
            return None
        last = failures[-1]
        return replace(last, cell=cell, key=key,
                       detail=f"not started: failed in {len(failures)} rounds ({last.detail})")

    def _measure(self, cell: Cell, key: str) -> CellResult:
        limit = self._request.memory_limit if cell.device == "cpu" else None
        corpus = str(self._request.output / CORPUS) if cell.batching or cell.traffic else None
        job = Job(cell, key, os.getloadavg()[0], limit, corpus)
        # What a load generator was asked to last comes on top; Offline may take it half as long
        # again, since it is sent for calls that are quicker than those seen before it.
        lasting = 2 * cell.traffic.seconds if cell.traffic else 0.0
        return run_job(job, self._request.output / CELLS, self._request.timeout + lasting)


def _config(cell: Cell) -> str:
    return cell.config.key("")


def _backend(cell: Cell) -> tuple[object, ...]:
    """What may be absent: a runtime for a column, or the load generator as well."""
    return (cell.traffic is not None, *cell.column)


def read_result(path: Path) -> CellResult | None:
    """A result file, or None where there is none or it is not one (an older schema, say)."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError, UsageError):
        return None


def run_job(job: Job, folder: Path, timeout: float, module: str = "cell") -> CellResult:
    """Run one cell in a process of its own and leave its result in ``folder``.

    Args:
        module: of this package; what the process runs.
    """
    job_path, path = folder / f"{job.key}.job.json", folder / f"{job.key}.json"
    log = folder / f"{job.key}.log"
    path.unlink(missing_ok=True)
    write_json(job_path, asdict(job))
    ended = _run([f"{__package__}.{module}", str(job_path), str(path)], log, timeout,
                 thread_environment(job.cell))
    result = read_result(path)
    if result is None or result.key != job.key or ended.code != 0:
        result = _post_mortem(job, ended, timeout, _tail(log))
        write_json(path, asdict(result))
    elif result.status != "ok":
        result = replace(result, stderr=_tail(log))
        write_json(path, asdict(result))
    job_path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return result


@dataclass(frozen=True, slots=True)
class _Ended:
    code: int
    timed_out: bool


def _run(
    arguments: Iterable[str], log: Path, timeout: float, variables: Mapping[str, str]
) -> _Ended:
    """Start ``python -m`` in its own process group and block until it ends or time is over."""
    # -P: the working directory may hold files named like packages.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            env={**os.environ, **variables}, start_new_session=True)
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout, kill)
    timer.start()
    try:
        # Waiting without reaping keeps the process id ours until the timer is off.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
        timer.join()
        code = process.wait()
    return _Ended(code, expired.is_set())


def _tail(log: Path) -> str:
    text = log.read_bytes().decode("utf-8", errors="replace")
    lines = (t for t in text.splitlines() if not t.startswith("Extension modules:"))
    return "\n".join(lines)[-TAIL:].strip()


def _post_mortem(job: Job, ended: _Ended, timeout: float, tail: str) -> CellResult:
    cause, detail = _cause(ended, timeout, tail)
    return CellResult(job.cell, job.key, "failed", cause=cause, detail=detail, stderr=tail)


def _cause(ended: _Ended, timeout: float, tail: str) -> tuple[Cause, str]:
    if ended.timed_out:
        return "timeout", f"killed after {timeout:g} s"
    if ended.code >= 0:
        cause: Cause = "out of memory" if says_memory(tail) else "error"
        return cause, f"ended with exit code {ended.code} and no result"
    name = signal.Signals(-ended.code).name
    if name == "SIGKILL":
        return "killed", (f"ended by {name}, which this program did not send: "
                          "the kernel short of memory, or a person")
    return "out of memory" if says_memory(tail) else "crash", f"ended by {name}"


def _measured_ceilings(
    request: SweepRequest, environment: Environment, number: int
) -> Iterator[Ceilings]:
    """A round's ceilings by device and threads, each of a process of its own, kept for reruns."""
    if not request.measure_ceilings:
        return
    for device in request.devices:
        for threads in request.threads:
            name = f"ceilings-{device}-{threads}-{environment.digest[:12]}-{number}.json"
            path = request.output / name
            found = _read_ceilings(path)
            if found is None:
                log = path.with_suffix(".log")
                cell = Cell("", "", "", threads=threads)
                _run([f"{__package__}.ceilings", str(threads), device, str(path)], log,
                     request.timeout, thread_environment(cell))
                log.unlink(missing_ok=True)
                found = _read_ceilings(path)
            if found is not None:
                yield found


def _read_ceilings(path: Path) -> Ceilings | None:
    try:
        return _CEILINGS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
