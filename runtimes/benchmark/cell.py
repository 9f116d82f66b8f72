"""The measured process: open one session, time it, write one JSON file, exit.

    python -X faulthandler -m modelport.runtimes.benchmark.cell CELL.json RESULT.json

Whatever happens here ends one cell: the parent reads the exit status and the result file.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...errors import BackendUnavailable, ModelportError
from .environment import gpu_readings, processor_time
from .records import (
    Cause,
    Cell,
    CellResult,
    ColdStart,
    Conditions,
    Corpus,
    Memory,
    Sampling,
    cell_from,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from ...session import Session
    from .corpus import CorpusSource

OPENERS = {"pipeline": "...pipeline:open_path", "fake": ".fake:open_session"}
"""A closed list: a cell file cannot name any other code."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "TBB_NUM_THREADS",
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TIMER_STEPS = 1000
"""A sample lasts at least this many steps of the clock: its rounding is below 0.1 %."""
MAX_INNER = 1 << 16
LEAST_PLACED = 0.5
"""Share of nodes on the device below which a measurement is not one of that device. Runtimes put
what computes shapes on the CPU by choice, hence not 1."""
TRANSFER_SAMPLES = 11
TELLING = 0.5
"""Seconds after which the kernel's counters, in steps of 0.01 s, tell a tenth of a core."""
_MEMORY = re.compile(
    r"out of memory|bad_alloc|can't allocate memory|cannot allocate memory|unable to allocate|"
    r"failed to allocate|memoryerror", re.IGNORECASE)


@runtime_checkable
class DeviceClock(Protocol):
    """What a session of a device may offer beside :class:`~.session.Session`."""

    def device_seconds(self, launch: Callable[[], None]) -> float:
        """Run ``launch`` between two events on its stream; seconds between them."""

    def device_memory(self) -> tuple[int, int]:
        """Peak bytes the framework allocated and reserved."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the parent hands to the process: a cell and what is not part of its identity."""

    cell: Cell
    key: str
    load: float
    memory_limit: int | None = None
    corpus: str | None = None
    parent: int = field(default_factory=os.getpid)

    @classmethod
    def read(cls, path: Path) -> Job:
        data = json.loads(path.read_text("utf-8"))
        return cls(cell_from(data["cell"]), data["key"], data["load"], data["memory_limit"],
                   data["corpus"], data["parent"])


def thread_environment(cell: Cell) -> dict[str, str]:
    """Environment variables to set before the process starts, for its threads and their spinning.

    ``OMP_WAIT_POLICY`` and ``KMP_BLOCKTIME`` (milliseconds) say whether idle OpenMP threads spin.
    """
    found = {name: str(cell.threads) for name in THREAD_VARIABLES}
    found["OMP_WAIT_POLICY"] = "ACTIVE" if cell.spinning else "PASSIVE"
    found["KMP_BLOCKTIME"] = "200" if cell.spinning else "0"
    found["OMP_DYNAMIC"] = "FALSE"
    found["TOKENIZERS_PARALLELISM"] = "false"
    return found


def classify(error: BaseException) -> Cause:
    """Which kind of failure an exception is."""
    if isinstance(error, MemoryError) or _MEMORY.search(f"{type(error).__name__}: {error}"):
        return "out of memory"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "error"


def says_memory(text: str) -> bool:
    """Whether the last words of a process name memory as the cause."""
    return bool(_MEMORY.search(text))


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
    cell = job.cell
    conditions = _settle(job)
    importlib.import_module("numpy")  # input data needs it: it is no part of the session's memory
    start = _status()["VmRSS"]
    t0 = time.perf_counter()
    opener = _opener(cell)
    options = _options(cell)
    t1 = time.perf_counter()
    session = opener(cell.path, runtime=cell.runtime, device=cell.device, options=options)
    with session:
        t2 = time.perf_counter()
        opened = _status()
        _reset_peak()
        conditions = replace(conditions, options=options)
        result = replace(empty, status="ok", conditions=conditions)
        timing = _load if cell.traffic else _corpus if cell.batching else _shape
        result, first, second = timing(session, job, result)
        memory = Memory(
            start=start, opened=opened["VmRSS"], peak_open=opened["VmHWM"],
            peak_run=_status()["VmHWM"], anonymous=opened["RssAnon"], limit=job.memory_limit)
        result = replace(
            result, cold=ColdStart(t1 - t0, t2 - t1, first, second), memory=memory,
            runtime=session.runtime,
            placement=_placement(session),
            faults=(*result.faults, *misplaced(session, cell.device)))
        return _device_readings(session, result)


def _opener(cell: Cell) -> Callable[..., Session]:
    module, _, name = OPENERS[cell.opener].partition(":")
    found: Callable[..., Session] = getattr(importlib.import_module(module, __package__), name)
    return found


def _options(cell: Cell) -> dict[str, Any]:
    """The cell's options, with threads and spinning where the runtime takes them."""
    options = dict(cell.options)
    if cell.opener == "fake" or cell.runtime is None:
        return options
    from .. import get

    known = get(cell.runtime).options
    wanted = {"threads": cell.threads, "spinning": cell.spinning}
    return {**{k: v for k, v in wanted.items() if k in known}, **options}


def _settle(job: Job) -> Conditions:
    """Limit memory, pin to cores, and offer this process to the kernel as the first to kill."""
    if job.memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory_limit, job.memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-job.cell.threads :])  # the first core serves interrupts
        affinity = tuple(sorted(os.sched_getaffinity(0)))
    else:
        affinity = ()
    shown = {k: os.environ[k] for k in thread_environment(job.cell) if k in os.environ}
    gpu = () if job.cell.device == "cpu" else tuple(gpu_readings(os.getpid()))
    return Conditions(affinity, shown, {}, job.load, clock_step(), gpu=gpu)


def follow(parent: int) -> None:
    """End when the process that started this one does, also where it already has.

    What goes on without it would disturb what the next run measures.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the process that started this one is gone")


class Company:
    """Counts the cores that others used between :meth:`__enter__` and :meth:`__exit__`."""

    foreign: float | None = None
    stolen: float | None = None

    def __enter__(self) -> Company:
        self._before = processor_time()
        self._own, self._start = time.process_time(), time.perf_counter()
        return self

    def outlast(self, call: Callable[[], None], seconds: float) -> None:
        """Go on calling, untimed, until others would show.

        Args:
            seconds: that sampling may take; where this would be more than a twentieth, it is not
                done, and nothing is known of others.
        """
        while seconds >= 20 * TELLING and time.perf_counter() - self._start < TELLING:
            call()

    def __exit__(self, *_: object) -> None:
        after, elapsed = processor_time(), time.perf_counter() - self._start
        if after is None or self._before is None or elapsed < TELLING:
            return
        own = time.process_time() - self._own
        busy, stolen = (b - a for a, b in zip(self._before, after, strict=True))
        self.foreign = max(busy - own, 0.0) / elapsed
        self.stolen = max(stolen, 0.0) / elapsed


def clock_step() -> float:
    """Smallest positive difference of two readings of the clock, in seconds."""
    best = 1 << 62
    for _ in range(200):
        start = now = time.perf_counter_ns()
        while now == start:
            now = time.perf_counter_ns()
        best = min(best, now - start)
    return best * 1e-9


def _shape(session: Session, job: Job, result: CellResult) -> tuple[CellResult, float, float]:
    from . import feeds

    cell = job.cell
    data = feeds.draw(session.spec, cell.batch, cell.sequence, seed=cell.seed, dims=cell.dims)
    t0 = time.perf_counter()
    launch = session.bind(data)
    call = _call(session, launch)
    call()
    t1 = time.perf_counter()
    call()
    t2 = time.perf_counter()
    assert result.conditions is not None
    inner = inner_loop(t2 - t1, result.conditions.clock_step)
    with Company() as company:
        samples, stopped = sample(call, cell.sampling, inner)
        company.outlast(call, cell.sampling.seconds)
    faults = _outputs(session.run(data))  # and the warm-up of the transfers
    result = replace(
        _accompanied(result, company), samples=samples, inner=inner, stopped=stopped,
        device_samples=_device_samples(session, launch, cell, len(samples)),
        transfer_samples=_transfers(session, data, cell), faults=faults)
    return result, t1 - t0, t2 - t1


def _accompanied(result: CellResult, company: Company) -> CellResult:
    assert result.conditions is not None
    conditions = replace(
        result.conditions, foreign=company.foreign, stolen=company.stolen)
    return replace(result, conditions=conditions)


def _call(session: Session, launch: Callable[[], None]) -> Callable[[], None]:
    synchronize = session.synchronize

    def call() -> None:
        launch()
        synchronize()

    return call


def inner_loop(seconds: float, step: float) -> int:
    """Calls per sample (a power of two) so that a sample lasts TIMER_STEPS clock steps."""
    inner = 1
    while inner < MAX_INNER and inner * seconds < TIMER_STEPS * step:
        inner *= 2
    return inner


def sample(
    call: Callable[[], None], plan: Sampling, inner: int = 1
) -> tuple[tuple[float, ...], Any]:
    """Warm up, then time calls until the plan's count, or its seconds once it has the minimum.

    The garbage collector is off meanwhile. Returns seconds per call and why it stopped.
    """
    for _ in range(plan.warmup):
        call()
    clock, taken, repeats = time.perf_counter_ns, array("q"), range(inner)
    gc.collect()
    gc.disable()
    try:
        deadline = clock() + int(plan.seconds * 1e9)
        for done in range(plan.samples):
            start = clock()
            if start > deadline and done >= plan.min_samples:
                break
            for _ in repeats:
                call()
            taken.append(clock() - start)
    finally:
        gc.enable()
    stopped = "samples" if len(taken) == plan.samples else "seconds"
    return tuple(t * 1e-9 / inner for t in taken), stopped


def _transfers(session: Session, data: Mapping[str, Any], cell: Cell) -> tuple[float, ...]:
    """Host arrays to host arrays, copies included: what separates it from ``samples``."""
    count = min(TRANSFER_SAMPLES, cell.sampling.samples)
    plan = replace(cell.sampling, warmup=0, samples=count, min_samples=1,
                   seconds=cell.sampling.seconds / 4)
    return sample(lambda: _discard(session.run(data)), plan)[0]


def _discard(_: Any) -> None:
    return None


def _device_samples(
    session: Session, launch: Callable[[], None], cell: Cell, count: int
) -> tuple[float, ...]:
    if cell.device == "cpu" or not isinstance(session, DeviceClock):
        return ()
    return tuple(session.device_seconds(launch) for _ in range(min(count, 100)))


def _corpus(session: Session, job: Job, result: CellResult) -> tuple[CellResult, float, float]:
    """One pass over all sentences, from host arrays to host arrays, batch by batch."""
    from .corpus import batches, load

    cell = job.cell
    assert job.corpus is not None
    source = _cut(load(Path(job.corpus)), session)
    assert cell.batching is not None
    most = _rows_at_once(session, cell.batch) if cell.batching == "token-budget" else cell.batch
    plan = batches(source.lengths, cell.batching, batch=most, budget=cell.budget)
    data = [_rows(session, source, batch.rows, batch.length, cell) for batch in plan]
    sentence = _rows(session, source, (0,), source.lengths[0], cell)
    t0 = time.perf_counter()
    session.run(sentence)
    t1 = time.perf_counter()
    output = session.run(sentence)
    t2 = time.perf_counter()
    for feeds in _spread(data, cell.sampling.warmup):
        session.run(feeds)
    with Company() as company:
        taken = _pass(session, data)
    found = Corpus(
        len(source.lengths), sum(source.lengths), sum(b.padded for b in plan),
        tuple(len(b.rows) for b in plan), tuple(b.tokens for b in plan))
    result = replace(_accompanied(result, company), samples=taken, stopped="corpus",
                     corpus=found, faults=_outputs(output))
    return result, t1 - t0, t2 - t1


def _load(session: Session, job: Job, result: CellResult) -> tuple[CellResult, float, float]:
    """What MLPerf's load generator makes of the session."""
    from . import load
    from .corpus import load as load_corpus

    cell = job.cell
    assert job.corpus is not None
    assert cell.traffic is not None
    load.require()
    source = _cut(load_corpus(Path(job.corpus)), session)
    rows = [_rows(session, source, (i,), n, cell) for i, n in enumerate(source.lengths)]
    t0 = time.perf_counter()
    session.run(rows[0])
    t1 = time.perf_counter()
    output = session.run(rows[0])
    t2 = time.perf_counter()
    with Company() as company:
        found, taken = load.drive(
            session, rows, source.lengths, cell.traffic, most=_rows_at_once(session, cell.batch),
            budget=cell.budget, seed=cell.seed)
    result = replace(_accompanied(result, company), samples=taken, stopped="load generator",
                     load=found, faults=_outputs(output))
    return result, t1 - t0, t2 - t1


