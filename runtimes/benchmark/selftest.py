"""Does the benchmark tell the truth? Known latencies in, stated intervals out.

The statistics are tried on simulated draws, hundreds of times in seconds; the clock, the process
per cell and the report on a fake runtime that waits for a known time.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from . import statistics as st
from .cell import Job
from .records import Cell, Sampling
from .sweep import Subject, SweepRequest, run_job

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIALS = 200
SLOWDOWN = 1.05
COVERAGE = 0.93
FALSE_ALARMS = 0.05
FOUND = 0.95
OVERHEAD = 0.01


@dataclass(frozen=True, slots=True)
class Simulation:
    """How simulated latencies are drawn: log-normal with interruptions.

    Attributes:
        processes, samples: per cell, and per process.
        between, within: standard deviation of the logarithm between and within processes.
        interrupted: share of calls that take half as long again.
    """

    processes: int = 5
    samples: int = 60
    between: float = 0.01
    within: float = 0.03
    interrupted: float = 0.02

    def draw(self, typical: float, rng: np.random.Generator) -> dict[int, NDArray[np.float64]]:
        """Samples by round of one cell whose interruption-free median is ``typical`` seconds."""
        found = {}
        for number in range(self.processes):
            level = math.log(typical) + rng.normal(0, self.between)
            samples = np.exp(level + rng.normal(0, self.within, self.samples))
            samples[rng.random(self.samples) < self.interrupted] *= 1.5
            found[number] = samples
        return found

    def truth(self, typical: float) -> float:
        """The true median of the mixture, whose tail lies above it: Φ(z) (1 - s) = 1/2.

        The interrupted calls are all above the median as long as 1.5 exceeds a few ``within``.
        """
        z = NormalDist().inv_cdf(0.5 / (1 - self.interrupted))
        return typical * math.exp(z * self.within)


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and what was found: ``value`` must be at least, or at most, ``bound``."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        word = "ok" if self.passed else "FAILED"
        return f"{word:6} {self.name}: {self.value:.2%} (required {sign} {self.bound:.0%})"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The checks in order, and how long they took in seconds."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    def lines(self) -> tuple[str, ...]:
        return tuple(map(str, self.checks))


def self_test(*, trials: int = TRIALS, seed: int = 0, real_clock: bool = True) -> SelfTest:
    """Run all checks; about ten seconds, a few of them on the real clock in fresh processes."""
    start = time.perf_counter()
    model = Simulation()
    checks = [
        Check("intervals of the median that cover the truth", coverage(model, trials, seed),
              COVERAGE, True),
        Check("intervals of p90 that cover the truth",
              percentile_coverage(0.9, trials, seed), COVERAGE, True),
        Check("A/A comparisons that raise a false alarm", alarms(model, 1.0, trials, seed),
              FALSE_ALARMS, False),
        Check("injected slowdowns of 5 % that are found", alarms(model, SLOWDOWN, trials, seed),
              FOUND, True),
    ]
    if real_clock:
        checks.extend(_on_the_clock(seed))
    return SelfTest(tuple(checks), time.perf_counter() - start)


def coverage(model: Simulation, trials: int, seed: int) -> float:
    """Share of trials in which the interval of the typical latency holds the true median."""
    rng = np.random.default_rng([seed, 1])
    truth = model.truth(1e-3)
    held = [
        not st.centre(list(model.draw(1e-3, rng).values()), seed=i).excludes(truth)
        for i in range(trials)
    ]
    return float(np.mean(held))


def percentile_coverage(q: float, trials: int, seed: int) -> float:
    """Share of trials in which order-statistic bounds hold the true quantile of a log-normal."""
    rng = np.random.default_rng([seed, 2])
    truth = math.exp(0.2 * NormalDist().inv_cdf(q))
    n = st.samples_needed(q)
    held = []
    for _ in range(trials):
        bounds = st.percentile(np.exp(rng.normal(0, 0.2, n)), q).interval
        held.append(bounds is not None and not bounds.excludes(truth))
    return float(np.mean(held))


def alarms(model: Simulation, factor: float, trials: int, seed: int) -> float:
    """Share of trials in which a cell ``factor`` times as slow is called slower.

    With a factor of 1, any claim at all is counted. The noise floor of each trial comes from an
    A/A pair of its own.
    """
    rng = np.random.default_rng([seed, 3])
    words = ("slower",) if factor > 1 else ("slower", "faster")
    claimed = []
    for i in range(trials):
        twin, base, other = (model.draw(1e-3 * f, rng) for f in (1.0, 1.0, factor))
        floor = st.noise_floor([st.ratio(twin, base, seed=i)])
        claimed.append(st.compare(other, base, floor=floor, seed=i).word in words)
    return float(np.mean(claimed))


def _on_the_clock(seed: int) -> list[Check]:
    """Fake cells of 1 ms in fresh processes: own cost, and a slowdown through the whole sweep."""
    with tempfile.TemporaryDirectory() as name:
        overhead, parent = measure_overhead(Path(name))
        found = _slowdown(Path(name) / "run", seed)
    return [
        Check("cost of measuring, of a 1 ms call", overhead, OVERHEAD, False),
        Check("processor time of the waiting parent", parent, OVERHEAD, False),
        Check("slowdown of 5 % found on the real clock", found, 1.0, True),
    ]


def measure_overhead(folder: Path) -> tuple[float, float]:
    """What sampling adds to a call that takes 1 ms, and the parent's processor time meanwhile.

    Returns:
        First decile of the samples over 1 ms, less 1 (higher ones hold what the machine did
        meanwhile); the parent's processor seconds over the sampled seconds.
    """
    cell = Cell("fake", "fake", "fake", opener="fake", sequence=16,
                options={"latency": 1e-3}, sampling=Sampling(samples=1000, seconds=3.0))
    before = _own_seconds()
    result = run_job(_job(cell), folder, 60.0)
    spent = _own_seconds() - before
    if not result.samples:
        return math.inf, math.inf
    return float(np.quantile(result.samples, 0.1)) / 1e-3 - 1, spent / math.fsum(result.samples)


def _job(cell: Cell) -> Job:
    return Job(cell, cell.key("self-test"), 0.0)


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _slowdown(folder: Path, seed: int) -> float:
    """1 if a sweep calls a fake of 1.05 ms slower than one of 1 ms, else 0."""
    from .summary import run_sweep

    base = Subject("base", "fake", "base", "fake", options={"latency": 1e-3}, opener="fake")
    slow = replace(base, name="slow", identity="slow", options={"latency": 1e-3 * SLOWDOWN})
    report = run_sweep(SweepRequest(
        (base, slow), folder, batches=(1,), sequences=(16,), rounds=st.MIN_PROCESSES, seed=seed,
        timeout=60.0, measure_ceilings=False, sampling=Sampling(samples=100, seconds=2.0)))
    words = [r.comparison.word for r in report.rows if r.comparison is not None]
    return float(words == ["slower"])
