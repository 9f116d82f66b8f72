"""Test data: seeded feeds drawn from the roles of a model's inputs, from texts, or from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import ml_dtypes
import numpy as np

from ..errors import SpecError, UsageError
from ..spec import terms
from .npz import read_arrays

if TYPE_CHECKING:
    from pathlib import Path

    from ..spec import ModelSpec, TensorSpec

Padding = Literal["none", "right", "left", "masked"]
"""none: every position is content; right, left: rows of different lengths, padded on that side;
masked: as none, but one row is padding from end to end (a batch filled up to its bucket)."""

FEW_POSITIONS = 256
"""Positions (batch × sequence) up to which a tail may be all of them: the logits of more would take
a gigabyte in float64 for a vocabulary of 50 000."""

Feeds = Mapping[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One set of feeds to compare models on.

    Attributes:
        sizes: size of each named dimension, as sorted pairs.
        padding: see :data:`Padding`.
        seed: of the generator; meaningless for given feeds.
        origin: ``matrix`` when drawn from the spec, ``text`` or ``file`` when given.
        essential: whether the coverage guarantee rests on it (see :func:`~.matrix.plan`).
        feeds: given arrays; None when they are drawn.
    """

    sizes: tuple[tuple[str, int], ...]
    padding: Padding = "none"
    seed: int = 0
    origin: Literal["matrix", "text", "file"] = "matrix"
    essential: bool = True
    feeds: Feeds | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> str:
        """Sizes as text, ``batch=3 sequence=17``; ``fixed`` for a model without dynamic sizes."""
        return " ".join(f"{name}={size}" for name, size in self.sizes) or "fixed"

    @property
    def label(self) -> str:
        """Unique among the cases of one plan, readable, and free of characters paths dislike."""
        return f"{self.shape} {self.padding} {self.origin} {self.seed}"


def draw(spec: ModelSpec, case: Case) -> dict[str, np.ndarray]:
    """The feeds of a case: given ones as they are, others drawn from each input's role.

    Tokens lie below ``high``, are never the pad id where the mask keeps them, and hold the
    boundary ids 0 and ``high - 1``; padded positions hold the pad id, and rows end as the input's
    ``end`` says. The same case gives the same arrays on every machine (PCG64).

    Raises:
        SpecError: an integer input has no ``high``, or given feeds do not match the spec.
    """
    if case.feeds is not None:
        feeds = dict(case.feeds)
        spec.check(feeds)
        return feeds
    sizes = dict(case.sizes)
    rng = np.random.default_rng([case.seed, *sizes.values()])
    masks: dict[tuple[int | str, ...], np.ndarray] = {}
    for tensor in spec.inputs:
        if tensor.role == "mask" and tensor.shape not in masks:
            masks[tensor.shape] = _mask(spec.shape(tensor, sizes), case.padding, rng)
    return {t.name: np.asarray(rng.integers(*tail_range(t, sizes)), numpy_dtype(t.dtype))
            if t.role == "tail" else _draw_one(t, spec.shape(t, sizes), masks, rng)
            for t in spec.inputs}


def tail_range(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, int]:
    """What a tail is drawn from, the end excluded: 0, which is all positions, in small cases."""
    few = sizes.get("batch", 1) * sizes["sequence"] <= FEW_POSITIONS
    return (0 if few else 1), max(tensor.high or 2, 2)


def mask_arrays(spec: ModelSpec, feeds: Feeds) -> dict[tuple[int | str, ...], np.ndarray]:
    """Every mask among the feeds by its named shape, as booleans; two of one shape are joined."""
    found: dict[tuple[int | str, ...], np.ndarray] = {}
    for tensor in spec.inputs:
        if tensor.role == "mask":
            mask = np.asarray(feeds[tensor.name]).astype(bool)
            known = found.get(tensor.shape)
            found[tensor.shape] = mask if known is None else known & mask
    return found


