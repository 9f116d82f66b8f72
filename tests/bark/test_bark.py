"""Bark's optimisations keep what it says, and the comparison would notice if they did not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bark
import torch
from modelport import bark
from modelport.bark import Optimisations, Setting, open_speaker
from modelport.errors import BackendUnavailable, UsageError

PROMPTS = (0, 1, 2)
SETTING = Setting(new_tokens=6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bark.build(tmp_path_factory.mktemp("bark") / "model")


def recorded(root: Path, along: Any = None, **chosen: Any) -> bark.Recording:
    with open_speaker(root, Optimisations(**chosen), SETTING, device="cpu") as speaker:
        return bark.record(speaker, PROMPTS, along=along)


@pytest.fixture(scope="module")
def plain(root: Path) -> bark.Recording:
    return recorded(root)


@pytest.fixture(scope="module")
def truth(root: Path, plain: bark.Recording) -> bark.Recording:
    return recorded(root, plain, precision="float64")


def test_fused_attention_says_the_same(
    root: Path, plain: bark.Recording, truth: bark.Recording
) -> None:
    found = bark.compare(recorded(root, plain, attention="fused"), plain, plain, truth,
                               codebook=16)
    assert found.verdict("float32") == "pass"
    assert (found.flips, found.diverse) == (0, True)
    # 6 semantic tokens are 9 frames of 2 coarse codes; the fine model answers for 32 positions.
    assert found.decisions == 3 * (6 + 18 + 6 * 32)
    free = open_speaker(root, Optimisations(attention="fused"), SETTING, device="cpu")
    np.testing.assert_allclose(free.speak(PROMPTS), plain.audio, atol=5e-7)


def test_half_precision_is_held_to_its_own_rounding(
    root: Path, plain: bark.Recording, truth: bark.Recording
) -> None:
    floor = recorded(root, plain, precision="bfloat16")
    found = bark.compare(
        recorded(root, plain, attention="fused", precision="bfloat16"), plain, floor, truth,
        codebook=16)
    assert found.verdict("bfloat16") == "pass"
    assert found.verdict("float32") == "fail"
    assert 20 < found.quality < 70


def test_one_prompt_in_one_sub_model_is_not_averaged_away(
    plain: bark.Recording, truth: bark.Recording
) -> None:
    """Three times the rounding, in a third of the rows of one sub-model of three."""
    worse = copy.deepcopy(plain)
    calls = zip(worse.logits["semantic"], truth.logits["semantic"], strict=True)
    for own, true in calls:
        own[1] = true[1] + 3 * (own[1] - true[1])
    found = bark.compare(worse, plain, plain, truth, codebook=16)
    assert (found.flips, found.audio) == (0, 0.0)
    assert found.rho == pytest.approx(3)
    assert found.verdict("float32") == "fail"


@pytest.mark.parametrize("spoil", ["scale", "causal"])
def test_a_wrong_attention_is_found(
    root: Path, plain: bark.Recording, truth: bark.Recording, spoil: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: Any, *rest: Any, **named: Any) -> Any:
        if spoil == "scale":
            query = query * 1.01
        else:
            named.update(is_causal=False, attn_mask=None)
        return right(query, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    found = bark.compare(recorded(root, plain, attention="fused"), plain, plain, truth,
                               codebook=16)
    assert found.verdict("float32") == "fail"
    assert found.rho > 100


def test_a_codec_that_sounds_otherwise_is_found(
    plain: bark.Recording, truth: bark.Recording
) -> None:
    assert plain.audio is not None
    other = bark.Recording(plain.inputs, plain.logits, plain.chosen, plain.codes,
                                 plain.audio * 1.001)
    found = bark.compare(other, plain, plain, truth, codebook=16)
    assert (found.flips, found.verdict("float32")) == (0, "fail")


def test_equal_audio_of_all_prompts_proves_nothing(
    plain: bark.Recording, truth: bark.Recording
) -> None:
    assert plain.audio is not None
    same = bark.Recording(plain.inputs, plain.logits, plain.chosen, plain.codes,
                                np.repeat(plain.audio[:1], 3, axis=0))
    found = bark.compare(same, same, same, truth, codebook=16)
    assert found.verdict("float32") == "suspect"


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("mask", [None, "added", "boolean"])
def test_fused_attention_with_a_past_and_a_mask(root: Path, past: int, mask: str | None) -> None:
    """A causal mask ends at the lower right, whatever else is masked."""
    own = open_speaker(root, Optimisations(), SETTING, device="cpu").model
    layer = own.semantic.layers[0].attn
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=generator)
    key, value = torch.randn(2, 2, 4, 7 + past, 8, generator=generator)
    keep = torch.ones(2, 1, 1, 7 + past, dtype=torch.bool)
    keep[1, ..., 1] = False
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    expected, _ = layer._attn(query, key, value, None if mask is None else added)
    bark.fuse(own)
    given = {None: None, "added": added, "boolean": keep}[mask]
    found, _ = layer._attn(query, key, value, given)
    torch.testing.assert_close(found, expected)


def test_only_bark_is_fused() -> None:
    with pytest.raises(UsageError, match="no attention that can be fused"):
        bark.fuse(torch.nn.Linear(2, 2))


def test_offload_says_why_it_is_not_here(root: Path) -> None:
    with pytest.raises(BackendUnavailable, match="this is a CPU"):
        open_speaker(root, Optimisations(offload=True), SETTING, device="cpu")


def test_combinations_begin_with_nothing_and_hold_each_once() -> None:
    found = bark.combinations("cuda")
    assert found[0].name == "no optimisation"
    assert len({o.name for o in found}) == len(found) == 10
    assert {o.precision for o in found} == {"float32", "float16"}


def test_lengths_are_fixed_or_free(root: Path) -> None:
    fixed = open_speaker(root, Optimisations(), Setting(new_tokens=10), device="cpu")
    assert bark.record(fixed, PROMPTS).chosen["semantic"].shape == (10, 3)
    config = open_speaker(root, Optimisations(), Setting(new_tokens=10, lengths="free"),
                          device="cpu").model.generation_config.semantic_config
    assert (config["max_new_tokens"], config["min_new_tokens"]) == (10, None)


def test_windows_and_lengths_must_fit(root: Path) -> None:
    for wrong, message in ((Setting(new_tokens=52), "65 positions"),
                           (Setting(new_tokens=5, fine_window=64), "fine window of 64")):
        with pytest.raises(UsageError, match=message):
            open_speaker(root, Optimisations(), wrong, device="cpu")
    with pytest.raises(UsageError, match="can't be generated"):
        Setting(new_tokens=0)


def test_a_voice_is_read_from_a_file(root: Path, tmp_path: Path) -> None:
    codes = np.arange(8 * 6).reshape(8, 6) % 16
    np.savez(tmp_path / "me.npz", semantic_prompt=np.arange(5), coarse_prompt=codes[:2],
             fine_prompt=codes)
    own = open_speaker(root, Optimisations(), SETTING, device="cpu")
    mine = open_speaker(root, Optimisations(), Setting(6, voice=str(tmp_path / "me.npz")),
                        device="cpu")
    assert (own.speak([0]) - mine.speak([0])).abs().max() > 1e-3


@pytest.mark.parametrize("content", [None, {"semantic_prompt": np.arange(3)},
                                     dict.fromkeys(bark.setting.VOICE_KEYS, np.arange(3))])
def test_what_is_no_voice_is_refused(root: Path, tmp_path: Path, content: Any) -> None:
    file = tmp_path / "none.npz"
    if content is not None:
        np.savez(file, **content)
    with pytest.raises(UsageError, match=r"none\.npz"):
        open_speaker(root, Optimisations(), Setting(6, voice=str(file)), device="cpu")


def test_launches_go_on_in_the_list(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = open_speaker(root, Optimisations(), SETTING, device="cpu")
    said: list[list[int]] = []
    monkeypatch.setattr(type(speaker), "speak", lambda self, numbers: said.append(list(numbers)))
    launch = speaker.bind({"prompt": np.array([0, 1])})
    launch()
    launch()
    assert said == [[0, 1], [2, 3]]
