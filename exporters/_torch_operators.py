"""Operators that the trace-based translation lacks or gets wrong, by operators that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

_repeat_interleave = torch.repeat_interleave


@contextmanager
def translatable() -> Iterator[None]:
    """Trace with these operators expressed by others."""
    with ExitStack() as stack:
        for name, value in (("expm1", _expm1), ("repeat_interleave", _repeated)):
            for owner in (torch, torch.Tensor):
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(torch.nn.functional, "rms_norm", _rms_norm))
        yield


def _expm1(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 as tanh(x/2) (e^x + 1), the same without the cancellation near 0."""
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


def _repeated(
    x: torch.Tensor, repeats: Any, dim: int | None = None, *, output_size: int | None = None
) -> torch.Tensor:
    """Each entry so often along an axis; the translation splits the axis, and fails on the last."""
    if dim is None or not isinstance(repeats, int):
        return _repeat_interleave(x, repeats, dim, output_size=output_size)
    axis = dim % x.ndim
    shape = [-1] * (x.ndim + 1)
    shape[axis + 1] = repeats
    return x.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


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
