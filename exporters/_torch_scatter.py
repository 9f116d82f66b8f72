"""Scattering of a number, or that leaves its target out, by what ONNX has."""

from __future__ import annotations

from typing import Any

import torch

_scatter, _index_add = torch.scatter, torch.index_add
_reduce = torch.scatter_reduce
_ENDS = {"amax": -1.0, "amin": 1.0}


def scatter(
    input: torch.Tensor,  # noqa: A002 - torch's name
    dim: int,
    index: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    """``scatter``; of a number, as a tensor of it: tracing has no operator for a truth value."""
    value = rest[0] if rest else named.get("value")
    if not torch._C._is_tracing() or isinstance(value, torch.Tensor | None):
        return _scatter(input, dim, index, *rest, **named)
    number = torch.tensor(value, dtype=input.dtype, device=input.device)
    filled = number.expand(index.shape)
    reduce = {k: v for k, v in named.items() if k == "reduce"}
    return _scatter(input, dim, index, filled, **reduce)


def index_add(
    input: torch.Tensor,  # noqa: A002 - torch's name
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    *,
    alpha: Any = 1,
) -> torch.Tensor:
    """``index_add``, as scattering: its own translation adds but one of several to a place."""
    if not torch._C._is_tracing():
        return _index_add(input, dim, index, source, alpha=alpha)
    shape = [1] * source.dim()
    shape[dim] = -1
    return input.scatter_add(dim, index.view(shape).expand_as(source), source * alpha)


def scatter_reduce(
    input: torch.Tensor,  # noqa: A002 - torch's name
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> torch.Tensor:
    """``scatter_reduce``; where the target does not count, from a start that changes nothing.

    Places that nothing is scattered to keep the target's values.
    """
    if include_self or not torch._C._is_tracing() or not (
            reduce in ("sum", "mean") or (reduce in _ENDS and src.is_floating_point())):
        return _reduce(input, dim, index, src, reduce, include_self=include_self)
    count = torch.zeros_like(input).scatter_add(dim, index, torch.ones_like(src))
    if reduce in _ENDS:
        start = torch.full_like(input, _ENDS[reduce] * torch.finfo(src.dtype).max)
        result = _reduce(start, dim, index, src, reduce, include_self=True)
    else:
        result = torch.zeros_like(input).scatter_add(dim, index, src)
        if reduce == "mean":
            mode = None if src.is_floating_point() else "floor"
            result = torch.div(result, count.clamp(min=1), rounding_mode=mode)
    return torch.where(count > 0, result, input)
