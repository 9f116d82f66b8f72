"""Operators along image and sequence axes that ONNX lacks, as products with the matrix each is.

Antialiased interpolation and adaptive pooling are linear and act on rows and columns one after the
other. Their matrices are read off torch itself: what it makes of an identity. Sizes of images are
part of a graph; where they were not, parity would find it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._torch_complex import Complex

_interpolate = torch.nn.functional.interpolate
_adaptive = torch.nn.functional.adaptive_avg_pool2d
_Resize = Callable[[torch.Tensor, tuple[int, int]], torch.Tensor]


def interpolate(input: torch.Tensor, size: Any = None, *rest: Any, **named: Any) -> torch.Tensor:  # noqa: A002 - torch's name
    """``interpolate``; antialiased to a given size, by matrices."""
    if rest or size is None or not named.get("antialias") or not _images(input):
        return _interpolate(input, size, *rest, **named)
    return _separable(input, size, lambda x, to: _interpolate(x, to, **named))


def adaptive_avg_pool2d(input: torch.Tensor, output_size: Any) -> torch.Tensor:  # noqa: A002 - torch's name
    """``adaptive_avg_pool2d``; to more than one place, by matrices."""
    sizes = _pair(output_size)
    if None in sizes or sizes == (1, 1) or not _images(input):
        return _adaptive(input, output_size)
    return _separable(input, sizes, _adaptive)


def _images(value: torch.Tensor) -> bool:
    return bool(torch._C._is_tracing()) and value.dim() == 4


def _pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _separable(images: torch.Tensor, size: Any, resize: _Resize) -> torch.Tensor:
    rows, columns = (int(s) for s in _pair(size))
    with _untraced():
        height, width = (int(s) for s in images.shape[2:])
        down = _matrix(height, lambda x: resize(x, (rows, 2)))
        across = _matrix(width, lambda x: resize(x.mT, (2, columns)).mT).mT
    return torch.matmul(torch.matmul(down.to(images.dtype), images), across.to(images.dtype))


def _matrix(size: int, resize: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The matrix [after, before] of what happens to a column of ``size`` numbers."""
    # Side by side twice: of images one pixel wide, torch 2.13 interpolates some wrongly.
    columns = torch.eye(size, dtype=torch.float64)[None, :, :, None].expand(1, size, size, 2)
    return resize(columns.contiguous())[0, :, :, 0].mT.contiguous()


@contextmanager
def _untraced() -> Iterator[None]:
    """Compute constants without leaving a trace."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


_normalise = torch.nn.functional.batch_norm


def batch_norm(
    input: torch.Tensor,  # noqa: A002 - torch's name
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``batch_norm``; by the statistics of its input alone, which the translation ignores."""
    if running_mean is not None or not training or not torch._C._is_tracing():
        return _normalise(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    centred = input - input.mean(axes, keepdim=True)
    result = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
    result = result if weight is None else result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


class Fourier(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Fourier transforms of real tensors as products with the matrices of cosines and sines.

    A mode and no replacement: models keep the function in an attribute.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        axes = _axes(func, args, named) if torch._C._is_tracing() else ()
        return _transformed(args[0], axes) if axes else func(*args, **named)


def _axes(func: Any, args: Sequence[Any], named: dict[str, Any]) -> tuple[int, ...]:
    """The axes that a call transforms; none where it is another call, or does more than that."""
    if func not in (torch.fft.fft, torch.fft.fft2, torch.fft.fftn):
        return ()
    if len(args) != 1 or not set(named) <= {"dim"} or args[0].is_complex():
        return ()
    default = {torch.fft.fft: -1, torch.fft.fft2: (-2, -1)}.get(func, tuple(range(args[0].dim())))
    dim = named.get("dim", default)
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _transformed(x: torch.Tensor, axes: Sequence[int]) -> Complex:
    real, imaginary = x, torch.zeros_like(x)
    for axis in axes:
        count = x.shape[axis]
        steps = torch.arange(count, device=x.device)
        turns = torch.remainder(steps.unsqueeze(0) * steps.unsqueeze(1), count)
        angles = turns.to(x.dtype) * (2 * math.pi / count)
        cosine, sine = torch.cos(angles), torch.sin(angles)
        a, b = real.transpose(axis, -1), imaginary.transpose(axis, -1)
        real = (torch.matmul(a, cosine) + torch.matmul(b, sine)).transpose(axis, -1)
        imaginary = (torch.matmul(b, cosine) - torch.matmul(a, sine)).transpose(axis, -1)
    return Complex(real, imaginary)
