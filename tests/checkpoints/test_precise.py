"""What a model casts to float32 to be precise costs a run in float64 nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from modelport.checkpoints import precise
from modelport.runtimes.torch_eager import TorchSession
from modelport.spec import Dim, ModelSpec, TensorSpec

LOWEST = torch.finfo(torch.float64).min


def softmax_in_float32(scores: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def softmax_of_float(scores: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softmax(scores.float(), dim=-1).to(scores.dtype)


@pytest.mark.parametrize("way", [softmax_in_float32, softmax_of_float])
def test_a_row_that_is_masked_from_end_to_end_is_even(way):
    row = torch.full((1, 4), LOWEST, dtype=torch.float64)
    assert way(row).isnan().all()
    with precise.kept(torch.float64):
        assert way(row).tolist() == [[0.25] * 4]


def test_a_softmax_stays_in_float64():
    scores = torch.linspace(-1, 1, 7, dtype=torch.float64)
    with precise.kept(torch.float64):
        assert torch.equal(softmax_in_float32(scores), scores.softmax(-1))


def test_infinity_remains_and_other_precisions_are_as_they_were():
    scores = torch.tensor([0.0, -float("inf")], dtype=torch.float64)
    with precise.kept(torch.float64):
        assert scores.float().tolist() == [0.0, -float("inf")]
        assert softmax_in_float32(scores).tolist() == [1.0, 0.0]
    half = torch.tensor([1.0, 2.0], dtype=torch.float16)
    with precise.kept(torch.float16):
        assert softmax_in_float32(half).dtype == torch.float16


def test_einstein_sums_take_float32_beside_float64():
    row, table = torch.ones(3), torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        torch.einsum("i,ij->j", row, table)
    with precise.kept(torch.float64):
        assert torch.einsum("i,ij->j", row, table).tolist() == [3, 3]


def test_a_product_with_a_number_that_float32_cannot_hold_is_finite():
    kept_out = torch.tensor([0.0, 1.0])
    assert not (kept_out * LOWEST).isfinite().any()
    with precise.kept(torch.float64):
        for product in (kept_out * LOWEST, LOWEST * kept_out, torch.mul(kept_out, LOWEST)):
            assert product.tolist() == [0, LOWEST]
        assert (kept_out * 2.0).dtype == torch.float32


def test_a_tensor_made_of_a_number_that_float32_cannot_hold_is_float64():
    with pytest.raises(RuntimeError, match="overflow"):
        torch.full((), LOWEST)
    with precise.kept(torch.float64):
        assert torch.full((), LOWEST).item() == LOWEST
        assert torch.full((2,), fill_value=LOWEST).dtype == torch.float64
        assert torch.full((), 2.0).dtype == torch.float32
        filled = torch.zeros(2).fill_(LOWEST)
    assert filled.tolist() == [torch.finfo(torch.float32).min] * 2


class Masked(torch.nn.Module):
    """Rows of scores, the second of which sees no key."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1 / 3], dtype=torch.float64))

    def forward(self, x):
        mask = torch.tensor([[0.0], [1.0]], dtype=x.dtype) * torch.finfo(x.dtype).min
        return (softmax_of_float(x * self.weight + mask),)


def test_a_session_in_float64_is_finite_there():
    tensors = [TensorSpec(name, "float64", (2, "n")) for name in "xy"]
    spec = ModelSpec((tensors[0],), (tensors[1],), {"n": Dim(1, 3, 9)})
    model = cast("Any", SimpleNamespace(spec=spec, module=Masked()))
    x = np.linspace(-1, 1, 6).reshape(2, 3)
    found = TorchSession(model, "cpu", 0).run({"x": x})["y"]
    first = np.exp(x[0] / 3) / np.exp(x[0] / 3).sum()
    np.testing.assert_allclose(found, [first, [1 / 3] * 3], rtol=1e-6)
