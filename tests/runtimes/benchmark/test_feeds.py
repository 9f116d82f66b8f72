from __future__ import annotations

import numpy as np
import pytest
from modelport.errors import UsageError
from modelport.runtimes.benchmark import feeds
from modelport.spec import Dim, ModelSpec, TensorSpec

TEXT = ModelSpec(
    inputs=(
        TensorSpec("ids", "int64", ("batch", "sequence"), "tokens", high=50, pad=1),
        TensorSpec("mask", "int64", ("batch", "sequence"), "mask", high=2),
        TensorSpec("types", "int64", ("batch", "sequence"), "segments", high=2),
        TensorSpec("at", "int64", ("batch", "sequence"), "positions", high=512),
        TensorSpec("boxes", "int64", ("batch", "sequence", 4), "boxes", high=1000),
        TensorSpec("on", "bool", ("batch",), "flags"),
        TensorSpec("half", "bfloat16", ("batch", "frames"), "features"),
    ),
    outputs=(), dims={"batch": Dim(1, 2, 64), "sequence": Dim(1, 8, 512), "frames": Dim(1, 7, 9)})


def test_feeds_match_the_spec_and_are_drawn_from_the_seed():
    found = feeds.draw(TEXT, 3, 11, seed=5)
    assert TEXT.check(found) == {"batch": 3, "sequence": 11, "frames": 7}
    again, other = feeds.draw(TEXT, 3, 11, seed=5), feeds.draw(TEXT, 3, 11, seed=6)
    assert all(np.array_equal(found[k], again[k]) for k in found)
    assert not np.array_equal(found["ids"], other["ids"])


def test_tokens_are_varied_and_never_padding():
    ids = feeds.draw(TEXT, 8, 64)["ids"]
    assert len(np.unique(ids)) > 30
    assert ids.min() >= 0
    assert ids.max() < 50
    assert not np.any(ids == 1)


def test_short_rows_are_padded_in_mask_and_tokens():
    found = feeds.draw(TEXT, 2, 6, lengths=[2, 6])
    assert found["mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert np.all(found["ids"][0, 2:] == 1)


def test_given_tokens_are_used_as_they_are():
    found = feeds.draw(TEXT, 2, 3, tokens=[[7], [9, 9, 8]])
    assert found["ids"].tolist() == [[7, 1, 1], [9, 9, 8]]
    assert found["mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_dimension_without_a_size_is_named():
    spec = ModelSpec((TensorSpec("x", "float32", ("batch", "odd"), "features"),), ())
    with pytest.raises(UsageError, match="odd"):
        feeds.draw(spec, 1, 1)
    assert feeds.draw(spec, 1, 1, dims={"odd": 4})["x"].shape == (1, 4)


def test_the_ranges_are_those_that_every_input_takes():
    assert feeds.ranges(TEXT) == {"batch": (1, 64), "sequence": (1, 512)}
    pixels = TensorSpec("pixels", "float32", ("batch", 3, 8, 8), "pixels")
    assert feeds.ranges(ModelSpec((pixels,), (), {"batch": Dim(2, 4, 8)})) == {"batch": (2, 8)}


def test_a_mask_of_samples_is_no_sequence():
    wave = TensorSpec("wave", "float32", ("batch", "samples"), "waveform")
    mask = TensorSpec("mask", "int64", ("batch", "samples"), "mask", high=2)
    spec = ModelSpec((mask, wave), (), {"batch": Dim(1, 2, 4), "samples": Dim(700, 1600, 9999)})
    assert feeds.ranges(spec) == {"batch": (1, 4)}
    assert feeds.draw(spec, 2, 0)["wave"].shape == (2, 1600)


def test_a_mask_that_comes_first_is_as_long_as_the_tokens():
    ids = TensorSpec("ids", "int64", ("rows", "length"), "tokens", high=50)
    mask = TensorSpec("mask", "int64", ("rows", "length"), "mask", high=2)
    spec = ModelSpec((mask, ids), (), {"rows": Dim(1, 2, 4), "length": Dim(1, 8, 99)})
    assert feeds.draw(spec, 3, 11)["mask"].shape == (3, 11)


def test_a_fixed_size_is_the_only_one_unless_another_input_is_free():
    fixed = TensorSpec("ids", "int64", (1, 128), "tokens", high=9)
    assert feeds.ranges(ModelSpec((fixed,), ())) == {"batch": (1, 1), "sequence": (128, 128)}
    beside = TensorSpec("table", "float32", (3, 4), "features")
    found = feeds.ranges(ModelSpec((beside, TEXT.inputs[0]), (), TEXT.dims))
    assert found == {"batch": (1, 64), "sequence": (1, 512)}