def mask_pieces(
    spec: ModelSpec, feeds: Feeds, masks: Mapping[tuple[int | str, ...], np.ndarray]
) -> dict[tuple[int | str, ...], np.ndarray]:
    """What masks over a sum of dimensions say of each of its terms, and of a tail of them."""
    sizes = {dim: size for t in spec.inputs
             for dim, size in zip(t.shape, np.shape(feeds[t.name]), strict=True)
             if isinstance(dim, str)}
    found: dict[tuple[int | str, ...], np.ndarray] = {}
    for names, mask in masks.items():
        parts = terms(str(names[-1]))
        if len(parts) > 1:
            ends = np.cumsum([sizes[part] for part in parts])
            cut = np.split(mask, ends[:-1], axis=-1)
            found |= {(*names[:-1], part): piece
                      for part, piece in zip(parts, cut, strict=True)}
    for tensor in spec.inputs:
        if tensor.role == "tail":
            count = int(feeds[tensor.name])
            found |= {(*names[:-1], tensor.name): mask[..., -count:]
                      for names, mask in {**masks, **found}.items() if names[-1] == "sequence"}
    return found


def text_cases(
    spec: ModelSpec, texts: Sequence[str], tokenize: Tokenize, *, batches: Sequence[int] = (1, 3, 8)
) -> tuple[Case, ...]:
    """Cases from real text, in batches of the given sizes, taken in order from ``texts``.

    Batches out of the model's range are left away; at least one remains, of the smallest size.
    Lengths out of it are cut or padded. What does not fit even then is no case.

    Args:
        tokenize: maps a list of strings to padded arrays by input name; names the model does not
            have are dropped, integers are cast to the dtypes of the spec.

    Raises:
        SpecError: the tokenizer lacks an input of the model.
    """
    if not texts:
        raise UsageError("no texts were given", allowed="one text or more")
    cases = []
    bounds = spec.dims.get("batch")
    if bounds is not None:
        inside = [size for size in batches if bounds.min <= size <= bounds.max]
        batches = inside or [bounds.min]
    for seed, size in enumerate(batches):
        chosen = [texts[(seed + i) % len(texts)] for i in range(size)]
        arrays = _of_length(spec, tokenize(chosen))
        try:
            cases.append(given_case(spec, arrays, origin="text", seed=seed))
        except SpecError:
            if not arrays.keys() >= set(spec.input_names):
                raise
    return tuple(cases)


def _of_length(spec: ModelSpec, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays whose last axis is within the model's range, padded at the end or cut there."""
    found = {name: np.asarray(value) for name, value in arrays.items()}
    for tensor in spec.inputs:
        dim = spec.dims.get(str(tensor.shape[-1])) if tensor.shape else None
        if dim is None or tensor.name not in found or not found[tensor.name].ndim:
            continue
        value = found[tensor.name][..., : dim.max]
        missing = [(0, 0)] * (value.ndim - 1) + [(0, max(0, dim.min - value.shape[-1]))]
        pad = tensor.pad if tensor.role == "tokens" and tensor.pad is not None else 0
        found[tensor.name] = np.pad(value, missing, constant_values=pad)
    return found


def file_cases(spec: ModelSpec, path: Path) -> tuple[Case, ...]:
    """Cases from a user's ``.npz``: arrays named by input, or ``<case>/<input>`` for several.

    Raises:
        SpecError: names, dtypes or shapes are not those of the model.
        UsageError: the file cannot be read, or holds pickled objects.
    """
    groups: dict[str, dict[str, np.ndarray]] = {}
    try:
        for key, value in read_arrays(path).items():
            group, _, name = key.rpartition("/")
            groups.setdefault(group, {})[name] = value
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}",
                         allowed="arrays written by numpy.savez, without objects") from error
    if not groups:
        raise UsageError(f"{path} holds no arrays", allowed="one array for each model input")
    return tuple(given_case(spec, arrays, origin="file", seed=i, strict=True)
                 for i, arrays in enumerate(groups.values()))


def given_case(
    spec: ModelSpec,
    arrays: Feeds,
    *,
    origin: Literal["text", "file"],
    seed: int = 0,
    strict: bool = False,
) -> Case:
    """A case around given arrays, cast to the dtypes of the spec where no value changes.

    Args:
        strict: names that are not inputs are an error instead of being dropped.
    """
    known = {t.name: t for t in spec.inputs}
    feeds = {}
    for name, value in arrays.items():
        if name in known:
            feeds[name] = _cast(known[name], value)
        elif strict:
            feeds[name] = value
    sizes = spec.check(feeds)
    return Case(tuple(sorted(sizes.items())), _pattern(mask_arrays(spec, feeds)), seed, origin,
                feeds=feeds)


