"""What only a run can tell: the outputs' names and shapes, and the longest sequence."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError
from ..spec import Dim, ModelSpec, TensorSpec
from . import samples
from .forgetting import forgotten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

T = TypeVar("T")
_STATES = ("past_key_values", "hidden_states", "attentions", "loss", "mems", "cache_params")
SMALL = 16 << 20
"""Bytes of weights up to which a run with data takes less time than one without."""
_PROBE_ELEMENTS = 1 << 24
_SHORT = (3, 2)
"""Lengths of the first run: too short for models that halve the sequence from block to block."""


class ForwardFailed(Exception):
    """The forward raised on these inputs; the message is its first line."""


class _ReachedLayers(Exception):
    """The embeddings accepted the input."""


def outputs(
    model: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    dims: Mapping[str, Dim],
    constants: Mapping[str, Any],
) -> tuple[tuple[TensorSpec, ...], dict[str, Dim]]:
    """The outputs, and the ranges of dimensions that only they have or that turn out narrower.

    The module runs at sizes that differ in every dimension, and again at others: an output's
    dimension that stays is a constant, one that moves as an input's does is that one. One run
    can't tell the two probabilities of each text from a batch of two.

    Raises:
        ForwardFailed: with the module's own message.
    """
    shortest: dict[str, Dim] = {}
    small, other = samples.sizes(dims), samples.sizes(dims, step=1)
    first = _short(_unmistakable(model, small, dims), dims)
    try:
        a = _run(model, inputs, first, constants)
    except ForwardFailed:
        first = _unmistakable(model, small, dims)
        a = _run(model, inputs, first, constants)
        shortest = _shortest(model, inputs, first, constants, dims)
    else:
        # The short ones may all be sizes of other dimensions; then the least one tells.
        if first.get("sequence", 0) > max(_SHORT):
            shortest = _at_least(model, inputs, first, constants, dims)
    dims = {**dims, **shortest}
    second = {n: small[n] if small[n] != first[n] else other[n] for n in dims}
    b = _run(model, inputs, second, constants)
    if list(a) != list(b):
        raise ForwardFailed(f"it returns {', '.join(a)} at one size and {', '.join(b)} at another")
    own: dict[tuple[int, int], str] = {}
    result = []
    for name, (shape, dtype) in a.items():
        pairs = zip(shape, b[name][0], strict=True)
        named = tuple(_dimension(pair, first, second, own, dims) for pair in pairs)
        result.append(TensorSpec(name, dtype, named))
    ranges = _own_ranges(model, inputs, dims, constants, tuple(result), own)
    return tuple(result), {**shortest, **ranges}


def _short(sizes: Mapping[str, int], dims: Mapping[str, Dim]) -> dict[str, int]:
    """The sizes with a sequence of a few tokens, which not every model takes."""
    if "sequence" not in sizes:
        return dict(sizes)
    dim = dims["sequence"]
    taken = [size for name, size in sizes.items() if name != "sequence"]
    short = next((n for n in _SHORT if dim.min <= n <= dim.max and n not in taken), 0)
    return {**sizes, "sequence": short or sizes["sequence"]}


def _shortest(
    model: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
    constants: Mapping[str, Any],
    dims: Mapping[str, Dim],
) -> dict[str, Dim]:
    """The range of the sequence from the length below which the model does not run.

    Models that shorten the sequence from block to block need more than one token.
    """
    if "sequence" not in dims:
        return {}
    length = sizes["sequence"]
    try:
        while length > dims["sequence"].min:
            _run(model, inputs, {**sizes, "sequence": length - 1}, constants)
            length -= 1
    except ForwardFailed:
        pass
    found = dims["sequence"]
    return {"sequence": Dim(length, max(length, found.opt), found.max)}


def _at_least(
    model: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
    constants: Mapping[str, Any],
    dims: Mapping[str, Dim],
) -> dict[str, Dim]:
    """As :func:`_shortest`, for a model that runs on most lengths and mostly on the least."""
    try:
        _run(model, inputs, {**sizes, "sequence": dims["sequence"].min}, constants)
    except ForwardFailed:
        return _shortest(model, inputs, sizes, constants, dims)
    return {}


def _unmistakable(
    model: torch.nn.Module, sizes: Mapping[str, int], dims: Mapping[str, Dim]
) -> dict[str, int]:
    """The sizes, moved up to where none is also a size of a parameter, where the range allows."""
    taken = {size for p in model.parameters() for size in p.shape}
    chosen: dict[str, int] = {}
    for name, size in sizes.items():
        free = (s for s in range(size, min(size + 64, dims[name].max + 1))
                if s not in taken and s not in chosen.values())
        chosen[name] = next(free, size)
    return chosen


def _dimension(
    pair: tuple[int, int],
    first: Mapping[str, int],
    second: Mapping[str, int],
    own: dict[tuple[int, int], str],
    dims: Mapping[str, Dim],
) -> int | str:
    if pair[0] == pair[1]:
        return pair[0]
    for name in dims:
        if (first[name], second[name]) == pair:
            return name
    if pair not in own:
        base = "frames" if "samples" in dims else "positions"
        own[pair] = base if base not in own.values() and base not in dims else f"{base}_{len(own)}"
    return own[pair]


def _own_ranges(
    model: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    dims: Mapping[str, Dim],
    constants: Mapping[str, Any],
    found: tuple[TensorSpec, ...],
    own: Mapping[tuple[int, int], str],
) -> dict[str, Dim]:
    if not own:
        return {}
    sizes: dict[str, list[int]] = {name: [] for name in own.values()}
    for bound in ("min", "opt", "max"):
        at = {name: getattr(dim, bound) for name, dim in dims.items()}
        shapes = _run(model, inputs, at, constants)
        for tensor in found:
            for dim, size in zip(tensor.shape, shapes[tensor.name][0], strict=True):
                if isinstance(dim, str) and dim in sizes:
                    sizes[dim].append(size)
    return {name: Dim(min(s), sorted(s)[len(s) // 2], max(s)) for name, s in sizes.items()}


def whichever(model: torch.nn.Module, run: Callable[[bool], T]) -> T:
    """What a run of a module finds out, with data or without; told which, it is tried again the
    other way where it fails.

    A large module runs without data first; a small one with data, since that is faster.

    Raises:
        UsageError: from ``run``, at once.
        Exception: what the second try raised.
    """
    import torch

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    first = size <= SMALL
    try:
        with contextlib.nullcontext() if first else _without_data(), torch.no_grad():
            return run(first)
    except UsageError:
        raise
    except Exception:  # noqa: BLE001 - a branch on data, or data that it can't take
        pass
    with _without_data() if first else contextlib.nullcontext(), torch.no_grad():
        return run(not first)


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.setLevel(before)


def _run(
    model: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
    constants: Mapping[str, Any],
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the outputs."""
    import torch

    spec = ModelSpec(inputs, ())
    dims = {name: Dim(size, size, size) for name, size in sizes.items()}

    def run(with_data: bool) -> dict[str, tuple[tuple[int, ...], str]]:
        example = samples.example(ModelSpec(inputs, (), dims)) if with_data else None
        feeds = {
            t.name: torch.ones(spec.shape(t, sizes), dtype=getattr(torch, t.dtype))
            if example is None else
            torch.tensor(example[t.name].astype(_plain(t.dtype))).to(getattr(torch, t.dtype))
            for t in inputs
        }  # fmt: skip
        with forgotten(model):
            return _described(model(**feeds, **constants))

    try:
        return whichever(model, run)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ForwardFailed(line) from error


