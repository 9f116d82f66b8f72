"""Ranges of activations from samples: the extremes, percentiles, or least information lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from . import _graph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

PERCENTILE = 99.99
BINS, LEVELS = 2048, 128
"""Bins of the histogram and levels it is squeezed to: Migacz, 8-bit inference with TensorRT, GTC
2017."""

GROUP = 8


def ranges(
    model: ir.Model,
    values: Sequence[ir.Value],
    samples: Sequence[Mapping[str, np.ndarray]],
    method: str = "minmax",
) -> dict[ir.Value, tuple[float, float]]:
    """Range of each value over the samples.

    Args:
        method: ``minmax``; ``percentile``, of the magnitudes; ``entropy``, the clip whose histogram
            of 128 levels is closest to the original's in KL divergence.

    Raises:
        UsageError: an unknown method.
    """
    import numpy as np

    methods = ("minmax", "percentile", "entropy")
    if method not in methods:
        raise UsageError(f"calibration {method!r} is unknown", allowed=", ".join(methods))
    found: dict[ir.Value, tuple[float, float]] = {}
    unique = list(dict.fromkeys(values))
    probe = _graph.Probe(model, unique)
    for start in range(0, len(unique), GROUP):
        part = unique[start : start + GROUP]
        seen: list[list[np.ndarray]] = [[] for _ in part]
        for arrays in probe.run(part, samples):
            for store, array in zip(seen, arrays, strict=True):
                store.append(array.reshape(-1))
        for value, store in zip(part, seen, strict=True):
            every = np.concatenate(store)
            low, high = float(every.min()), float(every.max())
            if method != "minmax":
                size = np.abs(every)
                clip = (float(np.percentile(size, PERCENTILE)) if method == "percentile"
                        else least_divergence(size))
                low, high = max(low, -clip), min(high, clip)
            found[value] = (low, high)
    return found


def least_divergence(sizes: np.ndarray) -> float:
    """The clip at which a histogram squeezed to 128 levels tells most like the original."""
    import numpy as np

    top = float(sizes.max())
    if top == 0:
        return 0.0
    counts, edges = np.histogram(sizes, bins=BINS, range=(0.0, top))
    best, chosen = np.inf, BINS
    for stop in range(LEVELS, BINS + 1, LEVELS // 8):
        kept = counts[:stop].astype(np.float64)
        outside = counts[stop:].sum()
        target = kept.copy()
        target[-1] += outside
        level = np.arange(stop) * LEVELS // stop
        filled = kept > 0
        total = np.bincount(level, kept, LEVELS)
        members = np.bincount(level, filled, LEVELS)
        squeezed = np.where(filled, total[level] / np.maximum(members[level], 1), 0.0)
        p, q = target / target.sum(), squeezed / squeezed.sum()
        used = p > 0
        divergence = float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))
        if divergence < best:
            best, chosen = divergence, stop
    return float(edges[chosen])
