"""Input data for timing: seeded, of real token ids, never all ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ...spec import ModelSpec, TensorSpec

SEQUENTIAL = ("tokens", "mask", "segments", "positions")


def sizes(spec: ModelSpec, batch: int, sequence: int, dims: Mapping[str, int]) -> dict[str, int]:
    """A size for every dynamic dimension.

    The leading dimension of the inputs is the batch; the dimension after it, in inputs made of
    tokens, is the sequence; ``dims`` has the last word, and what is left takes its ``opt``.
    """
    chosen = {"batch": batch, "sequence": sequence}
    named = [(name, _axis(tensor, axis)) for tensor in spec.inputs
             for axis, name in enumerate(tensor.shape) if isinstance(name, str)]
    found = {name: spec.dims[name].opt for name, _ in named if name in spec.dims}
    found |= {name: chosen[axis] for name, axis in reversed(named) if axis}
    found.update(dims)
    if missing := sorted({name for name, _ in named} - set(found)):
        raise UsageError(f"no size for dimension {', '.join(missing)}",
                         hint="state it in the cell's dims")
    return found


def ranges(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The least and the most that ``batch`` and ``sequence`` may be in every input that has them.

    One that no input has is left out: an image has no sequence. Fixed sizes count only where no
    input's size is free.
    """
    free: dict[str, tuple[int, int]] = {}
    fixed: dict[str, tuple[int, int]] = {}
    for tensor in spec.inputs:
        for axis, size in enumerate(tensor.shape):
            name = _axis(tensor, axis)
            if name is None:
                continue
            if isinstance(size, int):
                fixed.setdefault(name, (size, size))
            else:
                dim, (least, most) = spec.dims.get(size), free.get(name, (1, sys.maxsize))
                free[name] = (max(least, dim.min), min(most, dim.max)) if dim else (least, most)
    return {**fixed, **free}


def _axis(tensor: TensorSpec, axis: int) -> str | None:
    """Whether an input's dimension is the batch or the sequence."""
    if tensor.role == "tail":
        return None
    if axis == 0:
        return "batch"
    size = tensor.shape[axis]
    # A mask may be of samples or frames: the input that it hides says which.
    sequential = (tensor.role in SEQUENTIAL and tensor.role != "mask") or "seq" in str(size)
    return "sequence" if axis == 1 and sequential else None


def draw(
    spec: ModelSpec,
    batch: int,
    sequence: int,
    *,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    dims: Mapping[str, int] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Feeds for one call.

    Args:
        lengths: real tokens of each row; all ``sequence`` when None. The rest is padding: the
            mask is 0 there and the token is the pad id.
        tokens: ids of each row instead of random ones; their number is the row's length.
    """
    rng = np.random.default_rng(seed)
    found = sizes(spec, batch, sequence, dims or {})
    if tokens is not None:
        lengths = [len(row) for row in tokens]
    return {
        t.name: _tensor(t, spec.shape(t, found), rng, lengths, tokens) for t in spec.inputs
    }


def _tensor(
    tensor: TensorSpec,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    lengths: Sequence[int] | None,
    tokens: Sequence[Sequence[int]] | None,
) -> NDArray[Any]:
    dtype = _numpy(tensor.dtype)
    keep = np.ones(shape, bool)
    if lengths is not None and len(shape) == 2:
        keep = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    if tensor.role == "tokens":
        return _tokens(tensor, shape, rng, keep, tokens).astype(dtype)
    if tensor.role == "mask":
        return keep.astype(dtype)
    if tensor.role == "positions" and len(shape) == 2:
        return np.broadcast_to(np.arange(shape[1]) % (tensor.high or 1 << 30), shape).astype(dtype)
    if tensor.role == "flags":
        return rng.integers(0, 2, shape).astype(dtype)
    if np.issubdtype(dtype, np.integer) or tensor.high is not None:
        return rng.integers(0, tensor.high or 2, shape).astype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _tokens(
    tensor: TensorSpec,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    keep: NDArray[np.bool_],
    tokens: Sequence[Sequence[int]] | None,
) -> NDArray[np.int64]:
    high = tensor.high or 1000
    pad = tensor.pad if tensor.pad is not None else 0
    ids = rng.integers(0, high, shape, dtype=np.int64)
    if tokens is not None and len(shape) == 2:
        for row, given in zip(ids, tokens, strict=True):
            row[: len(given)] = given
    elif high > 1:
        ids = np.where(ids == pad, (pad + 1) % high, ids)
    filled = np.where(keep, ids, pad)
    return filled if tokens is not None else tensor.ended(filled, keep)


def _numpy(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        return cast("np.dtype[Any]", np.dtype(ml_dtypes.bfloat16))
    return np.dtype(name)