def _plain(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _described(result: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    import torch

    described = {
        name: (tuple(int(s) for s in value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in result.items()
        if isinstance(value, torch.Tensor) and not any(s in name for s in _STATES)
    }
    if not described:
        raise ForwardFailed("it returns no tensor")
    return described


def longest(model: Any, inputs: tuple[TensorSpec, ...], stated: int) -> int:
    """The most tokens that the embeddings accept, at most ``stated``.

    A table of positions may be larger than what it serves (RoBERTa's has 514 rows for 512 tokens),
    which only shows when it is read: the module is run up to its first layer, where the run stops.
    A module without a list of layers, or one whose embeddings at ``stated`` tokens would be too
    large to try, is taken at its word.
    """
    import torch

    layers = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)),
                  None)
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 1024)
    if layers is None or stated * hidden > _PROBE_ELEMENTS:
        return stated

    def stop(*_: Any) -> None:
        raise _ReachedLayers

    def accepts(length: int) -> bool:
        try:
            with torch.no_grad():
                model(**_feeds(inputs, length))
        except _ReachedLayers:
            return True
        except Exception:  # noqa: BLE001 - whatever the embeddings raise, it is too long
            return False
        return True

    handle = layers[0].register_forward_pre_hook(stop)
    try:
        if accepts(stated) or not accepts(2):
            return stated
        # Tables are too large by a row or two: gallop down from the top, then halve what is left.
        high, step = stated, 1
        while high - step > 2 and not accepts(high - step):
            high, step = high - step, step * 2
        low = max(2, high - step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if accepts(middle) else (low, middle)
        return low
    finally:
        handle.remove()


def _feeds(inputs: tuple[TensorSpec, ...], length: int) -> dict[str, Any]:
    import torch

    others = {d: 2 for t in inputs for d in t.shape if isinstance(d, str)}
    sizes = {**others, "batch": 1, "sequence": length}
    dims = {name: Dim(size, size, size) for name, size in sizes.items()}
    spec = ModelSpec(inputs, (), dims)
    example = {t.name: torch.zeros(spec.shape(t, sizes), dtype=getattr(torch, t.dtype))
               for t in inputs}
    for t in inputs:
        if t.role == "tokens":
            example[t.name].fill_(0 if t.pad != 0 else min(1, (t.high or 2) - 1))
        elif t.role == "mask":
            example[t.name].fill_(1)
    return example
