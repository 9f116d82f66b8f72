"""Errors of one array against another: pure functions, float64 accumulation, no framework.

Every function takes arrays of one shape and an optional ``keep`` mask broadcastable to it; what
``keep`` leaves out does not take part. Large arrays are read in chunks, so that the float64 copies
stay small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..spec import TensorSpec

CHUNK = 1 << 18
"""Elements converted to float64 at a time: 2 MiB, which stays in a core's cache."""

UNIT_ROUNDOFF: Mapping[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Half the gap between 1 and the next number (Higham, *Accuracy and Stability of Numerical
Algorithms*, 2nd ed., section 2.1; IEEE 754-2019 table 3.5 for the precisions)."""


def unit_roundoff(dtype: str) -> float:
    """Unit roundoff of a floating-point dtype, dimensionless.

    Raises:
        UsageError: the dtype is not a floating-point one that is known here.
    """
    try:
        return UNIT_ROUNDOFF[dtype]
    except KeyError:
        raise UsageError(f"{dtype} has no unit roundoff",
                         allowed=", ".join(UNIT_ROUNDOFF)) from None


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether values of this dtype carry rounding errors (bfloat16 included)."""
    return bool(np.issubdtype(dtype, np.floating)) or dtype == ml_dtypes.bfloat16


@dataclass(frozen=True, slots=True)
class ErrorStats:
    """Distance of an array from its truth.

    Attributes:
        elements: number of positions compared.
        rmse: root of the mean squared difference; NaN if any difference is.
        largest: maximum norm of the difference; NaN if any difference is.
        scale: root mean square of the truth.
        peak: maximum norm of the truth.
    """

    elements: int
    rmse: float
    largest: float
    scale: float
    peak: float


def error_stats(
    value: np.ndarray, truth: np.ndarray, keep: np.ndarray | None = None
) -> ErrorStats:
    """Error of ``value`` against ``truth``; both of one shape and of any numeric dtype.

    Zero kept positions give zeros with ``elements`` 0, which the caller must not take for a match.
    """
    squares = truth_squares = largest = peak = 0.0
    elements = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for left, right in _chunks(value, truth, keep):
            difference = left - right
            elements += difference.size
            squares += float(np.dot(difference, difference))
            truth_squares += float(np.dot(right, right))
            # np.maximum propagates NaN; the built-in max would drop it.
            largest = float(np.maximum(largest, np.abs(difference).max()))
            peak = float(np.maximum(peak, np.abs(right).max()))
    count = max(elements, 1)
    return ErrorStats(elements, (squares / count) ** 0.5, largest,
                      (truth_squares / count) ** 0.5, peak)


def nonfinite_differences(
    left: np.ndarray, right: np.ndarray, keep: np.ndarray | None = None
) -> int:
    """Kept positions where one side is NaN, +inf or -inf and the other is not the same.

    NaN equals NaN of any payload; two finite values are the same here whatever they are.
    """
    if not is_float(left.dtype) and not is_float(right.dtype):
        return 0
    if np.isfinite(left).all() and np.isfinite(right).all():
        return 0
    differ = _kind(left) != _kind(right)
    return int(np.count_nonzero(differ if keep is None else differ & keep))


def nonfinite(value: np.ndarray, keep: np.ndarray | None = None) -> int:
    """Number of kept positions that are NaN or infinite."""
    if not is_float(value.dtype):
        return 0
    bad = ~np.isfinite(value)
    return int(np.count_nonzero(bad if keep is None else bad & keep))


def mismatches(left: np.ndarray, right: np.ndarray, keep: np.ndarray | None = None) -> int:
    """Kept positions of two integer or boolean arrays that are not exactly equal."""
    differ = left != right
    return int(np.count_nonzero(differ if keep is None else differ & keep))


def kept(
    output: TensorSpec,
    masks: Mapping[tuple[int | str, ...], np.ndarray],
    pieces: Mapping[tuple[int | str, ...], np.ndarray] | None = None,
) -> np.ndarray | None:
    """Which positions of an output are real content, by the names of its dimensions.

    A mask of shape ``(batch, sequence)`` restricts every output that has both dimensions, on each
    axis that is named so (attention maps have two). An output without the masked dimension (a
    pooled vector, class logits, the decoder's states) loses only its rows that are masked from end
    to end: they hold no content, and what a model computes there depends on how it writes minus
    infinity.

    Args:
        masks: by the mask input's own shape as named in the spec, ``(batch, sequence)`` or
            ``(batch, choices, sequence)``, its 0/1 or boolean array.
        pieces: of these masks, by their own shape; one says nothing of an output without its last
            dimension.

    Returns:
        A boolean array of the output's rank with size 1 on dimensions no mask speaks of; None
        where nothing is masked.
    """
    result: np.ndarray | None = None
    speaking = {n: mask for n, mask in (pieces or {}).items() if n[-1] in output.shape}
    for names, mask in (*masks.items(), *speaking.items()):
        held, rows = _restrict(names, mask.astype(bool), output.shape)
        if not held or rows.all():
            continue
        for axis in (i for i, name in enumerate(output.shape) if name == held[-1]):
            axes = [output.shape.index(name) for name in held[:-1]] + [axis]
            view = _spread(rows, axes, len(output.shape))
            result = view if result is None else result & view
    return result


def _restrict(
    names: tuple[int | str, ...], mask: np.ndarray, output: tuple[int | str, ...]
) -> tuple[tuple[int | str, ...], np.ndarray]:
    """Reduce a mask to dimensions the output has: a row counts while any position of it does."""
    if set(names) <= set(output):
        return names, mask
    names, rows = names[:-1], np.asarray(mask.any(axis=-1))
    while names and not set(names) <= set(output):
        names, rows = names[:-1], np.asarray(rows.all(axis=-1))
    return names, rows


def _spread(mask: np.ndarray, axes: list[int], rank: int) -> np.ndarray:
    order = np.argsort(axes)
    shape = [1] * rank
    for source in order:
        shape[axes[source]] = mask.shape[source]
    return mask.transpose(order).reshape(shape)


def _kind(value: np.ndarray) -> np.ndarray:
    """0 for finite, 1 for NaN, 2 and 3 for the infinities."""
    if not is_float(value.dtype):
        return np.zeros(value.shape, np.int8)
    infinite = np.where(value > 0, np.int8(2), np.int8(3)) * np.isinf(value)
    return np.where(np.isnan(value), np.int8(1), infinite).astype(np.int8)


def _chunks(
    value: np.ndarray, truth: np.ndarray, keep: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if keep is not None:
        where = np.broadcast_to(keep, value.shape)
        value, truth = value[where], truth[where]
    left, right = value.reshape(-1), truth.reshape(-1)
    for start in range(0, left.size, CHUNK):
        stop = start + CHUNK
        yield left[start:stop].astype(np.float64), right[start:stop].astype(np.float64)
