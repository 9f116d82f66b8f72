"""Generation measured: prefill and decode apart, sessions beside the eager model.

    report = run_generation(GenerationRequest(subjects, shapes, Path("run")))

A subject is measured in a process of its own that opens it once and goes through all shapes; the
processes of a round follow one another in seeded random order, and never run together. Rounds are
the unit of replication. A finished shape is on disk at once, and a process that dies costs the
shape it was at: another goes on with the next. The same call measures what is missing or failed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import IncompleteError, UsageError
from . import statistics as st
from .cell import THREAD_VARIABLES
from .environment import Environment, cores, throttles
from .environment import read as read_environment
from .records import digest, write_json
from .report import refuse_invalid, some

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydantic import TypeAdapter

Mode = Literal["sessions", "dynamic", "static", "compiled"]
"""sessions: an artifact. The rest is the eager model with a growing cache, with one of fixed size,
and with one of fixed size and the forward compiled."""

GENERATION = "generation.json"
GIVE_UP = 2
"""After so many rounds that failed at a shape it is not started again in this call."""
NOT_STARTED = "not started again: "


@dataclass(frozen=True, slots=True)
class Contestant:
    """What is measured.

    Attributes:
        name: in tables.
        path: an artifact's directory, or a source as JSON (:func:`~...pipeline.open_generator`).
        identity: digest that changes when the content does.
        mode: see :data:`Mode`.
        options: of the runtime.
    """

    name: str
    path: str
    identity: str
    mode: Mode
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows, tokens of each prompt, tokens to generate."""

    batch: int
    prompt: int
    tokens: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prompt < 1 or self.tokens < 2:
            raise UsageError(f"{self} cannot be measured",
                             allowed="a batch and a prompt of at least 1, 2 tokens or more")

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}, {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to measure.

    Attributes:
        baseline: name of the contestant that ratios are taken to.
        rounds: processes for each contestant; ratios get an interval from 5.
        repeats: timed calls for each shape in a process, after one that is not.
        timeout: seconds until a process that finishes no shape is ended.
    """

    contestants: tuple[Contestant, ...]
    shapes: tuple[Shape, ...]
    output: Path
    baseline: str | None = None
    rounds: int = 5
    repeats: int = 3
    threads: int = field(default_factory=cores)
    device: str = "cpu"
    timeout: float = 900.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One call of ``generate``, in seconds.

    Attributes:
        first: from the call to the first token's logits: prefill, with the encoder's run.
        steps: between the logits of one token and the next.
        total: the whole call.
    """

    first: float
    steps: tuple[float, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One shape in one process; ``failure`` instead of samples where it did not run.

    Attributes:
        cache: bytes of the key-value cache after the last token; None where it can't be seen.
        tokens: digest of the generated ids, which says whether two contestants did the same work.
        foreign, stolen: cores that other processes and the hypervisor used meanwhile; None where
            unknown.
        gpu: driver readings before and after, on a GPU.
        faults: what makes it invalid: it ran elsewhere than asked.
    """

    shape: Shape
    samples: tuple[Sample, ...] = ()
    cache: int | None = None
    tokens: str = ""
    failure: str = ""
    foreign: float | None = None
    stolen: float | None = None
    gpu: tuple[Mapping[str, Any], ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    """What one process reports: seconds to open, resident bytes, and its shapes.

    Where one died and another went on, ``opened`` and ``resident`` are of the last.
    """

    contestant: str
    round: int
    opened: float
    resident: int
    peak: int
    shapes: tuple[Measured, ...]
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A contestant at a shape.

    Attributes:
        first, step: typical seconds to the first token and between tokens.
        rate: tokens a second while decoding, all rows together.
        p50, p95: between tokens, over all calls and processes; None where there are too few.
        total: typical seconds of the whole call.
        faster: how many times faster than the baseline: decode, whole call.
        verdict: stable or not, with reasons.
        same: whether it generated what the baseline did; None without one.
        failed: how many of its processes did not measure it.
        failure: why there are no figures; with ``failed`` alone, why those failed.
    """

    contestant: str
    shape: Shape
    first: st.Interval | None = None
    step: st.Interval | None = None
    rate: float | None = None
    p50: float | None = None
    p95: float | None = None
    total: st.Interval | None = None
    cache: int | None = None
    decode_speedup: st.Interval | None = None
    total_speedup: st.Interval | None = None
    same: bool | None = None
    verdict: st.Verdict | None = None
    failed: int = 0
    failure: str = ""

    @property
    def label(self) -> str:
        return f"{self.contestant} · {self.shape}"


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Every line with what it was computed from.

    Attributes:
        identities: digest of what each contestant is.
    """

    baseline: str | None
    lines: tuple[Line, ...]
    processes: tuple[Process, ...]
    environment: Environment
    identities: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of what ratios are taken to."""
        return self.baseline or "nothing"

    def verdicts(self, identity: str) -> dict[str, st.Verdict]:
        """Of every line that measured this artifact, by its label."""
        return {line.label: line.verdict for line in self.lines
                if line.verdict and self.identities.get(line.contestant) == identity}

    def line(self, contestant: str, shape: Shape) -> Line:
        """The line of a contestant at a shape."""
        return next(x for x in self.lines if (x.contestant, x.shape) == (contestant, shape))

    def require_complete(self) -> None:
        """Raise for the exit code when something could not be measured.

        Raises:
            IncompleteError: says what, and why.
        """
        if failed := [x for x in self.lines if x.failed or x.failure]:
            causes = dict.fromkeys(f"{x.contestant}, {x.shape}: {x.failure}" for x in failed)
            raise IncompleteError(
                f"{len(failed)} of {len(self.lines)} lines failed, in whole or in part: "
                + some(list(causes)),
                hint="run the same command again: it measures only what is missing")

    def require_valid(self) -> None:
        """Raise for the exit code when something ran that must not be believed.

        Raises:
            IncompleteError: names the lines, and why.
        """
        refuse_invalid({line.label: "; ".join(line.verdict.reasons) for line in self.lines
                        if line.verdict and line.verdict.word == "invalid"}, len(self.lines))


def run_generation(
    request: GenerationRequest, notify: Callable[[str], None] = lambda _: None
) -> GenerationReport:
    """Measure what is not measured yet, and summarise.

    Raises:
        UsageError: two contestants share a name, the baseline is none of them, or another
            measurement is writing there.
    """
    from .sweep import alone  # the measured process loads this module, and needs none of that

    names = [c.name for c in request.contestants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"more than one is named {', '.join(twice)}", allowed="each name once",
                         hint="rename one of the directories")
    if request.baseline not in (None, *names):
        raise UsageError(f"the baseline is {request.baseline!r}", allowed=", ".join(names))
    request.output.mkdir(parents=True, exist_ok=True)
    with alone(request.output):
        return _measured(request, notify)


def _measured(request: GenerationRequest, notify: Callable[[str], None]) -> GenerationReport:
    found = read_environment()
    order = random.Random(request.seed)
    done: list[Process] = []
    for number in range(request.rounds):
        turn = list(request.contestants)
        order.shuffle(turn)
        for contestant in turn:
            notify(f"round {number + 1}/{request.rounds} {contestant.name}")
            hopeless = _hopeless(contestant.name, request.shapes, done)
            done.append(_process(request, contestant, number, found.digest, hopeless))
    report = summarise(request, tuple(done), found)
    write_json(request.output / GENERATION, asdict(report))
    return report


def _process(
    request: GenerationRequest, contestant: Contestant, number: int, machine: str,
    hopeless: Sequence[Measured] = (),
) -> Process:
    """Measure the shapes that are missing, and read what earlier calls left.

    Args:
        hopeless: shapes that are not started, with the failure that says so.
    """
    job = {
        "contestant": asdict(contestant), "round": number, "repeats": request.repeats,
        "shapes": [asdict(s) for s in request.shapes], "threads": request.threads,
        "device": request.device, "seed": request.seed,
    }  # fmt: skip
    # By what is measured: neither where it lies nor which other shapes are asked for matters.
    same = {**job, "contestant": {**asdict(contestant), "path": ""}, "shapes": []}
    place = request.output / f"{digest([same, machine])}.json"
    found = read_process(place)
    if found is not None:  # what failed in an earlier call, or was invalid, is tried again
        good = tuple(m for m in found.shapes if m.samples and not m.faults)
        found = replace(found, shapes=good)
        write_json(place, asdict(found))
    lost = {m.shape: m for m in hopeless if m.shape not in _done(found)}
    while missing := [s for s in request.shapes if s not in {*lost, *_done(found)}]:
        before = _stamp(place)
        reason = _run({**job, "shapes": [asdict(s) for s in missing]}, place, request)
        found = read_process(place)
        left = [s for s in missing if s not in _done(found)]
        if _stamp(place) != before:
            left = left[:1]  # the one that it was at; else it was not even opened
        lost |= {shape: Measured(shape, failure=reason) for shape in left}
    if found is None:
        why = next(m.failure for m in lost.values())
        return Process(contestant.name, number, 0.0, 0, 0, tuple(lost.values()), failure=why)
    mine = (m for m in found.shapes if m.shape in request.shapes)
    return replace(found, shapes=(*mine, *lost.values()))


def _done(found: Process | None) -> set[Shape]:
    return {m.shape for m in found.shapes} if found else set()


def _run(job: Mapping[str, Any], place: Path, request: GenerationRequest) -> str:
    """One process, which adds its shapes to ``place``; how it ended, if it did not finish."""
    given, log = place.with_suffix(".job"), place.with_suffix(".log")
    write_json(given, {**job, "parent": os.getpid()})
    threads = {name: str(request.threads) for name in THREAD_VARIABLES}
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", f"{__package__}.generating",
               str(given), str(place)]
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            ended = _ended(child, place, request.timeout)
        finally:
            child.kill()
            child.wait()
    given.unlink(missing_ok=True)
    if ended is None:
        return f"it took more than {request.timeout:.0f} s"
    reason = f"it ended with status {ended}: {_last_line(log)}"
    if not ended:
        log.unlink()
    return reason


def _ended(child: subprocess.Popen[bytes], place: Path, seconds: float) -> int | None:
    """Its status; None when it finished nothing for so long."""
    while True:
        before = _stamp(place)
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            if _stamp(place) == before:
                return None


def _stamp(place: Path) -> int:
    """Another whenever a process has added to what it found."""
    return place.stat().st_mtime_ns if place.exists() else 0


def _hopeless(name: str, shapes: Sequence[Shape], done: Sequence[Process]) -> list[Measured]:
    """Shapes that a contestant failed at in :data:`GIVE_UP` rounds already."""
    found = []
    for shape in shapes:
        failures = [m.failure or p.failure for p in done if p.contestant == name
                    for m in (p.shapes or (Measured(shape),)) if m.shape == shape
                    if m.failure or p.failure]
        if len(failures) >= GIVE_UP:
            why = failures[0].removeprefix(NOT_STARTED)
            found.append(Measured(shape, failure=NOT_STARTED + why))
    return found


def read_process(place: Path) -> Process | None:
    """What a process left; None where there is nothing yet."""
    return _reader().validate_json(place.read_bytes()) if place.exists() else None


def _last_line(log: Path) -> str:
    lines = [x for x in log.read_text("utf-8", errors="replace").splitlines() if x.strip()]
    return lines[-1][:300] if lines else "it said nothing"


@cache
def _reader() -> TypeAdapter[Process]:
    from pydantic import TypeAdapter

    return TypeAdapter(Process)


def summarise(
    request: GenerationRequest, processes: Sequence[Process], found: Environment
) -> GenerationReport:
    """Lines of every contestant at every shape, in the request's order."""
    lines = tuple(
        _line(request, contestant.name, shape, processes)
        for shape in request.shapes
        for contestant in request.contestants
    )
    return GenerationReport(request.baseline, lines, tuple(processes), found,
                            {c.name: c.identity for c in request.contestants})


def whole_calls(
    name: str, shape: Shape, processes: Sequence[Process]
) -> dict[int, NDArray[np.float64]]:
    """Seconds of whole calls by round."""
    return _of(_runs(name, shape, processes), _totals)


def _line(
    request: GenerationRequest, name: str, shape: Shape, processes: Sequence[Process]
) -> Line:
    mine = _runs(name, shape, processes)
    started = sum(p.contestant == name for p in processes)
    failed = started - len(mine)
    why = _why(name, shape, processes) if failed else ""
    if not mine:
        return Line(name, shape, failed=failed, failure=why)
    steps, totals = _of(mine, _steps), _of(mine, _totals)
    typical = st.centre(list(steps.values()), seed=request.seed)
    pooled = np.concatenate(list(steps.values()))
    last = next(iter(mine.values()))
    speedups: tuple[st.Interval | None, st.Interval | None] = (None, None)
    same = None
    theirs = _runs(request.baseline, shape, processes) if request.baseline else {}
    if theirs and name != request.baseline:
        speedups = (_speedup(_of(theirs, _steps), steps, request.seed),
                    _speedup(_of(theirs, _totals), totals, request.seed))
        same = {m.tokens for m in mine.values()} == {m.tokens for m in theirs.values()}
    p50, p95 = (st.percentile(pooled, q).interval for q in (0.5, 0.95))
    return Line(
        name, shape,
        first=st.centre(list(_of(mine, _firsts).values()), seed=request.seed),
        step=typical,
        rate=shape.batch / typical.value,
        p50=p50.value if p50 else None,
        p95=p95.value if p95 else None,
        total=st.centre(list(totals.values()), seed=request.seed),
        cache=last.cache,
        decode_speedup=speedups[0],
        total_speedup=speedups[1],
        same=same,
        verdict=_verdict(list(mine.values()), totals, failed, started),
        failed=failed,
        failure=why,
    )  # fmt: skip


def _verdict(
    mine: Sequence[Measured], totals: Mapping[int, NDArray[np.float64]], failed: int, started: int
) -> st.Verdict:
    unstable = [f"{failed} of {started} processes failed"] if failed else []
    if throttled := throttles(reading for m in mine for reading in m.gpu):
        unstable.append(throttled)
    return st.verdict(
        list(totals.values()), foreign=max((m.foreign or 0.0) + (m.stolen or 0.0) for m in mine),
        invalid=sorted({fault for m in mine for fault in m.faults}), unstable=unstable)


def _speedup(
    theirs: dict[int, NDArray[np.float64]], mine: dict[int, NDArray[np.float64]], seed: int
) -> st.Interval:
    found = st.ratio(theirs, mine, seed=seed)
    if len(theirs.keys() & mine.keys()) >= st.MIN_PROCESSES:
        return found
    # Of so few processes no spread is known that could be claimed.
    return st.Interval(found.value, found.value, found.value, basis="samples")


def _runs(name: str | None, shape: Shape, processes: Sequence[Process]) -> dict[int, Measured]:
    """What the rounds measured of a contestant at a shape, by round."""
    return {p.round: m for p in processes if p.contestant == name
            for m in p.shapes if m.shape == shape and m.samples}


def _why(name: str, shape: Shape, processes: Sequence[Process]) -> str:
    reasons = [p.failure or m.failure for p in processes if p.contestant == name
               for m in (p.shapes or (Measured(shape),)) if m.shape == shape]
    return next((r for r in reasons if r), "it was not measured")


def _of(
    runs: Mapping[int, Measured], values: Callable[[Measured], list[float]]
) -> dict[int, NDArray[np.float64]]:
    return {number: np.array(values(m)) for number, m in runs.items()}


def _steps(measured: Measured) -> list[float]:
    return [step for sample in measured.samples for step in sample.steps]


def _firsts(measured: Measured) -> list[float]:
    return [sample.first for sample in measured.samples]


def _totals(measured: Measured) -> list[float]:
    return [sample.total for sample in measured.samples]
