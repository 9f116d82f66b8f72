"""The acceptance rule: when an error is rounding, when it is suspect, when it is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .compare import ErrorStats

Verdict = Literal["pass", "suspect", "fail"]
Gate = Literal["hygiene", "translation", "precision", "effect", "generation"]

_ORDER: tuple[Verdict, ...] = ("pass", "suspect", "fail")


@dataclass(frozen=True, slots=True)
class Rule:
    """Constants of the rule; all are factors without unit.

    With truth t (float64), eager reference e, candidate c and unit roundoff u, a sample passes if

        RMSE(c) <= m RMSE(e) + k u RMS(t)   and   max|c - t| <= m_max max|e - t| + k_max u max|t|

    It is suspect while neither exceeds ``suspect / m`` times its bound, and fails beyond. Below
    ``small`` elements the noise of the sample itself is uncertain (a ratio of two chi-squared
    variables of few degrees of freedom), so RMSE(e) is there at least its root mean square over
    all samples of that output, and m is larger: m_small, and for a handful of elements m times
    :func:`tail`. (Two-class logits of correct exports otherwise raise an alarm in 1 of 80 runs.)

    Attributes:
        m, m_small, small: factor on the reference's own error, below ``small`` elements m_small.
        m_precision: m for an artifact in reduced precision.
        k: allowance in units of roundoff of the truth's size, for a reference that happens to be
            exact.
        m_max, k_max: the same for the maximum norm, which scatters more.
        suspect: upper end of the suspect band, as a multiple of the reference's error.
        bare: allowance in units of roundoff where there is no noise floor: twice the error of a
            12-layer encoder in float32.
    """

    m: float = 2.0
    m_small: float = 3.0
    small: int = 1000
    m_precision: float = 3.0
    k: float = 4.0
    m_max: float = 6.0
    k_max: float = 16.0
    suspect: float = 10.0
    bare: float = 64.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Verdict on one sample.

    Attributes:
        rho: RMSE(c) / RMSE(e), the denominator at least one roundoff of the truth; None without a
            noise floor.
        excess: the larger of error / bound over both norms; passes up to 1; None where the bound
            is 0 or the error is not finite.
    """

    verdict: Verdict
    rho: float | None
    excess: float | None


def decide(
    rule: Rule,
    error: ErrorStats,
    noise: ErrorStats | None,
    roundoff: float,
    *,
    pooled: float = 0.0,
    precision: bool = False,
) -> Decision:
    """Apply the rule to one sample.

    Args:
        error: of the candidate against the truth.
        noise: of the reference against the truth; None where one of the two is missing.
        roundoff: unit roundoff of the candidate's dtype.
        pooled: root mean square of the reference's error over all samples of the output; used
            where this sample has fewer than ``rule.small`` elements.
        precision: apply Gate B's factor instead of Gate A's.
    """
    small = error.elements < rule.small
    if noise is None:
        factor = 1.0
        floor = ceiling = 0.0
        bound = rule.bare * roundoff * error.scale
        bound_max = rule.bare * roundoff * error.peak * (rule.k_max / rule.k)
    else:
        factor = max(rule.m, rule.m_precision if precision else 0.0)
        if small:
            factor = max(factor, rule.m_small, rule.m * tail(error.elements))
        floor = max(noise.rmse, pooled) if small else noise.rmse
        ceiling = max(noise.largest, 3 * pooled) if small else noise.largest
        bound = factor * floor + rule.k * roundoff * error.scale
        bound_max = rule.m_max * ceiling + rule.k_max * roundoff * error.peak
    band = max(1.0, rule.suspect / factor)
    verdict: Verdict = "fail"
    if isfinite(bound) and isfinite(bound_max):
        # What must hold, so that a NaN error falls through to "fail".
        if error.rmse <= bound and error.largest <= bound_max:
            verdict = "pass"
        elif error.rmse <= band * bound and error.largest <= band * bound_max:
            verdict = "suspect"
    rho = None if noise is None else _ratio(error.rmse, max(noise.rmse, roundoff * error.scale))
    ratios = [_ratio(error.rmse, bound), _ratio(error.largest, bound_max)]
    excess = None if None in ratios else max(r for r in ratios if r is not None)
    return Decision(verdict, rho, excess)


def tail(elements: int, z: float = 6.0) -> float:
    """How far the RMS of ``elements`` normal errors of size 1 strays: its quantile at z = 6, 1e-9.

    Wilson and Hilferty's cube-root approximation of the chi-squared distribution (PNAS 17, 1931):
    6.8 for one element, 4.9 for two, 1.8 for 32, 1.1 for 1000.
    """
    share = 2 / (9 * elements)
    return float((1 - share + z * share**0.5) ** 1.5)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The gravest of several verdicts; of none, ``fail``: nothing shown is nothing proven."""
    return max(verdicts, key=_ORDER.index, default="fail")


def _ratio(value: float, unit: float) -> float | None:
    if value == 0:
        return 0.0
    ratio = value / unit if unit > 0 else float("inf")
    return ratio if isfinite(ratio) else None
