"""Bark on sessions says what Bark in torch says: the same samples, not only the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_bark
import torch
from modelport import load_pipeline, pipeline
from modelport.bark import Optimisations, Setting, Speaker, open_speaker
from modelport.errors import DigestMismatch, UsageError
from modelport.pipeline import speaking

SETTING = Setting(new_tokens=9)
CLOSE = 5e-7


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bark.build(tmp_path_factory.mktemp("bark") / "model")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bark") / "out"
    request = pipeline.ModelRequest(str(source), task="text-to-audio")
    pipeline.export("onnx", request, out, validate=False)
    return out


@pytest.fixture(scope="module")
def opened(source: Path, exported: Path) -> tuple[Speaker, Speaker]:
    """Torch, and sessions, with the same prompts and lengths."""
    torch_side = open_speaker(source, Optimisations(), SETTING, device="cpu")
    made = load_pipeline(exported, threads=1)
    return torch_side, Speaker(made.model, source, SETTING, "cpu")


@pytest.mark.parametrize("rows", [(0,), (1, 2), (0, 3, 5), (7, 1, 2, 3, 4)], ids=len)
def test_greedy_audio_is_that_of_torch(
    opened: tuple[Speaker, Speaker], rows: tuple[int, ...]
) -> None:
    expected, found = (side.speak(rows) for side in opened)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    assert len({row.numpy().tobytes() for row in expected}) == len(rows), "prompts sound the same"


def test_the_same_draws_say_the_same(source: Path, exported: Path) -> None:
    setting = Setting(new_tokens=9, sample=True, seed=3)
    greedy = open_speaker(source, Optimisations(), SETTING, device="cpu").speak([1, 2])
    expected = open_speaker(source, Optimisations(), setting, device="cpu").speak([1, 2])
    with load_pipeline(exported, threads=1) as made:
        found = Speaker(made.model, source, setting, "cpu").speak([1, 2])
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    assert (greedy - expected).abs().max() > 1e-3


def test_a_voice_changes_both_alike(
    source: Path, exported: Path, opened: tuple[Speaker, Speaker]
) -> None:
    setting = Setting(new_tokens=9, voice="seeded")
    expected = open_speaker(source, Optimisations(), setting, device="cpu").speak([4])
    with load_pipeline(exported, threads=1) as made:
        found = Speaker(made.model, source, setting, "cpu").speak([4])
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    assert (opened[0].speak([4]) - expected).abs().max() > 1e-3


def test_rows_of_uneven_length_are_decoded_alone(source: Path, exported: Path) -> None:
    """Free lengths: a row that ends early is cut before the codec, whose LSTM would go on."""
    setting = Setting(new_tokens=16, lengths="free", sample=True, seed=1)
    rows = list(range(8))
    expected = open_speaker(source, Optimisations(), setting, device="cpu")
    with load_pipeline(exported, threads=1) as made:
        other = Speaker(made.model, source, setting, "cpu")
        one, two = expected.speak(rows, cut=True), other.speak(rows, cut=True)
    torch.testing.assert_close(two, one, rtol=0, atol=CLOSE)
    ends = [int(row.nonzero().max()) for row in one]
    assert min(ends) < max(ends), "every row is as long: this test shows nothing"


def prompt(**changes: Any) -> Mapping[str, Any]:
    ids = torch.arange(12)[None].repeat(2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **changes}


@pytest.mark.parametrize(("given", "message"), [
    (prompt(attention_mask=torch.tensor([[1] * 12, [0] * 12])), "prompt 1 of the batch is empty"),
    (prompt(input_ids=torch.zeros(1, 0, dtype=torch.int64), attention_mask=None), "is empty"),
    (prompt(input_ids=torch.ones(1, 13, dtype=torch.int64), attention_mask=None),
     "13 tokens, of which Bark would read 12"),
    (prompt(input_ids=torch.ones(1, 5, dtype=torch.int64), attention_mask=None), "5 tokens long"),
    (prompt(semantic_max_new_tokens=53), "more than the context holds"),
    (prompt(max_new_tokens=53), "more than the context holds"),
    (prompt(semantic_cache_implementation="static"), "cache"),
    (prompt(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
])
def test_what_does_not_fit_is_refused(
    exported: Path, given: Mapping[str, Any], message: str
) -> None:
    with load_pipeline(exported, threads=1) as made, pytest.raises(UsageError, match=message):
        made.generate(**{name: value for name, value in given.items() if value is not None})


def test_new_tokens_are_those_of_the_semantic_model(exported: Path) -> None:
    with load_pipeline(exported, threads=1) as made:
        short, long = (made.generate(**prompt(max_new_tokens=n, semantic_min_new_tokens=n))
                       for n in (4, 8))
        assert made.sampling_rate == 24000
    assert 0 < short.shape[1] < long.shape[1]


def test_a_component_that_was_changed_or_lost_is_refused(exported: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(exported, tmp_path / "changed")
    (changed / "codec.onnx").write_bytes((changed / "coarse.onnx").read_bytes())
    with pytest.raises(DigestMismatch):
        load_pipeline(changed)
    lost = shutil.copytree(exported, tmp_path / "lost")
    manifest = json.loads((lost / "manifest.json").read_text())
    del manifest["components"]["fine"]
    (lost / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="no component fine"):
        load_pipeline(lost)


def test_validation_tells_the_artifact_from_one_that_says_something_else(
    source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport import artifacts, checkpoints
    from modelport.runtimes.pipelines import bark

    sides = speaking._Sides(artifacts.read(exported), checkpoints.resolve(str(source)), None,
                            None, "cpu")
    found, plain = sides.along(speaking.CASES[1])
    assert (found.verdict("float32"), found.flips) == ("pass", 0)
    assert plain.audio is not None
    assert found.decisions > 100
    right = bark.Fine.__call__
    monkeypatch.setattr(bark.Fine, "__call__",
                        lambda self, codebook_idx, input_ids: right(
                            self, 1 + codebook_idx % 7, input_ids))
    wrong, _ = sides.along(speaking.CASES[1])
    assert wrong.verdict("float32") == "fail"
    assert wrong.unexplained > 10
