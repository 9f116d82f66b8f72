"""Which row serves an objective best, and which others the data cannot tell from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import statistics as st
from .report import Recommendation, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Rounds = Mapping[int, NDArray[np.float64]]

MEMORY_TIE = 0.02
"""Peaks of resident memory closer than this differ by page and arena granularity."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row with the samples it rests on.

    Attributes:
        latencies, paces: seconds per call and per row, by round.
        floor: noise floor of its device and thread count.
    """

    row: Row
    latencies: Rounds
    paces: Rounds
    floor: float


def recommend(
    workload: str, choices: Sequence[Choice], limit: float | None, seed: int
) -> list[Recommendation]:
    """One recommendation per objective for rows of one workload.

    Args:
        limit: seconds for "p95 within limit"; without one, that objective is left out.
    """
    if not choices:
        note = "no valid measurement"
        return [Recommendation(workload, "lowest p50", "", note=note)]
    found = [
        _fastest(workload, choices, seed), _widest(workload, choices, seed),
        _smallest(workload, choices),
    ]
    if limit is not None:
        found.append(_within(workload, choices, limit, seed))
    return found


def _fastest(workload: str, choices: Sequence[Choice], seed: int) -> Recommendation:
    best = min(choices, key=lambda c: _value(c.row.p50))
    ties = _ties(best, choices, lambda c: c.latencies, seed)
    assert best.row.p50 is not None
    return Recommendation(workload, "lowest p50", best.row.label, best.row.p50.value, "s",
                          _margin(best.row.p50), ties, _caution(best))


def _widest(workload: str, choices: Sequence[Choice], seed: int) -> Recommendation:
    best = max(choices, key=lambda c: _value(c.row.throughput))
    ties = _ties(best, choices, lambda c: c.paces, seed)
    assert best.row.throughput is not None
    return Recommendation(
        workload, "highest throughput", best.row.label, best.row.throughput.value, "rows/s",
        _margin(best.row.throughput), ties, _caution(best))


def _smallest(workload: str, choices: Sequence[Choice]) -> Recommendation:
    def size(choice: Choice) -> int:
        assert choice.row.memory is not None
        return choice.row.memory.gpu or choice.row.memory.peak

    best = min(choices, key=size)
    ties = tuple(c.row.label for c in choices
                 if c is not best and size(c) <= size(best) * (1 + MEMORY_TIE))
    return Recommendation(workload, "smallest", best.row.label, float(size(best)), "bytes",
                          MEMORY_TIE, ties, _caution(best))


def _within(
    workload: str, choices: Sequence[Choice], limit: float, seed: int
) -> Recommendation:
    """Highest throughput among rows whose p95 is within the limit, upper bound included."""
    def fits(choice: Choice) -> bool:
        p95 = choice.row.percentile(0.95)
        return p95 is not None and p95.interval is not None and p95.interval.high <= limit

    fitting = [c for c in choices if fits(c)]
    if not fitting:
        needed = st.samples_needed(0.95)
        note = f"no row's p95 is surely within {limit * 1e3:g} ms (p95 needs {needed} samples)"
        return Recommendation(workload, "p95 within limit", "", limit, "s", note=note)
    best = max(fitting, key=lambda c: _value(c.row.throughput))
    p95 = best.row.percentile(0.95)
    assert p95 is not None
    assert p95.interval is not None
    assert best.row.p50 is not None
    margin = None if _margin(best.row.p50) is None else p95.interval.margin
    return Recommendation(
        workload, "p95 within limit", best.row.label, p95.interval.value, "s", margin,
        _ties(best, fitting, lambda c: c.paces, seed), _caution(best))


def _ties(
    best: Choice, choices: Sequence[Choice], samples: Callable[[Choice], Rounds], seed: int
) -> tuple[str, ...]:
    """Rows of which it cannot be said that they are worse than the best."""
    found = []
    for other in choices:
        if other is best:
            continue
        floor = max(best.floor, other.floor)
        verdict = st.compare(samples(other), samples(best), floor=floor, seed=seed)
        if verdict.word not in ("slower",) and _near(verdict):
            found.append(other.row.label)
    return tuple(found)


def _near(verdict: st.Comparison) -> bool:
    """With too few processes for a claim, a factor of 1.5 still counts as a difference."""
    if verdict.word != "not compared":
        return True
    return verdict.ratio is None or abs(math.log(verdict.ratio.value)) < math.log(1.5)


def _margin(interval: st.Interval) -> float | None:
    """None with too few processes to know."""
    return interval.margin if interval.basis == "processes" else None


def _caution(choice: Choice) -> str:
    row = choice.row
    notes = [] if row.verdict.word == "stable" else ["; ".join(row.verdict.reasons)]
    if row.p50 is not None and row.p50.basis != "processes":
        notes.append(f"{row.processes} processes: too few for a margin of error")
    if row.parity != "pass":
        notes.append(f"parity {row.parity or 'not checked'}")
    return "; ".join(notes)


def _value(interval: st.Interval | None) -> float:
    assert interval is not None
    return interval.value