def _spread(data: Sequence[Any], count: int) -> Sequence[Any]:
    """``count`` of the batches, or all if they are fewer, evenly over the pass."""
    return [data[i * len(data) // count] for i in range(min(count, len(data)))] if count else []


def _pass(session: Session, data: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, ...]:
    taken = []
    gc.collect()
    gc.disable()
    try:
        for feeds in data:
            start = time.perf_counter_ns()
            session.run(feeds)
            taken.append((time.perf_counter_ns() - start) * 1e-9)
    finally:
        gc.enable()
    return tuple(taken)


def _cut(source: CorpusSource, session: Session) -> CorpusSource:
    """Cut sentences to the longest sequence that the session takes."""
    from . import feeds

    longest = max(
        (session.spec.dims[t.shape[1]].max for t in session.spec.inputs
         if len(t.shape) > 1 and isinstance(t.shape[1], str) and t.shape[1] in session.spec.dims
         and t.role in feeds.SEQUENTIAL), default=max(source.lengths))
    ids = source.ids and tuple(row[:longest] for row in source.ids)
    return replace(source, lengths=tuple(min(n, longest) for n in source.lengths), ids=ids)


def _rows_at_once(session: Session, most: int) -> int:
    """At most ``most``, and no more than the session takes."""
    dims = session.spec.dims
    limits = (dims[t.shape[0]].max for t in session.spec.inputs
              if t.shape and isinstance(t.shape[0], str) and t.shape[0] in dims)
    return min([most, *limits])


def _rows(
    session: Session, source: CorpusSource, rows: tuple[int, ...], length: int, cell: Cell
) -> dict[str, np.ndarray]:
    from . import feeds

    tokens = None if source.ids is None else [source.ids[i] for i in rows]
    return feeds.draw(session.spec, len(rows), length, seed=cell.seed + rows[0], dims=cell.dims,
                      lengths=[source.lengths[i] for i in rows], tokens=tokens)


def _outputs(outputs: Mapping[str, Any]) -> tuple[str, ...]:
    import numpy as np

    faults = []
    for name, value in outputs.items():
        kind = value.dtype
        if kind.kind in "fcV" and not np.all(np.isfinite(value.astype(np.float32))):
            faults.append(f"output {name} is not finite")
    return tuple(faults) if outputs else ("there are no outputs",)


def _placement(session: Session) -> dict[str, Any]:
    found = session.placement()
    return {"device": found.device, "providers": list(found.providers),
            "nodes": dict(found.nodes), "fallback": dict(found.fallback)}


def misplaced(session: Session, device: str) -> tuple[str, ...]:
    """What is wrong where a session, or too much of it, ran elsewhere than asked."""
    found = session.placement()
    if found.device != device:
        return (f"asked for {device}, ran on {found.device}",)
    share = placed(found.nodes, found.fallback)
    if share is not None and share < LEAST_PLACED:
        left = sorted(found.fallback.items(), key=lambda item: -item[1])[:5]
        named = ", ".join(f"{count} {name}" for name, count in left)
        return (f"only {share:.0%} of the nodes ran on {device}; on the CPU: {named}",)
    return ()


def placed(nodes: Mapping[str, int], fallback: Mapping[str, int]) -> float | None:
    """Share of the nodes that run on the device asked for; None where nodes are not told."""
    total = sum(nodes.values())
    return 1 - sum(fallback.values()) / total if total else None


def _device_readings(session: Session, result: CellResult) -> CellResult:
    if result.cell.device == "cpu" or result.memory is None or result.conditions is None:
        return result
    memory, readings = result.memory, gpu_readings(os.getpid())
    if isinstance(session, DeviceClock):
        allocated, reserved = session.device_memory()
        memory = replace(memory, gpu_allocated=allocated, gpu_reserved=reserved)
    used = [r["process_bytes"] for r in readings if r.get("process_bytes") is not None]
    memory = replace(memory, gpu_process=sum(used) if used else None)
    conditions = replace(result.conditions, gpu=(*result.conditions.gpu, *readings))
    return replace(result, memory=memory, conditions=conditions)


def _status() -> dict[str, int]:
    """Memory lines of ``/proc/self/status`` in bytes; zeros where there is no such file."""
    wanted = dict.fromkeys(("VmRSS", "VmHWM", "RssAnon"), 0)
    try:
        text = Path("/proc/self/status").read_text("ascii", errors="replace")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**wanted, "VmHWM": peak}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in wanted:
            wanted[name] = int(rest.split()[0]) * 1024
    return wanted


def _reset_peak() -> None:
    """Start VmHWM again from here (proc(5), clear_refs); where refused, peaks include opening."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process: paths of the job and of the result."""
    job_path, result_path = map(Path, sys.argv[1:] if arguments is None else arguments)
    job = Job.read(job_path)
    follow(job.parent)
    result = measure(job)
    write_json(result_path, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
