"""Which models a decoder of one graph can be made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from modelport.checkpoints import precise
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


@pytest.mark.parametrize(("model_type", "names"), [
    ("xlm", ("input_ids",)), ("openai-gpt", ("input_ids", "attention_mask"))])
def test_a_model_that_keeps_nothing_reads_the_whole_text(
    model_type: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99, "n_embd": 32, "n_layer": 2,
             "n_head": 4, "vocab_size": 99, "mask_token_id": 5, "lang_id": 0, "pad_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **sizes, n_positions=24,
                                               max_position_embeddings=24)
    model = model_of(config)
    (part,) = decoder.parts(model, tmp_path, "float32")
    assert part.spec.input_names == names
    # What XLM fills in after the text takes a place in its context.
    assert part.spec.dims["sequence"].max == (23 if model_type == "xlm" else 24)
    ids = torch.randint(6, 90, (2, 7))
    given = (ids, torch.ones_like(ids))[:len(names)]
    steps = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True,
                           return_dict_in_generate=True, pad_token_id=2)
    with torch.no_grad():
        torch.testing.assert_close(part.module(*given)[0], steps.logits[0])
        longer = steps.sequences[:, :8]
        given = (longer, torch.ones_like(longer))[:len(names)]
        torch.testing.assert_close(part.module(*given)[0], steps.logits[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_states_are_kept_from_call_to_call(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37,
                                      mem_len=24, initializer_range=0.3)
    model = model_of(config).to(dtype)
    (part,) = decoder.parts(model, tmp_path, str(dtype).removeprefix("torch."))
    assert part.spec.dims["past+sequence"].max == 24
    ids = torch.randint(6, 90, (2, 7))
    filled_in = torch.zeros(2, 1, dtype=torch.int64)
    none = [torch.zeros(2, 0, 32, dtype=dtype)] * 2
    with torch.no_grad(), precise.kept(dtype):
        steps = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True,
                               return_dict_in_generate=True, pad_token_id=5)
        logits, *states = part.module(torch.cat([ids, filled_in], 1), *none)
        torch.testing.assert_close(logits, steps.logits[0].to(dtype))
        # As the library goes on: without the token filled in and the one before, read again.
        again = torch.cat([steps.sequences[:, 6:8], filled_in], 1)
        logits, *_ = part.module(again, *(state[:, :-2] for state in states))
        torch.testing.assert_close(logits, steps.logits[1].to(dtype))
