"""Encoder, cross-attention and decoder as three modules: together they are the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from modelport import checkpoints
from modelport.checkpoints.parts import seq2seq
from modelport.errors import UsageError
from modelport.exporters import _onnx_capture

TEXT = ("t5", "mt5", "bart", "marian", "m2m_100")
KINDS = {**dict.fromkeys(TEXT, "text2text-generation"), "whisper": "automatic-speech-recognition"}

Tiny = Callable[..., Path]


@pytest.fixture
def parts(tiny: Tiny) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """The reference model of a kind, with its parts by name."""

    def load(kind: str) -> tuple[Any, dict[str, Any]]:
        loaded = checkpoints.load_reference(checkpoints.resolve(str(tiny(kind, KINDS[kind]))))
        return loaded.module, dict(loaded.parts)

    return load


def encoded(kind: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What goes into the encoder; rows of text of different lengths, padded on either side."""
    generator = torch.Generator().manual_seed(batch)
    if kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(4, 90, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, -2:], mask[-1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def states(part: Any, prefix: str) -> list[str]:
    return [n for n in part.spec.input_names if n.startswith(prefix)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_in_turn_are_the_model(kind: str, batch: int, parts: Any) -> None:
    model, found = parts(kind)
    assert list(found) == ["encoder", "cross", "decoder"]
    given = encoded(kind, batch, 11)
    tokens = torch.randint(4, 90, (batch, 7), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = model(**given, decoder_input_ids=tokens, use_cache=False).logits
        run = {name: part.module for name, part in found.items()}
        cross = run["cross"](*run["encoder"](*given.values()))
        spec = found["decoder"].spec
        named = {t.name: t for t in spec.inputs}
        past = [torch.zeros(batch, t.shape[1], 0, t.shape[3]) for n, t in named.items()
                if n.startswith("past_")]
        done = 0
        for step in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
            length = done + step.shape[1]
            feeds = {"decoder_input_ids": step,
                     "decoder_attention_mask": torch.ones(batch, length, dtype=torch.int64),
                     "decoder_position_ids": torch.arange(done, length).expand(batch, -1),
                     "attention_mask": given.get("attention_mask")}
            logits, *past = run["decoder"](
                *(feeds[n] for n in named if n in feeds), *cross, *past)
            torch.testing.assert_close(logits, wanted[:, done:length], rtol=1e-4, atol=1e-5)
            done = length
    assert [tuple(p.shape) for p in past] == [
        spec.shape(t, {"batch": batch, "past": 0, "sequence": 7}) for t in spec.outputs[1:]]


@pytest.mark.parametrize("kind", KINDS)
def test_spec_and_samples_fit_the_modules(kind: str, parts: Any) -> None:
    _, found = parts(kind)
    for part in found.values():
        sizes = part.spec.check(part.samples)
        outputs = part.module(*(torch.from_numpy(part.samples[n]) for n in part.spec.input_names))
        assert [tuple(o.shape) for o in outputs] == [
            part.spec.shape(t, sizes) for t in part.spec.outputs]
        assert len(set(sizes.values())) == len(sizes)
    masks = [t.name for t in found["decoder"].spec.inputs if t.role == "mask"]
    assert masks == ["decoder_attention_mask", *(["attention_mask"] if kind in TEXT else [])]
    assert all((found["decoder"].samples[n] == 0).any() for n in masks)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_the_cross_graph_holds_its_projections_alone(kind: str, tiny: Tiny) -> None:
    loaded = checkpoints.load(checkpoints.resolve(str(tiny(kind, KINDS[kind]))))
    cross = loaded.parts["cross"]
    graph = _onnx_capture.by_trace(cross, 17).graph
    weights = [v.name for v in graph.inputs if v.name not in cross.spec.input_names]
    biases = 2 if kind == "whisper" else 0  # its values have one, its keys have none
    assert len(weights) == 2 * 2 + biases
    assert set(weights) <= set(cross.weights)


def test_the_last_encoder_layer_does_not_say_how_wide_the_decoder_is(parts: Any) -> None:
    model, found = parts("mt5")
    assert len(model.encoder.block) == 2
    assert len(states(found["decoder"], "past_key")) == 3
    assert len(found["cross"].spec.outputs) == 2 * 3


def test_lengths_stop_where_the_tables_of_positions_do(parts: Any) -> None:
    _, found = parts("bart")
    assert found["encoder"].spec.dims["sequence"].max == 40
    dims = found["decoder"].spec.dims
    assert (dims["past"].min, dims["past"].max, dims["past+sequence"].max) == (0, 39, 40)
    assert dims["source"].max == 40


def test_a_decoder_without_a_cache_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=0, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37)
    model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(UsageError, match="keeps no keys and values of the encoder"):
        seq2seq.Layout.of(model)
