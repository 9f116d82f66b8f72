"""Collects what the cases show and turns it into verdicts once the noise of all is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal

import numpy as np

from . import hygiene
from .compare import ErrorStats, error_stats, is_float, kept, mismatches, unit_roundoff
from .inputs import Case, Feeds, mask_arrays, mask_pieces
from .report import ANY, HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_STEP, Result
from .rule import Decision, Gate, Rule, decide, worst

if TYPE_CHECKING:
    from ..spec import ModelSpec, TensorSpec

BATCH = "batch"
"""Name of the dimension whose members are judged one by one."""

SAMPLED = 1 << 16
"""Elements an error histogram looks at."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Sides:
    """Outputs of one case; at least one of reference and truth is there."""

    candidate: Arrays
    reference: Arrays | None
    truth: Arrays | None

    @property
    def expected(self) -> Arrays:
        """The side whose names, shapes and non-finite positions the candidate must have."""
        found = self.reference if self.reference is not None else self.truth
        assert found is not None
        return found


@dataclass(frozen=True, slots=True)
class _Sample:
    index: int
    error: ErrorStats
    noise: ErrorStats | None


@dataclass(frozen=True, slots=True)
class _Measured:
    """One output in one case, before the noise over all cases is known."""

    result: Result
    roundoff: float
    samples: tuple[_Sample, ...]


class Score:
    """All comparisons of one validation.

    Args:
        gate: what differences in value are attributed to.
    """

    def __init__(
        self, spec: ModelSpec, rule: Rule, gate: Literal["translation", "precision"]
    ) -> None:
        self._spec = spec
        self._rule = rule
        self._gate: Gate = gate
        self._tensors = {t.name: t for t in spec.outputs}
        self._final: list[Result] = []
        self._measured: list[_Measured] = []

    def fail(self, case: str, gate: Gate, reason: str, output: str = ANY) -> None:
        """Record a failure that needs no numbers."""
        self._final.append(Result(case, output, gate, "fail", reason))

    def add(self, case: Case, feeds: Feeds, sides: Sides) -> None:
        """Compare all outputs of one case."""
        problems = hygiene.names_problem(self._spec, sides.candidate)
        for name, problem in problems.items():
            self.fail(case.label, "hygiene", problem, name)
        masks = mask_arrays(self._spec, feeds)
        pieces = mask_pieces(self._spec, feeds, masks)
        for name, tensor in self._tensors.items():
            if name not in sides.expected or (sides.truth is not None and name not in sides.truth):
                self.fail(case.label, "hygiene", "the source itself lacks this output", name)
            elif name in sides.candidate:
                self._output(case, tensor, sides, kept(tensor, masks, pieces))

    def results(self) -> tuple[Result, ...]:
        """Every result, with the noise of small samples pooled over all cases.

        An output that was never compared, in any case, is a failure.
        """
        pooled = self._pooled()
        found = [*self._final, *(self._settle(m, pooled) for m in self._measured)]
        compared = {r.output for r in found if r.samples}
        found.extend(Result(ANY, name, "hygiene", "fail", "never compared: no case had content")
                     for name in self._tensors if name not in compared)
        return tuple(found)

    def _output(
        self, case: Case, tensor: TensorSpec, sides: Sides, keep: np.ndarray | None
    ) -> None:
        name = tensor.name
        actual, expected = sides.candidate[name], sides.expected[name]
        truth = None if sides.truth is None else sides.truth[name]
        dtype = str(expected.dtype) if sides.reference is not None else tensor.dtype
        problem = hygiene.form_problem(actual, expected, dtype)
        if not problem and truth is not None and truth.shape != expected.shape:
            problem = f"reference and truth differ in shape: {expected.shape}, {truth.shape}"
        problem = problem or hygiene.finite_problem(actual, expected, truth, keep)
        if problem:
            self.fail(case.label, "hygiene", problem, name)
        elif is_float(actual.dtype):
            self._measure(case, tensor, sides, keep)
        else:
            self._final.append(_exact(case, tensor, actual, expected, keep, self._gate))

    def _measure(
        self, case: Case, tensor: TensorSpec, sides: Sides, keep: np.ndarray | None
    ) -> None:
        actual, expected = sides.candidate[tensor.name], sides.expected[tensor.name]
        target = expected if sides.truth is None else sides.truth[tensor.name]
        finite = np.isfinite(expected)
        if not finite.all():  # the same on both sides by Gate 0; no distance is defined there
            keep = finite if keep is None else finite & keep
        mask = None if keep is None else np.broadcast_to(keep, actual.shape)
        has_noise = sides.reference is not None and sides.truth is not None
        samples = []
        for index, at in _samples(tensor, actual):
            part = None if mask is None else mask[at]
            error = error_stats(actual[at], target[at], part)
            if error.elements:
                noise = error_stats(expected[at], target[at], part) if has_noise else None
                samples.append(_Sample(index, error, noise))
        result = Result(case.label, tensor.name, self._gate, "pass", samples=len(samples),
                        elements=sum(s.error.elements for s in samples),
                        histogram=_histogram(actual, target, mask))
        self._measured.append(_Measured(result, unit_roundoff(str(actual.dtype)), tuple(samples)))

    def _pooled(self) -> dict[str, float]:
        squares: dict[str, float] = {}
        elements: dict[str, int] = {}
        for measured in self._measured:
            name = measured.result.output
            for sample in measured.samples:
                if sample.noise is not None:
                    count = sample.noise.elements
                    squares[name] = squares.get(name, 0.0) + sample.noise.rmse**2 * count
                    elements[name] = elements.get(name, 0) + count
        return {name: (squares[name] / elements[name]) ** 0.5 for name in squares}

    def _settle(self, measured: _Measured, pooled: Mapping[str, float]) -> Result:
        if not measured.samples:
            return measured.result
        decided = [(decide(self._rule, s.error, s.noise, measured.roundoff,
                           pooled=pooled.get(measured.result.output, 0.0),
                           precision=self._gate == "precision"), s) for s in measured.samples]
        decision, sample = max(decided, key=lambda pair: _gravity(pair[0]))
        rhos = [d.rho for d, _ in decided if d.rho is not None]
        return replace(
            measured.result, verdict=worst(d.verdict for d, _ in decided),
            reason=_reason(decision, sample), rho=max(rhos, default=None),
            excess=decision.excess, sample=sample.index, rmse=_number(sample.error.rmse),
            noise=None if sample.noise is None else _number(sample.noise.rmse),
            scale=_number(sample.error.scale), largest=_number(sample.error.largest))


