"""A module in float64 whose code asks for float32 by name: what it asks for, in float64.

Models bring scores to float32 before a softmax, which widens halves. In float64 it narrows: the
mask's value, the least of float64, becomes -inf, and a row that sees no key becomes NaN, which
spreads over the sequence in the next layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class _Widened(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Every function of torch that is given float32 is given float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wide, args), **{name: _wide(v) for name, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def widened() -> Iterator[None]:
    """Run what is inside with float64 wherever it says float32, or says nothing."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


def finite_if_can(call: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """What a module in float64 returns; if that is not finite, what it returns widened."""
    outputs = call()
    if all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point()):
        return outputs
    with widened():
        return call()
