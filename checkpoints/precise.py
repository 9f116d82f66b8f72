"""Float64 that stays float64 where a model asks for float32 by name."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch


def kept(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context to run a module in that computes in ``dtype``.

    Many a module takes its softmax ``in float32``, to be more precise than float16. In float64 that
    is less precise, and worse: masks made of float64's lowest number become infinite there, and a
    row that is masked from end to end becomes NaN. In this context such a softmax stays in float64,
    a finite number that is cast to float32, or filled into it, remains finite, a tensor made of a
    number that float32 can't hold, or its product with one of float32, is float64's, and Einstein
    sums take one beside the other.
    """
    import torch

    return _mode()() if dtype == torch.float64 else nullcontext()


@cache
def _mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    tensor: Any = torch.Tensor
    softmax = {torch.nn.functional.softmax, torch.softmax, tensor.softmax}
    products = {torch.mul, tensor.mul, tensor.__mul__, tensor.__rmul__}
    casts = {tensor.float, tensor.to}
    concerned = {*softmax, *products, *casts, torch.einsum, torch.full, tensor.fill_}

    class Kept(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None
        ) -> Any:
            named = named or {}
            if function not in concerned:
                return function(*given, **named)
            if (function in softmax and given and given[0].dtype == torch.float64
                    and named.get("dtype") == torch.float32):
                named = {**named, "dtype": None}
            if function is torch.einsum:
                given = _widened(given)
            if function in products:
                given = _held(given)
            if function is torch.full and _beyond(*given, *named.values()):
                named = {"dtype": torch.float64, **named}
            if function is tensor.fill_ and given[0].dtype == torch.float32 and _beyond(*given):
                given = (given[0], math.copysign(torch.finfo(torch.float32).max, given[1]))
            found = function(*given, **named)
            if function in casts:
                return _finite(given[0], found)
            return found

    return Kept


def _finite(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``after``, a cast of ``before``, with float32's ends in place of what overflowed."""
    import torch

    if before.dtype != torch.float64 or after.dtype != torch.float32:
        return after
    largest = torch.finfo(torch.float32).max
    return torch.where(before.isfinite(), after.clamp(-largest, largest), after)


def _held(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The factors, those of float32 in float64 where one is a finite number beyond float32."""
    import torch

    beyond = _beyond(*given)
    return tuple(v.double() if beyond and isinstance(v, torch.Tensor) and v.dtype == torch.float32
                 else v for v in given)


def _beyond(*values: Any) -> bool:
    """Whether one of these is a finite number that float32 can't hold."""
    import torch

    largest = torch.finfo(torch.float32).max
    return any(isinstance(v, float) and largest < abs(v) < float("inf") for v in values)


def _widened(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with every tensor of float32 in float64, where there is one of float64."""
    import torch

    kinds = [v.dtype if isinstance(v, torch.Tensor) else None for v in given]
    if torch.float64 not in kinds:
        return given
    return tuple(v.double() if kind == torch.float32 else v
                 for v, kind in zip(given, kinds, strict=True))
