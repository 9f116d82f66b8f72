"""Example feeds: small, of different sizes in every dimension, with padding in the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from ..spec import Dim, ModelSpec, TensorSpec

_PREFERRED = {"batch": 2, "choices": 3, "sequence": 9, "target": 5, "frames": 48, "past": 5}


def sizes(dims: Mapping[str, Dim], step: int = 0) -> dict[str, int]:
    """A size for each dimension, at least 2, all different; other ``step``, other sizes."""
    chosen: dict[str, int] = {}
    for name, dim in dims.items():
        size = _PREFERRED.get(name, max(dim.min, 1) + 1600 if name == "samples" else 7)
        size = max(size, dim.min) + step * (640 if name == "samples" else 1 + len(chosen) * 2)
        if size > dim.max:  # far enough apart for strides to tell
            size = dim.max // (step + 1)
        size = max(size, dim.min, 2)
        while size in chosen.values() and size < dim.max:
            size += 1
        while size in chosen.values() and size > max(2, dim.min):
            size -= 1
        chosen[name] = size
    return chosen


def example(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Feeds that satisfy ``spec``; the same seed gives the same feeds."""
    import numpy as np

    rng = np.random.default_rng(seed)
    size = sizes(spec.free)
    shapes = {t.name: spec.shape(t, size) for t in spec.inputs}
    masks = {t.shape: _mask(shapes[t.name]) for t in spec.inputs if t.role == "mask"}
    return {t.name: _draw(t, shapes[t.name], masks, rng).astype(_numpy(t.dtype))
            for t in spec.inputs}


def _mask(shape: tuple[int, ...]) -> np.ndarray:
    """Right padding: every other row is shorter, and no row is empty."""
    import numpy as np

    rows = np.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1])
    lengths = np.where(rows % 2 == 1, max(1, shape[-1] * 2 // 3), shape[-1])
    return (np.arange(shape[-1]) < lengths[..., None]).astype(np.int64)


def _draw(
    tensor: TensorSpec,
    shape: tuple[int, ...],
    masks: Mapping[tuple[int | str, ...], np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    import numpy as np

    mask = masks.get(tensor.shape)
    if tensor.role == "mask":
        return _mask(shape)
    if tensor.role == "tokens":
        return _ids(tensor, shape, mask, rng)
    if tensor.role == "boxes":
        corners = np.sort(rng.integers(0, tensor.high or 1, (*shape[:-1], 2, 2)), axis=-2)
        return corners.reshape(shape)
    if tensor.dtype.startswith("int"):
        return np.asarray(rng.integers(0, tensor.high or 2, shape))
    values = rng.standard_normal(shape, dtype=np.float32)
    return values if mask is None else values * mask


def _numpy(dtype: str) -> np.dtype[np.generic]:
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def _ids(
    tensor: TensorSpec, shape: tuple[int, ...], mask: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    import numpy as np

    high = tensor.high or 2
    if tensor.pad is None:
        return tensor.ended(rng.integers(0, high, shape), mask)
    ids = rng.integers(0, max(high - 1, 1), shape)
    ids = np.where(ids >= tensor.pad, ids + 1, ids) if high > 1 else ids
    ids = ids if mask is None else np.where(mask == 1, ids, tensor.pad)
    return tensor.ended(ids, mask)
