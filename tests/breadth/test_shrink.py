"""Tiny configs from config classes: small, of the same kind, and able to run."""

from __future__ import annotations

import pytest
import transformers
from shrink import EXCEPTIONS, VOCABULARY, Degree, tiny


def shrunk(model_type: str, degree: Degree = "small") -> transformers.PreTrainedConfig:
    return tiny(transformers.CONFIG_MAPPING[model_type](), model_type, degree=degree)


def parameters(model_type: str, auto: str = "AutoModel") -> int:
    model = getattr(transformers, auto).from_config(shrunk(model_type))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "gpt2", "t5", "vit", "wav2vec2",
                                        "resnet", "clip", "qwen3", "gemma2"])
def test_a_model_of_it_is_tiny(model_type: str) -> None:
    assert parameters(model_type) < 1_000_000


def test_widths_keep_their_proportions() -> None:
    config = shrunk("bert")
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.hidden_size % config.num_attention_heads == 0


def test_parts_are_shrunk_too() -> None:
    config = shrunk("clip")
    assert config.text_config.hidden_size < 64
    assert config.vision_config.image_size == 3 * config.vision_config.patch_size


def test_every_kind_of_layer_is_kept() -> None:
    config = shrunk("gemma2")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers


def test_stages_are_kept_and_made_shallow() -> None:
    config = shrunk("segformer")
    assert config.depths == [1, 1, 1, 1]
    assert config.num_encoder_blocks == len(config.hidden_sizes) == 4


def test_special_tokens_stay_inside_the_vocabulary() -> None:
    config = shrunk("qwen2")
    assert config.vocab_size == VOCABULARY
    given = [config.bos_token_id, config.eos_token_id]
    assert all(token is None or token < VOCABULARY for token in given)


def test_the_gentle_way_leaves_widths() -> None:
    config = shrunk("bert", "gentle")
    assert config.hidden_size == 768
    assert config.num_hidden_layers == 2


def test_exceptions_come_last() -> None:
    assert shrunk("longformer").attention_window == EXCEPTIONS["longformer"]["attention_window"]


def test_an_encoder_that_generates_is_told_that_it_is_a_decoder() -> None:
    config = transformers.ErnieConfig()
    assert tiny(config, "ernie", "text-generation").is_decoder
    assert not tiny(config, "ernie", "fill-mask").is_decoder


def test_a_decoder_beside_an_encoder_has_a_token_to_begin_with() -> None:
    config = tiny(transformers.T5Config(), "t5", "text2text-generation")
    assert config.decoder_start_token_id == config.pad_token_id == 0
    assert tiny(transformers.BartConfig(), "bart").decoder_start_token_id == 2


def test_labels_are_no_layers() -> None:
    """A config that is saved with two of three labels has three again when it is read."""
    assert tiny(transformers.BartConfig(), "bart").num_labels == 3