def digest(feeds: Feeds) -> str:
    """sha256 (lower-case hex) over names, dtypes, shapes and bytes; says which inputs these are."""
    state = hashlib.sha256()
    for name in sorted(feeds):
        value = np.ascontiguousarray(feeds[name])
        state.update(f"{name}\0{value.dtype}\0{value.shape}\0".encode())
        state.update(value.tobytes())
    return state.hexdigest()


def _mask(shape: tuple[int, ...], padding: Padding, rng: np.random.Generator) -> np.ndarray:
    """Booleans, True for content. Right and left padding leave one row full where there are two."""
    rows, length = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
    keep = np.ones((rows, length), bool)
    if padding == "masked":
        keep[rows // 2] = False
    elif padding != "none" and length > 1:
        lengths = rng.integers(1, length + 1, size=rows)
        lengths[0] = length
        lengths[-1] = rng.integers(1, length)
        keep = np.arange(length) < lengths[:, None]
        if padding == "left":
            keep = keep[:, ::-1]
    return keep.reshape(shape)


def _draw_one(
    tensor: TensorSpec,
    shape: tuple[int, ...],
    masks: Mapping[tuple[int | str, ...], np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    keep = masks.get(tensor.shape)
    value: np.ndarray
    if tensor.role == "mask":
        value = cast("np.ndarray", keep)
    elif tensor.role == "flags":
        value = rng.integers(0, 2, size=shape)
    elif tensor.role in ("pixels", "waveform", "features"):
        value = rng.standard_normal(shape)
        value = value if keep is None else value * keep
    elif tensor.high is None:
        raise SpecError(f"input {tensor.name} has role {tensor.role} and no upper bound",
                        allowed="TensorSpec.high for every integer input")
    elif tensor.role == "tokens":
        value = _tokens(tensor, tensor.high, shape, keep, rng)
    elif tensor.role == "segments":
        value = _segments(tensor.high, shape, rng)
    elif tensor.role == "boxes":
        value = _boxes(tensor.high, shape, rng)
    else:
        value = rng.integers(0, tensor.high, size=shape)
    return np.asarray(value, numpy_dtype(tensor.dtype))


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype for a spec's dtype name; bfloat16 comes from ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _tokens(
    tensor: TensorSpec,
    high: int,
    shape: tuple[int, ...],
    keep: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    pad = tensor.pad if tensor.pad is not None and 0 <= tensor.pad < high and high > 1 else None
    # Drawing one id fewer and stepping over the pad id keeps the draw uniform.
    ids = rng.integers(0, high - (pad is not None), size=shape)
    if pad is not None:
        ids += ids >= pad
    content = np.flatnonzero(np.ones(shape, bool) if keep is None else keep)
    bounds = [i for i in (0, high - 1) if i != pad]
    for place, bound in zip(rng.permutation(content)[: len(bounds)], bounds, strict=False):
        ids.reshape(-1)[place] = bound
    if keep is not None and pad is not None:
        ids[~keep] = pad
    return tensor.ended(ids, keep)


def _segments(high: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ascending runs, as a pair of sentences gives: sorted draws along the last axis."""
    return np.sort(rng.integers(0, high, size=shape), axis=-1)


def _boxes(high: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Corners (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1 on the last axis, of size 4."""
    corners = np.sort(rng.integers(0, high, size=(*shape[:-1], 2, 2)), axis=-2)
    return corners.reshape(shape)


def _cast(tensor: TensorSpec, value: np.ndarray) -> np.ndarray:
    wanted = numpy_dtype(tensor.dtype)
    if value.dtype == wanted:
        return value
    cast_value = value.astype(wanted)
    if value.dtype.kind in "iub" and wanted.kind in "iub" and np.array_equal(cast_value, value):
        return cast_value
    return value  # spec.check names the dtype it wanted


def _pattern(masks: Mapping[tuple[int | str, ...], np.ndarray]) -> Padding:
    for mask in masks.values():
        rows = mask.reshape(-1, mask.shape[-1])
        if rows.all():
            continue
        if not rows.any(axis=1).all():
            return "masked"
        return "right" if rows[:, 0].all() else "left"
    return "none"