def _samples(tensor: TensorSpec, value: np.ndarray) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Index of each member of the batch; the whole array where no dimension is the batch."""
    if BATCH not in tensor.shape:
        yield 0, ()
        return
    axis = tensor.shape.index(BATCH)
    for i in range(value.shape[axis]):
        yield i, (*(slice(None) for _ in range(axis)), slice(i, i + 1))


def _exact(
    case: Case,
    tensor: TensorSpec,
    actual: np.ndarray,
    expected: np.ndarray,
    keep: np.ndarray | None,
    gate: Gate,
) -> Result:
    """Integers and booleans carry no rounding: they are equal or wrong."""
    mask = None if keep is None else np.broadcast_to(keep, actual.shape)
    sizes = [actual[at].size if mask is None else int(np.count_nonzero(mask[at]))
             for _, at in _samples(tensor, actual)]
    wrong = mismatches(actual, expected, keep)
    reason = f"{wrong} of {sum(sizes)} values differ; allowed: none" if wrong else ""
    return Result(case.label, tensor.name, gate, "fail" if wrong else "pass", reason,
                  samples=sum(size > 0 for size in sizes), elements=sum(sizes))


def _histogram(actual: np.ndarray, target: np.ndarray, mask: np.ndarray | None) -> tuple[int, ...]:
    step = max(1, actual.size // SAMPLED)
    left = actual.reshape(-1)[::step].astype(np.float64)
    right = target.reshape(-1)[::step].astype(np.float64)
    if mask is not None:
        chosen = mask.reshape(-1)[::step]
        left, right = left[chosen], right[chosen]
    error = np.abs(left - right)
    scale = float(np.sqrt(np.mean(right * right))) if right.size else 0.0
    with np.errstate(divide="ignore"):
        decades = np.log10(error / scale) if scale > 0 else np.full(error.shape, -np.inf)
    # Clipped, so that exact matches land in the first bin.
    places = np.clip((np.nan_to_num(decades, nan=np.inf, neginf=HISTOGRAM_LOW, posinf=1e3)
                      - HISTOGRAM_LOW) / HISTOGRAM_STEP, 0, HISTOGRAM_BINS - 1)
    return tuple(np.bincount(places.astype(np.int64), minlength=HISTOGRAM_BINS).tolist())


def _gravity(decision: Decision) -> tuple[bool, float]:
    return decision.excess is None, decision.excess or 0.0


def _reason(decision: Decision, sample: _Sample) -> str:
    if decision.verdict == "pass":
        return ""
    error = sample.error
    if not isfinite(error.rmse):
        return f"sample {sample.index}: the error is not finite"
    if decision.rho is None:
        return (f"sample {sample.index}: error {error.rmse:.3g} where values are of size "
                f"{error.scale:.3g}, {decision.excess or float('inf'):.3g} times what is allowed")
    return (f"sample {sample.index}: error {decision.rho:.3g} times that of the reference, "
            f"{decision.excess or float('inf'):.3g} times what is allowed")


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
