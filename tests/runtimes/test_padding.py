"""Rounding sizes up to buckets: what was padded and cut is what was not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from modelport.runtimes import _padding
from modelport.spec import Dim, ModelSpec, TensorSpec

TEXT = ("batch", "sequence")
SPEC = ModelSpec(
    (
        TensorSpec("input_ids", "int64", TEXT, "tokens", high=50, pad=3),
        TensorSpec("attention_mask", "int64", TEXT, "mask"),
    ),
    (
        TensorSpec("hidden", "float32", (*TEXT, 4)),
        TensorSpec("pooled", "float32", ("batch", 4)),
    ),
    {"batch": Dim(1, 8, 64), "sequence": Dim(1, 128, 500)},
)


@given(size=st.integers(1, 500))
def test_a_bucket_holds_its_sizes_and_wastes_little(size: int) -> None:
    dim = Dim(1, 1, 500)
    found = _padding.bucket(size, dim)
    assert size <= found <= 500
    assert found == _padding.bucket(found, dim), "a bucket is its own bucket"
    if size >= 3:
        assert found - size <= found / 3


def test_there_are_few_buckets() -> None:
    dim = Dim(1, 1, 512)
    found = {_padding.bucket(size, dim) for size in range(1, 513)}
    assert found == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512}


@given(batch=st.integers(1, 64), sequence=st.integers(1, 500))
def test_padding_keeps_what_there_was_and_is_masked(batch: int, sequence: int) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(4, 50, (batch, sequence)),
        "attention_mask": np.ones((batch, sequence), np.int64),
    }
    sizes = _padding.rounded(SPEC, {"batch": batch, "sequence": sequence})
    padded = _padding.pad(SPEC, feeds, sizes)
    assert SPEC.check(padded) == sizes
    for name, value in feeds.items():
        assert padded[name].dtype == value.dtype
        np.testing.assert_array_equal(padded[name][:batch, :sequence], value)
    assert not padded["attention_mask"][:, sequence:].any()
    assert (padded["input_ids"][:, sequence:] == 3).all()
    assert padded["attention_mask"][:, 0].all(), "no row is without a token"
    outputs = {
        "hidden": np.zeros((sizes["batch"], sizes["sequence"], 4), np.float32),
        "pooled": np.zeros((sizes["batch"], 4), np.float32),
    }
    cut = _padding.cut(SPEC, outputs, {"batch": batch, "sequence": sequence})
    assert cut["hidden"].shape == (batch, sequence, 4)
    assert cut["pooled"].shape == (batch, 4)


def test_a_length_that_no_mask_accounts_for_stays() -> None:
    frames = ModelSpec(
        (TensorSpec("input_values", "float32", ("batch", "samples"), "waveform"),),
        (TensorSpec("logits", "float32", ("batch", 2)),),
        {"batch": Dim(1, 8, 64), "samples": Dim(400, 1000, 16000)},
    )
    assert _padding.rounded(frames, {"batch": 5, "samples": 777}) == {"batch": 6, "samples": 777}


def test_a_length_that_an_output_derives_something_from_stays() -> None:
    halved = ModelSpec(
        SPEC.inputs,
        (TensorSpec("hidden", "float32", ("batch", "positions", 4)),),
        {**SPEC.dims, "positions": Dim(1, 64, 250)},
    )
    assert _padding.rounded(SPEC, {"batch": 5, "sequence": 17}) == {"batch": 6, "sequence": 24}
    assert _padding.rounded(halved, {"batch": 5, "sequence": 17}) == {"batch": 6, "sequence": 17}
