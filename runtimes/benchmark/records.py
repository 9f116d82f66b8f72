"""What is to be measured and what was found, as frozen data; the files of a run are their JSON.

No framework and no third-party package is imported here: the measured process reads these too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import UsageError

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
Status = Literal["ok", "failed", "absent"]
Batching = Literal["padded", "sorted", "token-budget"]
Cause = Literal[
    "", "out of memory", "timeout", "killed", "crash", "error", "backend absent", "interrupted"
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a cell is sampled; the same for all cells that are compared.

    Attributes:
        warmup: calls before the first sample, after the first call.
        samples: samples to take.
        min_samples: taken even when ``seconds`` is over.
        seconds: time budget of the sampling.
    """

    warmup: int = 5
    samples: int = 100
    min_samples: int = 11
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.samples or self.warmup < 0 or self.seconds < 0:
            raise UsageError(f"sampling {self} cannot be done",
                             allowed="warmup >= 0, 1 <= min_samples <= samples, seconds >= 0")


@dataclass(frozen=True, slots=True)
class Traffic:
    """How MLPerf's load generator sends sentences of the corpus.

    Attributes:
        scenario: one after another; ``per_query`` at once, one query after another; at random
            times; all at once.
        seconds: the least that a run lasts.
        queries: the least that are sent.
        rate: queries a second of ``Server``; None: half of what calls of one sentence sustain.
        limit: seconds that 99 % of the answers of ``Server`` must stay below.
        per_query: sentences of one query of ``MultiStream``.
    """

    scenario: Scenario
    seconds: float = 60.0
    queries: int = 100
    rate: float | None = None
    limit: float = 0.1
    per_query: int = 8


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement in one fresh process.

    Attributes:
        subject: name shown to the user; cells of one subject share an artifact.
        path: artifact directory, or model for a runtime of the source; not part of the key.
        identity: digest that says which artifact or checkpoint this is.
        runtime: name of the runtime; None lets the opener choose.
        device: ``cpu`` or ``cuda``.
        dtype: precision of the computation, as the artifact states it.
        threads: compute threads; the process is pinned to as many cores.
        spinning: whether idle threads spin; set explicitly for OpenMP and the runtime.
        batch: rows per call; the largest batch where the batching is ``token-budget``.
        sequence: tokens per row; 0 with a corpus, and where a model takes no sequence.
        batching: None for one fixed shape, else how the corpus is cut into batches.
        budget: padded tokens per batch, for ``token-budget`` and ``Offline``.
        traffic: None unless a load generator drives the session; ``batch`` is then the most
            sentences that are answered in one call.
        options: for the runtime.
        dims: sizes of dynamic dimensions other than batch and sequence.
        seed: of the input data.
        round: which repetition; a fresh process each.
        twin: the same artifact measured again for the A/A noise floor.
        opener: ``pipeline``, or ``fake`` for the self-test.
    """

    subject: str
    path: str
    identity: str
    runtime: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    spinning: bool = True
    batch: int = 1
    sequence: int = 128
    batching: Batching | None = None
    budget: int = 0
    traffic: Traffic | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    round: int = 0
    twin: bool = False
    opener: Literal["pipeline", "fake"] = "pipeline"
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.threads < 1 or self.sequence < 0:
            raise UsageError(
                f"batch {self.batch}, sequence {self.sequence}, {self.threads} threads",
                allowed="each at least 1")

    def key(self, environment: str, corpus: str = "") -> str:
        """Name of the result: sha256 of artifact identity, cell, environment and corpus."""
        content = {**asdict(self), "environment": environment,
                   "corpus": corpus if self.batching or self.traffic else ""}
        del content["path"]
        return digest(content)

    @property
    def config(self) -> Cell:
        """The cell without its round: what processes are replicates of."""
        return replace(self, round=0)

    @property
    def column(self) -> tuple[str, ...]:
        """What is compared with what at one shape: subject, runtime, device, dtype, threads, …"""
        extra = json.dumps(dict(self.options), sort_keys=True) if self.options else ""
        return (self.subject, self.runtime or "", self.device, self.dtype, str(self.threads), extra)

    @property
    def shape(self) -> tuple[int, int, str, int]:
        return (self.batch, self.sequence, self.batching or "", self.budget)

    def work(self) -> str:
        """``8×128``, ``batch 8`` of a model without a sequence, how the corpus is cut
        (``sorted 32``), or the scenario of the traffic."""
        if self.traffic:
            return self.traffic.scenario
        if self.batching:
            return f"{self.batching} {self.budget or self.batch}"
        return f"{self.batch}×{self.sequence}" if self.sequence else f"batch {self.batch}"

    def label(self) -> str:
        twin = " (A/A)" if self.twin else ""
        return f"{self.subject} · {self.runtime or 'auto'} · {self.device} · {self.work()}{twin}"


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds until a fresh process answers.

    Attributes:
        imports: importing the opener.
        open: opening the session, framework import included.
        first: from the open session to the first result: binding and the first call.
        second: the call after it.
    """

    imports: float
    open: float
    first: float
    second: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the process in bytes, from ``/proc/self/status``.

    Attributes:
        start: before opening.
        opened: after opening; the growth is weights, graph and the runtime's libraries.
        peak_open: highest while opening.
        peak_run: highest from then on; the growth over ``opened`` is activations, arenas, and
            weights that a runtime maps lazily.
        anonymous: part of ``opened`` that no file backs.
        limit: data limit set for the process (RLIMIT_DATA); None where there was none.
        gpu_allocated, gpu_reserved: peaks as the framework reports them.
        gpu_process: used by this process as the driver reports it.
    """

    start: int
    opened: int
    peak_open: int
    peak_run: int
    anonymous: int
    limit: int | None = None
    gpu_allocated: int | None = None
    gpu_reserved: int | None = None
    gpu_process: int | None = None

    @property
    def weights(self) -> int:
        return max(self.opened - self.start, 0)

    @property
    def activations(self) -> int:
        return max(self.peak_run - self.opened, 0)

    @property
    def peak(self) -> int:
        return max(self.peak_open, self.peak_run)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was set for the process and what was read back.

    Attributes:
        affinity: cores it was allowed to use.
        variables: environment variables that steer threads.
        options: runtime options in force, threads and spinning included.
        load: 1-minute load average before the start; it still holds the cells before this one.
        foreign: cores that other processes kept busy while this one sampled.
        stolen: cores that the hypervisor took away meanwhile. Both None where unknown, or where
            sampling was too short (half a second) for the kernel's counters.
        clock_step: smallest step of the clock that was seen, in seconds.
        gc: whether the garbage collector ran during sampling.
        gpu: driver readings before and after (clocks, temperature, power, throttle reasons).
    """

    affinity: tuple[int, ...]
    variables: Mapping[str, str]
    options: Mapping[str, Any]
    load: float
    clock_step: float
    foreign: float | None = None
    stolen: float | None = None
    gc: bool = False
    gpu: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a pass over the corpus came to.

    Attributes:
        sentences, tokens: real ones.
        padded: token slots computed, padding included.
        batches: rows of each batch, aligned with the samples.
        order: for each batch the sum of its real tokens.
    """

    sentences: int
    tokens: int
    padded: int
    batches: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.padded


@dataclass(frozen=True, slots=True)
class Load:
    """What the load generator says of a run, in its own words.

    Attributes:
        version: of the load generator.
        valid: whether the run met what the scenario requires.
        reason: why it did not; "" where valid.
        early_stopping: what its rule for short runs concluded.
        figures: every number of its log whose name begins with ``result_`` or ``early_stopping_``.
        settings: what was in force, from the same log.
        summary: its summary, whole.
    """

    version: str
    valid: bool
    reason: str
    early_stopping: str
    figures: Mapping[str, float]
    settings: Mapping[str, Any]
    summary: str


@dataclass(frozen=True, slots=True)
class CellResult:
    """What became of a cell.

    Attributes:
        runtime: what ran it, as the session says.
        cause: one word on why it failed; ``detail`` in a sentence.
        stderr: last lines the process wrote.
        samples: host wall seconds per call, in the order taken; one per batch with a corpus or
            a load generator.
        inner: calls per sample; above 1 a sample is their mean.
        device_samples: seconds per call between device events, taken apart from ``samples``.
        transfer_samples: seconds per call from host arrays to host arrays, copies included.
        placement: device, providers and nodes, as the session reports them.
        faults: what makes the measurement invalid (wrong device, outputs that are not finite).
        stopped: whether sampling ended by count or by time.
    """

    cell: Cell
    key: str
    status: Status
    runtime: str = ""
    cause: Cause = ""
    detail: str = ""
    stderr: str = ""
    samples: tuple[float, ...] = ()
    inner: int = 1
    device_samples: tuple[float, ...] = ()
    transfer_samples: tuple[float, ...] = ()
    cold: ColdStart | None = None
    memory: Memory | None = None
    conditions: Conditions | None = None
    placement: Mapping[str, Any] = field(default_factory=dict)
    corpus: Corpus | None = None
    load: Load | None = None
    faults: tuple[str, ...] = ()
    stopped: Literal["", "samples", "seconds", "corpus", "load generator"] = ""
    schema: Literal[1] = 1


def digest(content: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cell_from(data: Mapping[str, Any]) -> Cell:
    """A cell from its JSON.

    Raises:
        UsageError: fields are missing or unknown.
    """
    try:
        traffic = data["traffic"] and Traffic(**data["traffic"])
        return Cell(**{**data, "sampling": Sampling(**data["sampling"]), "traffic": traffic})
    except (KeyError, TypeError) as e:
        raise UsageError(f"this is not a cell: {e}") from e


def write_json(path: Path, content: Any) -> None:
    """Write beside the destination, flush, then rename: a reader sees all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(content, f, allow_nan=False)
            f.flush()
            os.fsync(f.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
