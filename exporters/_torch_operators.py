"""Operators that the trace-based translation lacks or gets wrong, by operators that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from . import _torch_complex, _torch_resampling
from ._torch_scatter import index_add, scatter, scatter_reduce


@contextmanager
def translatable() -> Iterator[None]:
    """Trace with these operators expressed by others."""
    tensors: dict[str, Callable[..., torch.Tensor]] = {
        "cumsum": _cumsum, "expm1": _expm1, "index_add": index_add, "permute": _permute,
        "repeat_interleave": _repeated, "scatter": scatter, "scatter_reduce": scatter_reduce,
    }
    others: dict[str, Callable[..., Any]] = {
        "full": _full, "full_like": _full_like, "polar": _torch_complex.polar,
        "view_as_complex": _torch_complex.view_as_complex,
        "view_as_real": _torch_complex.view_as_real,
    }
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "rms_norm": _rms_norm,
        "batch_norm": _torch_resampling.batch_norm,
        "interpolate": _torch_resampling.interpolate,
        "adaptive_avg_pool2d": _torch_resampling.adaptive_avg_pool2d,
    }
    with ExitStack() as stack:
        for name, value in tensors.items():
            for owner in (torch, torch.Tensor):
                stack.enter_context(replaced(owner, name, value))
        for name, value in others.items():
            stack.enter_context(replaced(torch, name, value))
        for name, value in functions.items():
            stack.enter_context(replaced(torch.nn.functional, name, value))
        stack.enter_context(replaced(torch.Tensor, "__and__", _and))
        stack.enter_context(replaced(torch.Tensor, "__or__", _or))
        stack.enter_context(_torch_resampling.Fourier())
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in an attribute's place, its own or one it inherits."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _expm1(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 as tanh(x/2) (e^x + 1), the same without the cancellation near 0."""
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


_torch_cumsum = torch.cumsum


def _cumsum(input: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:  # noqa: A002
    """``cumsum``, which counts truth values and in ONNX knows none."""
    counted = input.long() if input.dtype == torch.bool else input
    return _torch_cumsum(counted, *rest, **named)


_torch_and, _torch_or = torch.Tensor.__and__, torch.Tensor.__or__


def _and(one: torch.Tensor, other: Any) -> torch.Tensor:
    """``&``; of a whole number with a truth value, its lowest bit or nothing."""
    mixed = _mixed(one, other)
    if mixed is None:
        return _torch_and(one, other)
    number, truth = mixed
    return torch.remainder(number, 2) * truth


def _or(one: torch.Tensor, other: Any) -> torch.Tensor:
    """``|``; of a whole number with a truth value, the number with its lowest bit set or as it is.
    """
    mixed = _mixed(one, other)
    if mixed is None:
        return _torch_or(one, other)
    number, truth = mixed
    return number + (1 - torch.remainder(number, 2)) * truth


def _mixed(one: torch.Tensor, other: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The whole number and the truth value, where that is what is combined: ONNX combines the bits
    of whole numbers from opset 18 on, and of no others."""
    if not isinstance(other, torch.Tensor) or not torch._C._is_tracing():
        return None
    if other.dtype == torch.bool != one.dtype:
        return one, other
    return (other, one) if one.dtype == torch.bool != other.dtype else None


_torch_permute = torch.permute


def _permute(input: torch.Tensor, *axes: Any, dims: Any = None) -> torch.Tensor:  # noqa: A002
    """``permute``, whose translation keeps axes that are counted from the end as they are."""
    order = axes if dims is None else dims
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    return _torch_permute(input, [axis % input.dim() for axis in order])


_torch_full = torch.full


def _full(size: Any, fill_value: Any, **rest: Any) -> torch.Tensor:
    """``full``, whose translation takes an integer for a float where no dtype is given."""
    if isinstance(fill_value, int) and rest.get("dtype") is None and rest.get("out") is None:
        rest["dtype"] = torch.bool if isinstance(fill_value, bool) else torch.int64
    return _torch_full(size, fill_value, **rest)


_torch_full_like = torch.full_like


def _full_like(input: torch.Tensor, fill_value: Any, **rest: Any) -> torch.Tensor:  # noqa: A002
    """``full_like``; of a truth value, for which tracing has no operator, as a number."""
    return _torch_full_like(
        input, int(fill_value) if isinstance(fill_value, bool) else fill_value, **rest)


_torch_repeat = torch.repeat_interleave


def _repeated(
    input: torch.Tensor,  # noqa: A002 - torch's name
    repeats: Any = None,
    dim: int | None = None,
    **rest: Any,
) -> torch.Tensor:
    """``repeat_interleave``; by one number, as an expanded axis: the translation splits the axis
    into as many parts as the example has, and fails on the last."""
    one = isinstance(repeats, int) or (isinstance(repeats, torch.Tensor) and repeats.dim() == 0)
    if not one or not torch._C._is_tracing() or dim is None or rest:
        return _torch_repeat(input, *(() if repeats is None else (repeats,)),
                             **({} if dim is None else {"dim": dim}), **rest)
    axis = dim % input.dim()
    shape = [-1] * (axis + 1) + [repeats] + [-1] * (input.dim() - axis - 1)
    return input.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


def _rms_norm(
    x: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Root mean square normalisation over the last axes, by its definition."""
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    found = x * torch.rsqrt((x * x).mean(axes, keepdim=True) + least)
    return found if weight is None else found * weight
