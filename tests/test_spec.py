from __future__ import annotations

import numpy as np
import pytest
from modelport.errors import SpecError
from modelport.spec import Dim, ModelSpec, TensorSpec

SPEC = ModelSpec(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", high=100, pad=1),
        TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
    ),
    outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 100)),),
    dims={"batch": Dim(1, 8, 64), "sequence": Dim(1, 128, 512)},
)


def feeds(batch: int = 2, sequence: int = 5) -> dict[str, np.ndarray]:
    ones = np.ones((batch, sequence), dtype=np.int64)
    return {"input_ids": ones, "attention_mask": ones}


def test_check_returns_the_size_of_every_dimension() -> None:
    assert SPEC.check(feeds(3, 7)) == {"batch": 3, "sequence": 7}


@pytest.mark.parametrize(
    ("change", "found", "allowed"),
    [
        ({"attention_mask": None}, "missing: attention_mask", "exactly input_ids, attention_mask"),
        ({"extra": np.ones(1)}, "unexpected: extra", "exactly"),
        ({"input_ids": np.ones((2, 5), np.int32)}, "dtype int32", "int64"),
        ({"input_ids": np.ones(5, np.int64)}, r"shape \[5\]", r"\[batch, sequence\]"),
        ({"attention_mask": np.ones((2, 6), np.int64)}, "sequence is 5", "one size"),
        ({"attention_mask": np.ones((3, 5), np.int64)}, "batch is 2", "one size"),
    ],
)
def test_wrong_feeds_are_named(change: dict, found: str, allowed: str) -> None:
    given = {k: v for k, v in {**feeds(), **change}.items() if v is not None}
    with pytest.raises(SpecError, match=found) as caught:
        SPEC.check(given)
    assert caught.match(f"(?s)allowed: .*{allowed}")


@pytest.mark.parametrize(("batch", "sequence"), [(0, 5), (65, 5), (1, 513)])
def test_sizes_outside_the_range_are_refused(batch: int, sequence: int) -> None:
    with pytest.raises(SpecError, match=r"is (0|65|513)"):
        SPEC.check(feeds(batch, sequence))


@pytest.mark.parametrize("bounds", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_a_range_must_be_ordered(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError, match="not ordered"):
        Dim(*bounds)


def test_shape_puts_sizes_in_place_of_names() -> None:
    sizes = {"batch": 3, "sequence": 9}
    assert SPEC.shape(SPEC.outputs[0], sizes) == (3, 9, 100)
