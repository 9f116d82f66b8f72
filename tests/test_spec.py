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


@pytest.mark.parametrize("bounds", [(-1, 1, 2), (2, 1, 3), (1, 4, 3), (0, 0, 0)])
def test_a_range_must_be_ordered(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError, match="not ordered"):
        Dim(*bounds)


def test_shape_puts_sizes_in_place_of_names() -> None:
    sizes = {"batch": 3, "sequence": 9}
    assert SPEC.shape(SPEC.outputs[0], sizes) == (3, 9, 100)


CACHED = ModelSpec(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", high=100),
        TensorSpec("attention_mask", "int64", ("batch", "past+sequence"), "mask"),
        TensorSpec("past", "float32", ("batch", 2, "past", 4), "features"),
    ),
    outputs=(TensorSpec("present", "float32", ("batch", 2, "past+sequence", 4)),),
    dims={
        "batch": Dim(1, 1, 4), "sequence": Dim(1, 1, 10), "past": Dim(0, 5, 9),
        "past+sequence": Dim(1, 6, 10),
    },
)  # fmt: skip


def cached(sequence: int, past: int, mask: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.ones((2, sequence), np.int64),
        "attention_mask": np.ones((2, mask), np.int64),
        "past": np.ones((2, 2, past, 4), np.float32),
    }


def test_a_sum_is_as_long_as_its_terms_and_has_no_size_of_its_own() -> None:
    assert CACHED.check(cached(3, 5, 8)) == {"batch": 2, "sequence": 3, "past": 5}
    assert CACHED.check(cached(3, 0, 3)) == {"batch": 2, "sequence": 3, "past": 0}
    assert CACHED.shape(CACHED.outputs[0], {"batch": 2, "sequence": 3, "past": 5}) == (2, 2, 8, 4)
    assert set(CACHED.free) == {"batch", "sequence", "past"}


def test_a_size_that_only_outputs_have_is_not_free() -> None:
    heard = ModelSpec((TensorSpec("values", "float32", ("batch", "samples"), "waveform"),),
                      (TensorSpec("x", "float32", ("batch", "frames", 4)),),
                      {"batch": Dim(1, 2, 4), "samples": Dim(8, 80, 800), "frames": Dim(2, 9, 90)})
    assert set(heard.free) == {"batch", "samples"}


@pytest.mark.parametrize(
    ("sizes", "found", "allowed"),
    [((3, 5, 7), r"past\+sequence is 7", "8"), ((6, 5, 11), r"past\+sequence is 11", "1 to 10")],
)
def test_a_sum_that_is_none_or_too_large_is_refused(
    sizes: tuple[int, int, int], found: str, allowed: str
) -> None:
    with pytest.raises(SpecError, match=found) as caught:
        CACHED.check(cached(*sizes))
    assert caught.match(f"(?s)allowed: .*{allowed}")


def test_rows_of_tokens_end_where_their_content_does() -> None:
    tokens = TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", 9, pad=0, end=2)
    ids = np.array([[2, 5, 2, 0], [0, 0, 2, 7], [0, 0, 0, 0], [3, 4, 5, 6]])
    keep = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = tokens.ended(ids, keep)
    assert found.tolist() == [[1, 5, 2, 0], [0, 0, 1, 2], [0, 0, 0, 2], [3, 4, 5, 2]]
    assert tokens.ended(ids, None)[:, -1].tolist() == [2] * 4
    assert TensorSpec("input_ids", "int64", ("batch",), "tokens", 9).ended(ids, keep) is ids
