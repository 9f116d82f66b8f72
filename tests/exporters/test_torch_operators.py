"""Operators without a translation, or with a wrong one, export by others and keep their values."""

from __future__ import annotations

import io
import math

import numpy as np
import onnxruntime
import pytest
import torch
from modelport.exporters._torch_capture import quiet
from modelport.exporters._torch_operators import translatable


class Repeated(torch.nn.Module):
    """Along the last axis and along one whose size is free."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.repeat_interleave(x, 2, dim=-1)[..., :4],
                          x.repeat_interleave(3, dim=1)], 1)


class Less(torch.nn.Module):
    """e^x - 1, as a function and as a method."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.expm1(x * 1e-3), x.expm1()], -1)


class Normalised(torch.nn.Module):
    """Over the last axis, with weights and an epsilon, and with neither."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(4, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * 0.1) + torch.nn.functional.rms_norm(x, (4,))


class Counted(torch.nn.Module):
    """What is positive, counted along the free axis, as a method and as a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).cumsum(1) * x + torch.cumsum(x > 0.5, dim=1, dtype=torch.float32)


class Turned(torch.nn.Module):
    """Axes in another order, counted from the end, one by one and as a tuple."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, -1, -2) + torch.permute(x, dims=(0, -1, 1))


class Rotated(torch.nn.Module):
    """Pairs of numbers turned by their position, as complex numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.size(1), dtype=torch.float32)[:, None] / torch.tensor([1.0, 7.0])
        turns = torch.polar(torch.ones_like(angles), angles) * 0.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :].to(x.device)).flatten(2)


class Filled(torch.nn.Module):
    """What is above zero, where a tensor of truth values says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = torch.full_like(x, True, dtype=torch.bool)
        return torch.where(every & (x > 0), x, torch.full_like(x, 2.0))


class Mixed(torch.nn.Module):
    """Whole numbers combined with truth values, bit by bit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers, truths = (x * 3).to(torch.int32), x > 0
        found = (numbers | truths) + 2 * (truths & numbers) + (numbers & truths)
        return found + (truths | (x < -0.5)) * x


class Marked(torch.nn.Module):
    """The largest of each row, marked by a truth value and by a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = x.argmax(-1, keepdim=True)
        kept = torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False)
        return torch.where(kept, x, torch.scatter(x, -1, index, value=7.0))


@pytest.mark.parametrize("module", [
    Repeated(), Less(), Normalised(), Counted(), Turned(), Marked(),
    Rotated(), Filled(), Mixed(),
])
def test_at_sizes_never_traced(module: torch.nn.Module) -> None:
    buffer = io.BytesIO()
    with quiet(), translatable():
        torch.onnx.export(module, (torch.randn(2, 5, 4),), buffer, input_names=["x"],
                          dynamic_axes={"x": {0: "batch", 1: "length"}}, opset_version=11,
                          dynamo=False)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    for shape in ((1, 1, 4), (3, 7, 4)):
        x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=2e-6, atol=1e-6)


def test_torch_is_left_as_it_was() -> None:
    before = torch.expm1, torch.Tensor.repeat_interleave
    with quiet(), translatable():
        assert torch.expm1 is not before[0]
        x = torch.tensor([1, 2])
        assert x.repeat_interleave(torch.tensor([2, 1])).tolist() == [1, 1, 2]
    assert (torch.expm1, torch.Tensor.repeat_interleave) == before
