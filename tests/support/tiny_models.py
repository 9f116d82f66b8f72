"""Tiny seeded checkpoints on disk, and ways to damage them.

``build`` makes a directory as ``save_pretrained`` writes it; the rest derive other directories
from one. Real enough for every rule of loading: ties, shards, old names, half precision.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37}
_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 37, "max_position_embeddings": 40, "pad_token_id": 1}

_DECODER = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 37, "max_position_embeddings": 40, "bos_token_id": 2,
            "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bert": {**_TEXT, "pad_token_id": 0},
    "camembert": {**_TEXT, "type_vocab_size": 1},
    "roberta": {**_TEXT, "type_vocab_size": 1},
    "xlm-roberta": {**_TEXT, "type_vocab_size": 1},
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37,
                   "max_position_embeddings": 40},
    "albert": {**_TEXT, "embedding_size": 16, "pad_token_id": 0},
    "electra": {**_TEXT, "embedding_size": 16, "pad_token_id": 0},
    "mpnet": {**_TEXT},
    "deberta-v2": {**_TEXT, "pad_token_id": 0, "type_vocab_size": 0, "relative_attention": True,
                   "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 8},
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 37, "image_size": 12, "patch_size": 4, "num_channels": 3},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
               "layer_type": "basic", "num_channels": 3, "image_size": 32},
    "wav2vec2": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "intermediate_size": 37, "conv_dim": [16, 16],
                 "conv_stride": [5, 64], "conv_kernel": [10, 64], "num_feat_extract_layers": 2,
                 "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
                 "classifier_proj_size": 16},
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
             "bos_token_id": 98, "eos_token_id": 98},
    "openai-gpt": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "xlnet": {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37,
              "mem_len": 40},
    "mixtral": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
                "num_local_experts": 3, "max_position_embeddings": 40},
    "gpt_neox": {**_DECODER, "rotary_pct": 0.25},
    "opt": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 37, "word_embed_proj_dim": 32, "max_position_embeddings": 40,
            "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    "llama": {**_DECODER, "num_key_value_heads": 2},
    "qwen2": {**_DECODER, "num_key_value_heads": 2},
    "qwen3": {**_DECODER, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {**_DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "gemma": {**_DECODER, "num_key_value_heads": 1, "head_dim": 8},
    "phi": {**_DECODER, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "t5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0},
    "mt5": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2,
            "num_decoder_layers": 3, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {**_SEQ2SEQ, "max_position_embeddings": 40},
    "marian": {**_SEQ2SEQ, "max_position_embeddings": 40, "pad_token_id": 98, "eos_token_id": 0,
               "decoder_start_token_id": 98},
    "m2m_100": {**_SEQ2SEQ, "max_position_embeddings": 40, "decoder_start_token_id": 2},
    "whisper": {**_SEQ2SEQ, "max_source_positions": 20, "max_target_positions": 40,
                "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 3, "suppress_tokens": None,
                "begin_suppress_tokens": None},
}
"""The sizes of each kind, over the defaults of its config class."""

AUTO: Mapping[str, str] = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}

_MASKED = ("bert", "camembert", "roberta", "xlm-roberta", "distilbert", "albert", "electra",
           "mpnet", "deberta-v2")

TASKS: Mapping[str, str] = {
    **dict.fromkeys(_MASKED, "fill-mask"), "vit": "image-classification",
    "resnet": "image-classification", "wav2vec2": "audio-classification",
    "gpt2": "feature-extraction", "t5": "feature-extraction",
}
"""A task for each kind that a single forward pass performs."""


def build(
    kind: str,
    task: str,
    directory: Path,
    *,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint with seeded weights and biases that are not zero.

    Args:
        kind: one of :data:`CONFIGS`.
        task: one of :data:`AUTO`.
        directory: created.
        dtype: of the stored weights.
        shards: about how many files; 1 for ``model.safetensors`` alone.
        overrides: config fields.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], **overrides})
    model = getattr(transformers, AUTO[task]).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    model.to(getattr(torch, dtype))
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    size = nbytes + 4096 if shards == 1 else max(nbytes // shards, 1)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=size)
    return directory


def tensors(directory: Path) -> dict[str, Any]:
    """Every stored tensor of a single-file checkpoint."""
    from safetensors.torch import load_file

    return dict(load_file(directory / "model.safetensors"))


def rewritten(
    source: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Path:
    """A copy whose tensors have gone through ``change``."""
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    changed = {k: v.contiguous() for k, v in change(tensors(source)).items()}
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_nan(source: Path, target: Path, name: str, count: int = 3) -> Path:
    """A copy with ``count`` NaNs, and one infinity more, in one tensor."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        state[name].view(-1)[:count] = float("nan")
        state[name].view(-1)[-1] = float("inf")
        return state

    return rewritten(source, target, change)


def truncated(source: Path, target: Path, missing: int = 100) -> Path:
    """A copy whose weights file lacks its last bytes."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-missing])
    return target


def pickled(source: Path, target: Path, *, safe: bool = True, shards: int = 1) -> Path:
    """A copy whose weights are ``pytorch_model.bin``; unless ``safe``, one that runs code."""
    import torch

    shutil.copytree(source, target)
    state: dict[str, Any] = tensors(source)
    (target / "model.safetensors").unlink()
    if not safe:
        state["boom"] = _Touch(target / "executed")
    if shards == 1:
        torch.save(state, target / "pytorch_model.bin")
        return target
    names = sorted(state)
    index = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = names[number::shards]
        torch.save({n: state[n] for n in part}, target / file)
        index.update(dict.fromkeys(part, file))
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return target


class _Touch:
    """Pickles to a call that creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def edit_config(directory: Path, **fields: Any) -> Path:
    """Set fields of ``config.json``; None removes one."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory
