"""Gate 0: what must hold before numbers are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .compare import is_float, nonfinite, nonfinite_differences

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..spec import ModelSpec
    from .inputs import Feeds


def names_problem(spec: ModelSpec, actual: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Problems by output name: missing, unexpected, or (under ``*``) in another order."""
    wanted = spec.output_names
    problems = {name: "output is missing" for name in wanted if name not in actual}
    problems |= {name: "output is not one of the source's: " + ", ".join(wanted)
                 for name in actual if name not in wanted}
    if not problems and tuple(actual) != wanted:
        problems["*"] = f"outputs come as {', '.join(actual)}; allowed: {', '.join(wanted)}"
    return problems


def form_problem(actual: np.ndarray, expected: np.ndarray, dtype: str) -> str:
    """Why an output cannot be compared: another dtype or shape; empty if it can."""
    if str(actual.dtype) != dtype:
        return f"dtype is {actual.dtype}; allowed: {dtype}"
    if actual.shape != expected.shape:
        return f"shape is {list(actual.shape)}; allowed: {list(expected.shape)}"
    return ""


def finite_problem(
    actual: np.ndarray,
    reference: np.ndarray,
    truth: np.ndarray | None,
    keep: np.ndarray | None,
) -> str:
    """Why the non-finite positions disqualify an output; empty if they do not.

    Kept positions: the truth is finite, and actual and reference have NaN, +inf and -inf at the
    same places. Masked positions: the actual output is finite wherever the reference is, since
    what follows may multiply by zero, which does not remove a NaN.
    """
    if truth is not None and (count := nonfinite(truth, keep)):
        return f"the truth itself is not finite at {count} positions"
    if count := nonfinite_differences(actual, reference, keep):
        return f"non-finite values differ from the reference's at {count} positions"
    if keep is None or not is_float(actual.dtype) or np.isfinite(actual).all():
        return ""
    introduced = ~np.isfinite(actual) & np.isfinite(reference.astype(np.float64)) & ~keep
    if count := int(np.count_nonzero(introduced)):
        return f"not finite at {count} masked positions where the reference is"
    return ""


def feeds_problem(feeds: Feeds) -> str:
    """Inputs that are not finite, by name; empty if all are."""
    bad = [name for name, value in feeds.items() if nonfinite(np.asarray(value))]
    return f"inputs are not finite: {', '.join(bad)}" if bad else ""
