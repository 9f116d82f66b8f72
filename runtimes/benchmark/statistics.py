"""Statistics of repeated timings: pure functions on arrays, nothing measured here.

A *process* is one array of samples, all taken by one fresh process. Processes, not samples, are
the unit of replication: what differs between two starts (memory layout, frequency, neighbours) is
usually larger than what differs between two calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

CONFIDENCE = 0.95
SUPPORT = 0.99
"""Confidence with which at least two samples must lie beyond a percentile for it to be shown."""
MIN_PROCESSES = 5
RESAMPLES = 2000
FEWEST_FENCED = 20
"""Below this many samples the quartiles are too loose for fences to mean anything."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the interval that covers the truth with ``confidence``.

    Attributes:
        basis: what was replicated: ``processes`` or ``samples`` (of one process).
    """

    low: float
    value: float
    high: float
    confidence: float = CONFIDENCE
    basis: Literal["processes", "samples"] = "processes"

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high

    @property
    def margin(self) -> float:
        """Largest relative distance from the estimate to an end of the interval."""
        if not self.value:
            return math.inf
        return max(self.high - self.value, self.value - self.low) / abs(self.value)


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile with its bounds, or the reason why there is none.

    Attributes:
        q: between 0 and 1.
        interval: None where the sample cannot support it.
        n: size of the sample.
        needed: size that would support it.
    """

    q: float
    interval: Interval | None
    n: int
    needed: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"n too small ({self.n} of {self.needed})"
        return f"{self.interval.value:.6g}"


