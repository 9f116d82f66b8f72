"""Bark's parts against the model's own methods, at sizes that no trace saw."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_bark
import torch
from modelport import checkpoints
from modelport.checkpoints import parts
from modelport.checkpoints.parts import bark
from modelport.errors import UsageError
from transformers import DynamicCache


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tiny_bark.build(tmp_path_factory.mktemp("bark") / "model")
    return checkpoints.load_reference(checkpoints.resolve(str(root))).module


def part(model: Any, name: str) -> Any:
    found = {p.name: p for p in parts.parts(model, Path(), "text-to-audio", "float32")}
    assert tuple(found) == bark.NAMES
    return found[name].module


def drawn(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("name", "attribute"), [("semantic", "semantic"),
                                                 ("coarse", "coarse_acoustics")])
def test_decoders_continue_a_past_as_the_sub_models_do(
    model: Any, name: str, attribute: str
) -> None:
    own, cache, ids = getattr(model, attribute), DynamicCache(), drawn(70, 3, 11)
    module = part(model, name)
    table = part(model, "embeddings") if name == "semantic" else lambda new: (new,)
    past = [torch.zeros(3, 4, 0, 8)] * 4
    with torch.no_grad():
        for new in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
            expected = own(input_ids=new, past_key_values=cache, use_cache=True)
            logits, *past = module(table(new)[0], *past)
            torch.testing.assert_close(logits, expected.logits)
    assert past[0].shape[2] == 11


def test_one_module_predicts_every_codebook(model: Any) -> None:
    codes, module = drawn(16, 2, 21, 8), part(model, "fine")
    answers = []
    with torch.no_grad():
        for index in range(1, 8):
            expected = model.fine_acoustics(index, codes).logits
            (found,) = module(codes, torch.tensor(index - 1))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
            answers.append(found)
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(answers))


@pytest.mark.parametrize("frames", [1, 3, 6, 7, 50])
def test_the_codec_pads_as_the_library_at_every_length(model: Any, frames: int) -> None:
    """Kernels are 7 wide: shorter clips take another branch in the library."""
    codes = drawn(16, 3, 8, frames)
    with torch.no_grad():
        (found,) = part(model, "codec")(codes)
        torch.testing.assert_close(found, model.codec_decode(codes))
    assert found.shape == (3, frames * 8)


def test_a_codec_that_looks_ahead_is_refused() -> None:
    config = SimpleNamespace(use_causal_conv=False, pad_mode="reflect")
    with pytest.raises(UsageError, match="causal: False"):
        bark.Codec(SimpleNamespace(config=config))


def test_another_speaking_model_is_refused() -> None:
    with pytest.raises(UsageError, match="another way than Bark"):
        bark.parts(torch.nn.Linear(2, 2), Path(), "float32")


def test_every_tensor_of_a_part_leads_back_to_the_checkpoint(tmp_path: Path) -> None:
    """The codec's weights are computed from two stored tensors each, and both are found."""
    root = tiny_bark.build(tmp_path / "model")
    for name, found in checkpoints.load(checkpoints.resolve(str(root))).parts.items():
        own = dict(found.module.named_parameters(remove_duplicate=False))
        assert set(own) <= set(found.weights), name
        assert all(tuple(own[key].shape) == found.weights[key].shape for key in own)
    assert "decoder.layers.0.conv.parametrizations.weight.original0" in own
