"""What a model casts to float32 to be precise costs a run in float64 nothing."""

from __future__ import annotations

import pytest
import torch
from modelport.checkpoints import precise

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
