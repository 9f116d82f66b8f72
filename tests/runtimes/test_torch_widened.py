"""The original in float64 is finite where only its own narrowing to float32 made it NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from modelport.runtimes._torch_widened import widened  # noqa: E402
from modelport.runtimes.torch_eager import TorchSession  # noqa: E402
from modelport.spec import Dim, ModelSpec, TensorSpec  # noqa: E402


class Masked(torch.nn.Module):
    """Scores with a row that sees no key, brought to float32 for the softmax, as models do it."""

    def __init__(self, narrow: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1 / 3], dtype=torch.float64))
        self.narrow = narrow

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = x * self.weight + torch.tensor([[0.0], [1.0]]) * torch.finfo(x.dtype).min
        if self.narrow == "softmax":
            return (torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype),)
        if self.narrow == "float":
            return (torch.softmax(scores.float(), -1).type_as(x),)
        return (torch.softmax(scores.to(torch.float32), -1).to(x.dtype),)


def session(module: torch.nn.Module) -> TorchSession:
    tensors = [TensorSpec(name, "float64", (2, "n")) for name in "xy"]
    spec = ModelSpec((tensors[0],), (tensors[1],), {"n": Dim(1, 3, 9)})
    return TorchSession(cast("Any", SimpleNamespace(spec=spec, module=module)), "cpu", 0)


X = np.linspace(-1, 1, 6).reshape(2, 3)


@pytest.mark.parametrize("narrow", ["softmax", "float", "to"])
def test_a_row_that_sees_no_key_is_even(narrow: str) -> None:
    module = Masked(narrow)
    assert not torch.isfinite(module(torch.from_numpy(X))[0]).all()
    found = session(module).run({"x": X})["y"]
    first = np.exp(X[0] / 3) / np.exp(X[0] / 3).sum()
    np.testing.assert_allclose(found, [first, [1 / 3] * 3], rtol=1e-15)


class Plain(Masked):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((x * self.weight).float().double(),)


def test_what_is_finite_is_left_as_the_original_has_it() -> None:
    found = session(Plain("")).run({"x": X})["y"]
    np.testing.assert_array_equal(found, (X / 3).astype(np.float32).astype(np.float64))


class Overflowing(Masked):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * self.weight / 0,)


def test_what_is_not_finite_in_float64_either_stays_so() -> None:
    assert not np.isfinite(session(Overflowing("")).run({"x": X})["y"]).any()


def test_torch_is_as_it_was_afterwards() -> None:
    with widened():
        assert torch.ones(2).dtype is torch.float64
        assert torch.ones(2, dtype=torch.float32).float().dtype is torch.float64
    assert torch.ones(2).float().dtype is torch.float32
