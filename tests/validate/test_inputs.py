"""Drawn feeds mean what their roles say, and are the same on every machine."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelport.errors import SpecError, UsageError
from modelport.spec import Dim, ModelSpec, TensorSpec
from modelport.validate import Case, draw, file_cases, given_case, text_cases
from modelport.validate.compare import kept
from modelport.validate.inputs import digest, mask_arrays, mask_pieces
from modelport.validate.matrix import PADDINGS
from toy_transformer import toy_spec

TOKENS = ("batch", "sequence")


def spec(*tensors: TensorSpec, longest: int = 64) -> ModelSpec:
    return ModelSpec(tensors, (), {"batch": Dim(1, 2, 64), "sequence": Dim(1, 8, longest)})


def sized(batch: int, sequence: int, padding="none", seed=0) -> Case:
    return Case((("batch", batch), ("sequence", sequence)), padding, seed)


CASES = st.builds(sized, st.integers(2, 9), st.integers(2, 40), st.sampled_from(PADDINGS),
                  st.integers(0, 5))


@given(CASES, st.integers(3, 100), st.integers(-1, 120))
def test_tokens_keep_their_promises(case, high, pad):
    pad = pad if pad >= 0 else None
    model = spec(TensorSpec("ids", "int64", TOKENS, "tokens", high, pad),
                 TensorSpec("mask", "int64", TOKENS, "mask", 2))
    feeds = draw(model, case)
    assert model.check(feeds) == dict(case.sizes)
    keep = feeds["mask"].astype(bool)
    content = feeds["ids"][keep]
    assert content.min() >= 0
    assert content.max() < high
    if pad is not None and pad < high:
        assert pad not in content
        assert (feeds["ids"][~keep] == pad).all()
    if content.size >= 2:
        for bound in (0, high - 1):
            assert bound == pad or bound in content


@given(CASES)
def test_masks_follow_the_pattern(case):
    mask = draw(toy_spec(), case)["attention_mask"]
    steps = np.diff(mask, axis=1)
    full = mask.all(axis=1)
    if case.padding == "none":
        assert full.all()
    elif case.padding == "masked":
        assert (~mask.any(axis=1)).sum() == 1
        assert full.sum() == len(mask) - 1
    else:
        assert full.any()
        assert not full.all()
        assert mask.any(axis=1).all()
        assert (steps <= 0).all() if case.padding == "right" else (steps >= 0).all()


def test_the_same_case_gives_the_same_bytes():
    model = toy_spec()
    case = sized(3, 7, "left", 1)
    assert digest(draw(model, case)) == digest(draw(model, case))
    seeds = {digest(draw(model, sized(3, 7, "left", seed))) for seed in range(5)}
    assert len(seeds) == 5


def test_the_digest_tells_names_dtypes_and_shapes_apart():
    value = np.zeros((2, 3), np.int32)
    found = {digest({"a": value}), digest({"b": value}), digest({"a": value.astype(np.uint32)}),
             digest({"a": value.T}), digest({"a": value + 1})}
    assert len(found) == 5


def test_roles():
    model = spec(TensorSpec("boxes", "int64", (*TOKENS, 4), "boxes", 1000),
                 TensorSpec("kinds", "int32", TOKENS, "segments", 2),
                 TensorSpec("places", "int64", TOKENS, "positions", 64),
                 TensorSpec("flags", "bool", TOKENS, "flags"),
                 TensorSpec("image", "bfloat16", ("batch", 3, 8, 8), "pixels"),
                 TensorSpec("sound", "float16", ("batch", 100), "waveform"))
    feeds = draw(model, sized(4, 9))
    model.check(feeds)
    boxes = feeds["boxes"]
    assert (boxes[..., 0] <= boxes[..., 2]).all()
    assert (boxes[..., 1] <= boxes[..., 3]).all()
    assert len(np.unique(feeds["places"])) > 5
    assert set(np.unique(feeds["kinds"])) == {0, 1}
    assert (np.diff(feeds["kinds"], axis=1) >= 0).all()
    assert feeds["image"].dtype == ml_dtypes.bfloat16
    assert 0.7 < feeds["image"].astype(np.float64).std() < 1.3


def test_masks_of_two_sequences_are_independent_and_choices_are_rows():
    model = ModelSpec(
        (TensorSpec("a", "int64", ("batch", "choices", "sequence"), "mask"),
         TensorSpec("b", "int64", ("batch", "other"), "mask")), (),
        {n: Dim(1, 2, 50) for n in ("batch", "choices", "sequence", "other")})
    case = Case((("batch", 2), ("choices", 3), ("other", 6), ("sequence", 7)), "right")
    masks = mask_arrays(model, draw(model, case))
    assert masks[("batch", "choices", "sequence")].shape == (2, 3, 7)
    assert masks[("batch", "other")].shape == (2, 6)


def test_an_integer_input_without_bound_is_refused():
    with pytest.raises(SpecError, match="ids"):
        draw(spec(TensorSpec("ids", "int64", TOKENS, "tokens")), sized(2, 2))


def tokenize(texts):
    length = max(len(t) for t in texts)
    ids = np.array([[ord(c) % 40 + 2 for c in t] + [1] * (length - len(t)) for t in texts])
    return {"input_ids": ids.astype(np.int32), "attention_mask": (ids != 1).astype(np.int64),
            "token_type_ids": np.zeros_like(ids), "unused": ids}


def test_text_cases():
    cases = text_cases(toy_spec(), ["short", "a longer one"], tokenize, batches=(1, 2, 99))
    assert [dict(c.sizes)["batch"] for c in cases] == [1, 2]
    assert cases[1].padding == "right"
    assert draw(toy_spec(), cases[1])["input_ids"].dtype == np.int64
    assert len({c.label for c in cases}) == 2


def test_texts_are_cut_and_padded_to_the_lengths_that_a_model_takes():
    texts = ["a", "a longer one"]
    narrow = replace(toy_spec(), dims={**toy_spec().dims, "sequence": Dim(4, 6, 8)})
    short, both = text_cases(narrow, texts, tokenize, batches=(1, 2))
    assert dict(both.sizes) == {"batch": 2, "sequence": 8}
    assert draw(narrow, short)["attention_mask"].tolist() == [[1, 0, 0, 0]]
    assert short.padding == "right"
    fixed = ModelSpec(tuple(replace(t, shape=("batch", 5)) for t in narrow.inputs), (),
                      {"batch": Dim(1, 2, 8)})
    assert text_cases(fixed, texts, tokenize, batches=(1, 2)) == ()


def test_no_text_and_a_tokenizer_that_lacks_an_input():
    with pytest.raises(UsageError, match="no texts"):
        text_cases(toy_spec(), [], tokenize)
    with pytest.raises(SpecError, match="attention_mask"):
        text_cases(toy_spec(), ["a"], lambda t: {"input_ids": tokenize(t)["input_ids"]})


class TestFile:
    def write(self, path, **arrays):
        np.savez(path, **arrays)
        return path

    def test_one_case_and_several(self, tmp_path):
        feeds = draw(toy_spec(), sized(2, 5, "left"))
        (case,) = file_cases(toy_spec(), self.write(tmp_path / "one.npz", **feeds))
        assert case.padding == "left"
        assert case.origin == "file"
        several = {f"{i}/{n}": v for i in range(2) for n, v in feeds.items()}
        assert len(file_cases(toy_spec(), self.write(tmp_path / "two.npz", **several))) == 2

    @pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
    def test_a_damaged_file_is_a_clear_error(self, tmp_path, content):
        path = tmp_path / "bad.npz"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.npz"):
            file_cases(toy_spec(), path)

    def test_pickles_are_refused(self, tmp_path):
        path = self.write(tmp_path / "p.npz", input_ids=np.array([{}], dtype=object))
        with pytest.raises(UsageError, match="cannot be read"):
            file_cases(toy_spec(), path)

    def test_an_unknown_name_is_not_dropped(self, tmp_path):
        feeds = draw(toy_spec(), sized(1, 2)) | {"typo": np.zeros(3)}
        with pytest.raises(SpecError, match="typo"):
            file_cases(toy_spec(), self.write(tmp_path / "t.npz", **feeds))

    def test_missing_file_and_empty_archive(self, tmp_path):
        with pytest.raises(UsageError):
            file_cases(toy_spec(), tmp_path / "absent.npz")
        with pytest.raises(UsageError, match="no arrays"):
            file_cases(toy_spec(), self.write(tmp_path / "empty.npz"))


def test_a_value_that_does_not_fit_is_not_cast():
    feeds = draw(toy_spec(), sized(1, 2))
    feeds["input_ids"] = feeds["input_ids"] + 0.5
    with pytest.raises(SpecError, match="float64"):
        given_case(toy_spec(), feeds, origin="file")


def test_a_mask_over_a_sum_speaks_of_its_terms_and_of_their_tail():
    spec = ModelSpec(
        (TensorSpec("ids", "int64", ("batch", "sequence"), "tokens", 100, 1),
         TensorSpec("mask", "int64", ("batch", "past+sequence"), "mask"),
         TensorSpec("tail", "int64", (), "tail", high=3),
         TensorSpec("past", "float32", ("batch", 2, "past", 4), "features")), (), {})
    case = Case((("batch", 3), ("past", 4), ("sequence", 5)), "left", 3)
    feeds = draw(spec, case)
    assert feeds["tail"].shape == ()
    drawn = {int(draw(spec, Case(case.sizes, "left", seed))["tail"]) for seed in range(20)}
    assert drawn == {0, 1, 2}
    large = (("batch", 64), ("past", 4), ("sequence", 5))  # all logits would not fit
    assert {int(draw(spec, Case(large, "none", seed))["tail"]) for seed in range(20)} == {1, 2}
    mask = feeds["mask"].astype(bool)
    for count in (0, 1, 2):
        feeds["tail"] = np.asarray(count)
        found = mask_pieces(spec, feeds, mask_arrays(spec, feeds))
        assert set(found) == {("batch", "past"), ("batch", "sequence"), ("batch", "tail")}
        np.testing.assert_array_equal(found["batch", "past"], mask[:, :4])
        np.testing.assert_array_equal(found["batch", "sequence"], mask[:, 4:])
        np.testing.assert_array_equal(found["batch", "tail"], mask[:, -count:] if count
                                      else mask[:, 4:])


def test_a_piece_of_a_mask_is_silent_on_outputs_without_its_dimension():
    masks = {("batch", "past+sequence"): np.array([[0, 0, 0, 1], [1, 1, 1, 1]], bool)}
    pieces = {("batch", "past"): masks["batch", "past+sequence"][:, :2],
              ("batch", "sequence"): masks["batch", "past+sequence"][:, 2:]}
    present = TensorSpec("present", "float32", ("batch", 2, "past+sequence", 4))
    found = kept(present, masks, pieces)
    np.testing.assert_array_equal(found[:, 0, :, 0], masks["batch", "past+sequence"])
    hidden = TensorSpec("hidden", "float32", ("batch", "sequence", 8))
    np.testing.assert_array_equal(kept(hidden, masks, pieces)[..., 0],
                                  pieces["batch", "sequence"])
    pooled = TensorSpec("pooled", "float32", ("batch", 8))
    assert kept(pooled, masks, pieces) is None