def binomial_cdf(n: int, p: float) -> NDArray[np.float64]:
    """P(B <= k) for k = 0 … n, with B ~ Binomial(n, p) and 0 < p < 1."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    terms = logs[n] - logs[k] - logs[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
    cdf: NDArray[np.float64] = np.minimum(np.cumsum(np.exp(terms)), 1.0)
    return cdf


def samples_needed(q: float) -> int:
    """Smallest sample that supports the q-quantile.

    The rule: with confidence :data:`SUPPORT` at least two samples lie beyond the quantile, so that
    its upper confidence bound is inside the sample and never rests on the maximum alone. The number
    beyond is Binomial(n, t) with t = min(q, 1 - q), hence the smallest n with
    (1 - t)^n + n t (1 - t)^(n-1) <= 1 - SUPPORT: 11 for the median, 64 for p90, 662 for p99.
    """
    tail = min(q, 1 - q)
    if tail <= 0:
        raise ValueError(f"quantile {q} is not between 0 and 1")

    def unsupported(n: int) -> bool:
        few = (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1)
        return few > (1 - SUPPORT) * (1 + 1e-12)

    low, high = 2, 4
    while unsupported(high):
        low, high = high, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if unsupported(middle) else (low, middle)
    return low


def percentile(
    samples: NDArray[np.float64], q: float, *, timings: int | None = None
) -> Percentile:
    """The q-quantile with order-statistic bounds, free of any assumption on the distribution.

    The bounds are the order statistics l and u with P(B < l) and P(B >= u) each at most
    (1 - CONFIDENCE) / 2 for B ~ Binomial(n, q) (David & Nagaraja, Order Statistics, §7.1).

    Args:
        timings: how many of the samples were timed by themselves, where several share a time
            (sentences of one batch): n is then this, and copies support nothing.
    """
    n, needed = len(samples) if timings is None else timings, samples_needed(q)
    if n < needed:
        return Percentile(q, None, n, needed)
    ordered = np.sort(samples)
    cdf, alpha = binomial_cdf(n, q), (1 - CONFIDENCE) / 2
    below = int(np.searchsorted(cdf, alpha, side="right"))  # largest l with P(B <= l - 1) <= alpha
    above = int(np.searchsorted(cdf, 1 - alpha, side="left")) + 1
    value = float(np.quantile(ordered, q))
    each = len(ordered) / n  # samples that share a time, on average
    low = float(ordered[math.floor((max(below, 1) - 1) * each)])
    high = float(ordered[math.ceil(min(above, n) * each) - 1])
    return Percentile(q, Interval(min(low, value), value, max(high, value), basis="samples"),
                      n, needed)


def iqr(samples: NDArray[np.float64]) -> float:
    """Distance between the quartiles, in the unit of the samples."""
    first, third = np.quantile(samples, [0.25, 0.75])
    return float(third - first)


@dataclass(frozen=True, slots=True)
class Outliers:
    """How many samples lie outside Tukey's fences; none is ever dropped.

    Mild: beyond 1.5 IQR from a quartile; severe: beyond 3 IQR (Tukey, Exploratory Data Analysis,
    1977, ch. 2). ``severe_high`` is the usual one: the call was interrupted.
    """

    n: int
    severe_low: int
    mild_low: int
    mild_high: int
    severe_high: int

    @property
    def severe_share(self) -> float:
        return (self.severe_low + self.severe_high) / self.n if self.n else 0.0


def outliers(samples: NDArray[np.float64]) -> Outliers:
    """Classify by Tukey's fences."""
    if not len(samples):
        return Outliers(0, 0, 0, 0, 0)
    first, third = (float(v) for v in np.quantile(samples, [0.25, 0.75]))
    spread = third - first
    edges = [first - 3 * spread, first - 1.5 * spread, third + 1.5 * spread, third + 3 * spread]
    severe_low = int(np.sum(samples < edges[0]))
    mild_low = int(np.sum(samples < edges[1])) - severe_low
    severe_high = int(np.sum(samples > edges[3]))
    mild_high = int(np.sum(samples > edges[2])) - severe_high
    return Outliers(len(samples), severe_low, mild_low, mild_high, severe_high)


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    if freedom % 2:
        term, total = math.cos(theta), 0.0
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= square * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(1, freedom // 2 + 1):
            total += term
            term *= square * (2 * k - 1) / (2 * k)
        inside = sine * total
    return 0.5 * (1 + inside)


def student_quantile(p: float, freedom: int) -> float:
    """t with P(T <= t) = p, for p >= 0.5, by bisection of :func:`student_cdf`."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return high


class LogMedians:
    """Draws bootstrap log medians of processes.

    The median of a bootstrap resample of n values is one of their order statistics, and which one
    follows from the middle order statistic of n uniforms, which is Beta distributed; so a draw
    costs one or two Beta variates, not n samples, and is exact (Efron & Tibshirani, 1993, §5.4).
    """

    def __init__(self, processes: Sequence[NDArray[np.float64]]) -> None:
        self.count = len(processes)
        self.sizes = np.array([len(p) for p in processes])
        self.table = np.zeros((self.count, int(self.sizes.max())))
        for row, samples in zip(self.table, processes, strict=True):
            row[: len(samples)] = np.sort(samples)
        self.observed = np.log([float(np.median(p)) for p in processes])

    def draw(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """A resampled log median of each chosen process (array of indices of any shape)."""
        n = self.sizes[chosen]
        k = (n + 1) // 2
        lower = rng.beta(k, n - k + 1)
        upper = np.where(n % 2, lower, lower + (1 - lower) * rng.beta(1, np.maximum(n - k, 1)))
        first = self.table[chosen, np.minimum((lower * n).astype(np.int64), n - 1)]
        second = self.table[chosen, np.minimum((upper * n).astype(np.int64), n - 1)]
        drawn: NDArray[np.float64] = np.log((first + second) / 2)
        return drawn


def centre(processes: Sequence[NDArray[np.float64]], *, seed: int = 0) -> Interval:
    """The typical sample of a cell: the geometric mean of its processes' medians.

    With three processes or more, the interval is the estimate times exp(± t · s), where s is the
    standard error of a two-level bootstrap (processes, then samples within them), in logarithms,
    widened by sqrt(P / (P - 1)), and t is Student's quantile at P - 1 degrees of freedom: the
    percentile bootstrap is too short for few replicates (Hesterberg, The American Statistician 69,
    2015, §3.2). With fewer, the order-statistic bounds of the pooled samples, which say nothing of
    the spread between processes: ``basis`` is then ``samples``.
    """
    used = [p for p in processes if len(p)]
    if not used:
        raise ValueError("no samples")
    medians = LogMedians(used)
    value = math.exp(float(medians.observed.mean()))
    if len(used) < 3:
        pooled = np.concatenate(used)
        bounds = percentile(pooled, 0.5).interval
        low, high = (bounds.low, bounds.high) if bounds else (pooled.min(), pooled.max())
        return Interval(min(float(low), value), value, max(float(high), value), basis="samples")
    error = _standard_error(medians, np.random.default_rng(seed))
    reach = student_quantile(0.5 + CONFIDENCE / 2, len(used) - 1) * error
    return Interval(value * math.exp(-reach), value, value * math.exp(reach))


def ratio(
    numerator: Mapping[int, NDArray[np.float64]],
    denominator: Mapping[int, NDArray[np.float64]],
    *,
    seed: int = 0,
) -> Interval:
    """Ratio of the medians of two cells, each given as samples by round.

    Where both have at least :data:`MIN_PROCESSES` rounds in common, those are compared pair by
    pair, which cancels what drifts slowly; otherwise the processes of each side are independent
    and the degrees of freedom are Welch's. Interval as in :func:`centre`.
    """
    rng = np.random.default_rng(seed)
    common = sorted(set(numerator) & set(denominator))
    if len(common) >= MIN_PROCESSES:
        above = LogMedians([numerator[r] for r in common])
        below = LogMedians([denominator[r] for r in common])
        value = float((above.observed - below.observed).mean())
        error = _paired_error(above, below, rng)
        freedom = len(common) - 1
    else:
        above, below = LogMedians(list(numerator.values())), LogMedians(list(denominator.values()))
        value = float(above.observed.mean() - below.observed.mean())
        errors = _standard_error(above, rng), _standard_error(below, rng)
        error = math.hypot(*errors)
        freedom = _welch(errors, (above.count, below.count))
    reach = student_quantile(0.5 + CONFIDENCE / 2, freedom) * error
    return Interval(math.exp(value - reach), math.exp(value), math.exp(value + reach))


def _standard_error(medians: LogMedians, rng: np.random.Generator) -> float:
    if medians.count < 2:
        return math.inf
    chosen = rng.integers(0, medians.count, (RESAMPLES, medians.count))
    spread = float(np.std(medians.draw(chosen, rng).mean(axis=1)))
    return spread * math.sqrt(medians.count / (medians.count - 1))


def _paired_error(above: LogMedians, below: LogMedians, rng: np.random.Generator) -> float:
    chosen = rng.integers(0, above.count, (RESAMPLES, above.count))
    differences = above.draw(chosen, rng) - below.draw(chosen, rng)
    return float(np.std(differences.mean(axis=1))) * math.sqrt(above.count / (above.count - 1))


def _welch(errors: tuple[float, float], counts: tuple[int, int]) -> int:
    """Welch-Satterthwaite degrees of freedom, rounded down, at least 1."""
    squares = [e * e for e in errors]
    if not all(map(math.isfinite, squares)) or not sum(squares):
        return max(min(counts) - 1, 1)
    parts = sum(s * s / (n - 1) for s, n in zip(squares, counts, strict=True))
    return max(int(sum(squares) ** 2 / parts), 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What may be said of two cells.

    Attributes:
        ratio: time of the candidate over time of the baseline; None when not compared.
        word: the claim that the data support.
        floor: noise floor used, as a relative difference.
        reason: why it is that word.
    """

    ratio: Interval | None
    word: Literal["faster", "slower", "no difference shown", "not compared"]
    floor: float
    reason: str


def compare(
    candidate: Mapping[int, NDArray[np.float64]],
    baseline: Mapping[int, NDArray[np.float64]],
    *,
    floor: float,
    seed: int = 0,
) -> Comparison:
    """``faster`` or ``slower`` only if the interval excludes 1 and the effect exceeds the floor."""
    fewest = min(len(candidate), len(baseline))
    if fewest < MIN_PROCESSES:
        why = f"{fewest} processes; a comparison needs {MIN_PROCESSES}"
        found = ratio(candidate, baseline, seed=seed) if fewest > 1 else None
        return Comparison(found, "not compared", floor, why)
    found = ratio(candidate, baseline, seed=seed)
    effect = abs(math.log(found.value))
    if not found.excludes(1.0):
        return Comparison(found, "no difference shown", floor, "the interval includes 1")
    if effect <= math.log1p(floor):
        why = f"{effect:.1%} is within the noise floor of {floor:.1%}"
        return Comparison(found, "no difference shown", floor, why)
    word: Literal["faster", "slower"] = "faster" if found.value < 1 else "slower"
    return Comparison(found, word, floor, f"the interval excludes 1, floor {floor:.1%}")


def noise_floor(ratios: Sequence[Interval], *, timer: float = 0.0) -> float:
    """Largest relative difference that A/A pairs showed, at least the timer's relative step."""
    return max([timer, *(math.expm1(abs(math.log(r.value))) for r in ratios)])


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a measurement stops being called stable, as relative figures.

    Attributes:
        iqr: IQR over median, in any process.
        processes: largest over smallest process median, less 1.
        severe: share of severe outliers.
        trend: second over first half's median within a process, less 1.
        timer: timer step over one sample; beyond it the measurement is invalid.
        foreign: cores that other processes or the hypervisor used meanwhile.
    """

    iqr: float = 0.10
    processes: float = 0.05
    severe: float = 0.05
    trend: float = 0.05
    timer: float = 0.01
    foreign: float = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """``stable``, ``unstable`` or ``invalid``, with every reason against stable."""

    word: Literal["stable", "unstable", "invalid"]
    reasons: tuple[str, ...] = ()


def verdict(
    processes: Sequence[NDArray[np.float64]],
    *,
    timer: float = 0.0,
    foreign: float = 0.0,
    invalid: Sequence[str] = (),
    unstable: Sequence[str] = (),
    limits: Limits | None = None,
) -> Verdict:
    """Judge the samples of a cell.

    Args:
        processes: seconds per sample, one array a process.
        timer: resolution of the clock in seconds per sample.
        foreign: cores that others used while it sampled.
        invalid, unstable: reasons found elsewhere (wrong device, throttling, …).
    """
    limits = limits or Limits()
    fatal = [*invalid, *_invalid(processes, timer, limits)]
    if fatal:
        return Verdict("invalid", tuple(fatal))
    reasons = [*unstable, *_spread(processes, limits)]
    if foreign > limits.foreign:
        reasons.append(f"others used {foreign:.2f} cores meanwhile")
    return Verdict("unstable" if reasons else "stable", tuple(reasons))


def _invalid(
    processes: Sequence[NDArray[np.float64]], timer: float, limits: Limits
) -> list[str]:
    if not processes or not all(len(p) for p in processes):
        return ["no samples"]
    pooled = np.concatenate(list(processes))
    if not np.all(np.isfinite(pooled)) or pooled.min() <= 0:
        return ["a sample is not a positive finite time"]
    if timer / float(np.median(pooled)) > limits.timer:
        return [f"the clock's step is over {limits.timer:.0%} of a sample"]
    return []


def _spread(processes: Sequence[NDArray[np.float64]], limits: Limits) -> list[str]:
    reasons = []
    if sum(map(len, processes)) == 1:
        reasons.append("one timing says nothing of the spread")
    medians = [float(np.median(p)) for p in processes]
    widest = max(iqr(p) / m for p, m in zip(processes, medians, strict=True))
    if widest > limits.iqr:
        reasons.append(f"IQR is {widest:.0%} of the median")
    apart = max(medians) / min(medians) - 1
    if apart > limits.processes:
        reasons.append(f"process medians differ by {apart:.0%}")
    pooled = np.concatenate(list(processes))
    severe = outliers(pooled).severe_share
    if len(pooled) >= FEWEST_FENCED and severe > limits.severe:
        reasons.append(f"{severe:.0%} severe outliers")
    drift = max((abs(_trend(p)) for p in processes if len(p) >= FEWEST_FENCED), default=0.0)
    if drift > limits.trend:
        reasons.append(f"drifts by {drift:.0%} within a process")
    return reasons


def _trend(samples: NDArray[np.float64]) -> float:
    half = len(samples) // 2
    return float(np.median(samples[half:]) / np.median(samples[:half])) - 1


