"""Complex numbers as their two parts, for ONNX has none: rotations of positions, spectra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_polar, _as_complex, _as_real = torch.polar, torch.view_as_complex, torch.view_as_real


@dataclass(frozen=True, slots=True)
class Complex:
    """The real and the imaginary part, as two tensors of one shape."""

    real: torch.Tensor
    imag: torch.Tensor

    def __mul__(self, other: Complex | torch.Tensor | float) -> Complex:
        if not isinstance(other, Complex):
            return Complex(self.real * other, self.imag * other)
        return Complex(self.real * other.real - self.imag * other.imag,
                       self.real * other.imag + self.imag * other.real)

    def __getitem__(self, index: Any) -> Complex:
        return self._each(lambda part: part[index])

    def unsqueeze(self, dim: int) -> Complex:
        return self._each(lambda part: part.unsqueeze(dim))

    def to(self, device: torch.device | str) -> Complex:
        return self._each(lambda part: part.to(device))

    @property
    def shape(self) -> torch.Size:
        return self.real.shape

    @property
    def device(self) -> torch.device:
        return self.real.device

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Complex:
        return Complex(change(self.real), change(self.imag))


def polar(abs: torch.Tensor, angle: torch.Tensor) -> Any:  # noqa: A002 - torch's name
    """``polar``, in two parts where it is traced."""
    if not torch._C._is_tracing():
        return _polar(abs, angle)
    return Complex(abs * torch.cos(angle), abs * torch.sin(angle))


def view_as_complex(input: torch.Tensor) -> Any:  # noqa: A002 - torch's name
    """``view_as_complex``, in two parts where it is traced."""
    if not torch._C._is_tracing():
        return _as_complex(input)
    return Complex(input[..., 0], input[..., 1])


def view_as_real(input: Any) -> torch.Tensor:  # noqa: A002 - torch's name
    """``view_as_real``, of two parts, too."""
    if not isinstance(input, Complex):
        return _as_real(input)
    return torch.stack([input.real, input.imag], dim=-1)
