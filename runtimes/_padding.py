"""Round sizes up to a few buckets: pad what goes in, cut what comes out.

What is recorded or tuned for one shape then serves every smaller one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from ..spec import Dim, ModelSpec, TensorSpec

BATCH = "batch"


def roundable(spec: ModelSpec) -> tuple[str, ...]:
    """Dimensions that padding leaves the result of: the batch, and whatever a mask tells of.

    Padding a length that no mask accounts for would change the output, so such a dimension is
    left as it is. So is every length where an output has one of its own, such as frames or halved
    positions: how long that is without padding is not known here, so it could not be cut.
    """
    given = {d for t in spec.inputs for d in t.shape}
    if any(isinstance(d, str) and d not in given for t in spec.outputs for d in t.shape):
        return tuple(name for name in spec.dims if name == BATCH)
    masked = {d for t in spec.inputs if t.role == "mask" for d in t.shape if isinstance(d, str)}
    return tuple(name for name in spec.dims if name == BATCH or name in masked)


def bucket(size: int, dim: Dim) -> int:
    """The smallest bucket that holds a size: powers of two and one and a half times them, up to
    the dimension's maximum. At most a third of a bucket is padding, from size 3 on."""
    power = 1
    while power < size:
        power *= 2
    middle = power * 3 // 4
    return min(middle if size <= middle else power, dim.max)


def rounded(spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the bucket that holds ``sizes``."""
    able = roundable(spec)
    return {n: bucket(s, spec.dims[n]) if n in able else s for n, s in sizes.items()}


def pad(
    spec: ModelSpec, feeds: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Feeds enlarged to ``sizes``.

    Rows that are added repeat the last one, since a row without a single token has no defined
    output; positions that are added hold the padding id and are masked out.
    """
    import numpy as np

    found = {}
    for tensor in spec.inputs:
        value = feeds[tensor.name]
        missing = [w - h for w, h in zip(spec.shape(tensor, sizes), value.shape, strict=True)]
        rows = [(0, m if d == BATCH else 0) for d, m in zip(tensor.shape, missing, strict=True)]
        rest = [(0, 0 if d == BATCH else m) for d, m in zip(tensor.shape, missing, strict=True)]
        value = np.pad(value, rest, constant_values=_filler(tensor))
        found[tensor.name] = np.pad(value, rows, mode="edge")
    return found


def cut(
    spec: ModelSpec, outputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Outputs of padded feeds, cut back to ``sizes``."""
    found = {}
    for tensor in spec.outputs:
        value = outputs[tensor.name]
        window = tuple(
            slice(sizes.get(d)) if isinstance(d, str) else slice(None) for d in tensor.shape
        )
        found[tensor.name] = value[window]
    return found


def _filler(tensor: TensorSpec) -> int:
    return (tensor.pad or 0) if tensor.role == "tokens" else 0
