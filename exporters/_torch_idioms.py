"""Idioms that a trace would freeze at the example's size, expressed so that it follows them.

No architecture is named: an idiom is a way of writing Python or of calling an operator. Whatever
does not match is run as it was.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ._torch_einsum import einsum, product
from ._torch_operators import replaced

_range, _list, _len = range, list, len


@contextmanager
def followed(module: torch.nn.Module) -> Iterator[None]:
    """Trace ``module`` with these idioms expressed by operators that follow its sizes."""
    with ExitStack() as stack:
        stack.enter_context(replaced(torch.Tensor, "as_strided", _as_strided))
        stack.enter_context(replaced(torch.Tensor, "view", _view))
        stack.enter_context(replaced(torch.Tensor, "reshape", _reshape))
        stack.enter_context(replaced(torch, "bmm", _bmm))
        stack.enter_context(replaced(torch, "einsum", einsum))
        stack.enter_context(replaced(torch, "tensor", _as_tensor))
        stack.enter_context(replaced(torch.Tensor, "tolist", _numbers))
        for owner in (torch, torch.Tensor):
            stack.enter_context(replaced(owner, "diff", _diff))
            stack.enter_context(replaced(owner, "split", _split))
        for home in _homes(module):
            for name, value in (("range", _counted), ("list", _List), ("len", _length)):
                stack.enter_context(replaced(home, name, value))
        yield


def _homes(module: torch.nn.Module) -> list[Any]:
    """The modules of Python that the parts of a module are written in."""
    names = {type(part).__module__ for part in module.modules()}
    return [sys.modules[name] for name in sorted(names)
            if name in sys.modules and name.split(".")[0] not in ("torch", __name__.split(".")[0])]


_strided = torch.Tensor.as_strided


def _as_strided(
    tensor: torch.Tensor, size: Any, stride: Any, storage_offset: Any = None
) -> torch.Tensor:
    """Overlapping windows along one axis, as slices side by side.

    A trace keeps the strides as numbers, and they depend on the sizes.
    """
    found = None if storage_offset else _windows(
        tensor, [int(s) for s in size], [int(s) for s in stride])
    if found is None:
        return _strided(tensor, size, stride, storage_offset)
    shape = _list(tensor.shape)
    shape[found.axis: found.axis + found.merged] = [-1, found.step]
    pieces = tensor.reshape(shape)
    count = pieces.shape[found.axis] - (found.parts - 1)
    return torch.cat([pieces.narrow(found.axis, i, count) for i in range(found.parts)],
                     dim=found.axis + 1)


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows of ``parts * step`` elements, one each ``step``, along an axis.

    Attributes:
        merged: 2 where the tensor has that axis cut in two already, else 1.
    """

    axis: int
    step: int
    parts: int
    merged: int


def _windows(tensor: torch.Tensor, size: list[int], stride: list[int]) -> _Windows | None:
    """The windows that ``as_strided`` cuts here, where that is all it does."""
    shape, own = [int(s) for s in tensor.shape], _list(tensor.stride())
    merged = len(shape) - len(size) + 2
    if merged not in (1, 2):
        return None
    for axis in range(len(size) - 1):
        end = axis + merged
        length, base = prod(shape[axis:end]), own[end - 1]
        if (size[:axis], stride[:axis]) != (shape[:axis], own[:axis]) or (
                size[axis + 2:], stride[axis + 2:]) != (shape[end:], own[end:]):
            continue
        step = stride[axis] // base if base else 0
        even = merged == 1 or own[axis] == shape[axis + 1] * base
        if not even or stride[axis + 1] != base or step < 1 or stride[axis] != step * base:
            continue
        parts = size[axis + 1] // step
        whole = length % step == 0 and size[axis + 1] == parts * step
        if whole and parts > 1 and size[axis] == length // step - parts + 1:
            return _Windows(axis, step, parts, merged)
    return None


_torch_diff = torch.diff


def _diff(
    input: torch.Tensor,  # noqa: A002 - torch's name for it
    n: int = 1,
    dim: int = -1,
    prepend: torch.Tensor | None = None,
    append: torch.Tensor | None = None,
) -> torch.Tensor:
    """First differences as a subtraction of slices, which every opset has."""
    if n != 1 or input.dtype == torch.bool:
        return _torch_diff(input, n, dim, prepend, append)
    parts = [part for part in (prepend, input, append) if part is not None]
    whole = torch.cat(parts, dim=dim) if _len(parts) > 1 else input
    count = whole.shape[dim] - 1
    return whole.narrow(dim, 1, count) - whole.narrow(dim, 0, count)


_torch_view, _torch_reshape = torch.Tensor.view, torch.Tensor.reshape


def _view(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
    """``view``; see :func:`_flat`."""
    return tensor.flatten(1) if _flat(tensor, shape) else _torch_view(tensor, *shape)


def _reshape(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
    """``reshape``; see :func:`_flat`."""
    return tensor.flatten(1) if _flat(tensor, shape) else _torch_reshape(tensor, *shape)


def _flat(tensor: torch.Tensor, shape: tuple[Any, ...]) -> bool:
    """Whether ``(n, -1)`` keeps the first axis, whose size ``n`` is traced, and joins the others.

    As a shape it could not be followed to ``n`` = 0, where -1 may be anything.
    """
    if _len(shape) != 2 or tensor.dim() < 2:
        return False
    size, rest = shape
    return (isinstance(size, torch.Tensor) and not isinstance(rest, torch.Tensor) and rest == -1
            and torch._C._is_tracing() and int(size) == int(tensor.shape[0]))


_torch_bmm = torch.bmm


def _bmm(left: torch.Tensor, right: torch.Tensor, **rest: Any) -> torch.Tensor:
    """``bmm``, which a trace may follow to operands without elements."""
    if rest or not torch._C._is_tracing():
        return _torch_bmm(left, right, **rest)
    return product(left, right)


class _Positions:
    """``list(range(n))`` of an ``n`` that the trace follows; slices and sums of it, too."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self.tensor[index]
        if index.step is None or index.step > 0:
            return _Positions(self.tensor[index])
        # Tensors have no negative steps; from the other end, i is at -(i + 1) = ~i.
        first, last = (None if i is None else ~i for i in (index.start, index.stop))
        return _Positions(self.tensor.flip(0)[first:last:-index.step])

    def __add__(self, other: Any) -> Any:
        return _Positions(torch.cat([self.tensor, _tensor(other)]))

    def __radd__(self, other: Any) -> Any:
        return _Positions(torch.cat([_tensor(other), self.tensor]))

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __iter__(self) -> Iterator[int]:
        return iter(self._now())

    def __reversed__(self) -> Iterator[int]:
        return reversed(self._now())

    def _now(self) -> list[int]:
        return [int(value) for value in self.tensor]


_torch_tensor = torch.tensor


def _tensor(values: Any) -> torch.Tensor:
    return values.tensor if isinstance(values, _Positions) else _torch_tensor(_list(values))


def _as_tensor(data: Any, *, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
    """``torch.tensor``, of positions, too."""
    if isinstance(data, _Positions):
        return data.tensor.to(device=device, dtype=dtype)
    return _torch_tensor(data, dtype=dtype, device=device, **rest)


class _Number(int):
    """An element of a tensor, as a number of Python that still knows its tensor."""

    tensor: torch.Tensor


_torch_tolist = torch.Tensor.tolist
_torch_split: Any = torch.Tensor.split


def _numbers(tensor: torch.Tensor) -> Any:
    """``tolist``, whose integers the trace can follow where they are sizes to split at."""
    values = _torch_tolist(tensor)
    if tensor.dim() != 1 or tensor.is_floating_point() or not torch._C._is_tracing():
        return values
    found = [_Number(value) for value in values]
    for i, number in enumerate(found):
        number.tensor = tensor[i]
    return found


def _split(tensor: torch.Tensor, split_size_or_sections: Any, dim: int = 0) -> Any:
    """``split``; at sizes out of a tensor, by slices from where the one before ended."""
    sizes = split_size_or_sections
    if not isinstance(sizes, builtins.list) or not any(isinstance(s, _Number) for s in sizes):
        return _torch_split(tensor, sizes, dim)
    before, start, pieces = (slice(None),) * (dim % tensor.dim()), torch.tensor(0), []
    for size in sizes:
        end = start + (size.tensor if isinstance(size, _Number) else size)
        pieces.append(tensor[(*before, slice(start, end))])
        start = end
    return tuple(pieces)


def _counted(*bounds: Any) -> Any:
    """``range``, of bounds that may be traced."""
    if torch._C._is_tracing() and any(isinstance(b, torch.Tensor) for b in bounds):
        return _Positions(torch.arange(*bounds))
    return _range(*bounds)


def _length(value: Any) -> Any:
    """``len``, traced for positions and tensors."""
    if isinstance(value, _Positions):
        return value.tensor.shape[0]
    traced = isinstance(value, torch.Tensor) and value.dim() and torch._C._is_tracing()
    return value.shape[0] if traced else _len(value)


class _ListType(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.list)


class _List(builtins.list, metaclass=_ListType):  # type: ignore[type-arg]
    """``list``, which leaves positions as they are."""

    def __new__(cls, values: Any = ()) -> Any:
        return values if isinstance(values, _Positions) else _list(values)
