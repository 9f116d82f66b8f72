"""Which models a decoder of one graph can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from modelport.checkpoints.parts import decoder
from modelport.errors import UsageError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 37, "head_dim": 8}


def model_of(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_layers_with_a_state_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.FalconH1Config(
        **SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8)
    with pytest.raises(UsageError, match="FalconH1ForCausalLM keeps no keys and values"):
        decoder.parts(model_of(config), tmp_path, "float32")


def test_a_context_is_no_longer_than_the_table_of_positions(tmp_path: Path) -> None:
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=99, max_seq_len=24)
    (part,) = decoder.parts(model_of(config), tmp_path, "float32")
    assert part.spec.dims["past+sequence"].max == 24
