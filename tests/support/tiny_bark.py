"""A tiny Bark on disk whose prompts sound different.

Weights are large enough that another prompt is another greedy path, and the codec's codebooks are
drawn: with the library's own initialisation every prompt sounds the same, and every comparison of
audio passes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_SUB = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "bias": False, "dropout": 0.0}
CONFIG: dict[str, Any] = {
    "semantic_config": {**_SUB, "block_size": 64, "input_vocab_size": 140,
                        "output_vocab_size": 48},
    "coarse_acoustics_config": {**_SUB, "block_size": 96, "input_vocab_size": 80,
                                "output_vocab_size": 80},
    "fine_acoustics_config": {**_SUB, "block_size": 32, "input_vocab_size": 24,
                              "output_vocab_size": 24, "n_codes_total": 8, "n_codes_given": 1},
    "codec_config": {"model_type": "encodec", "num_filters": 4, "hidden_size": 16,
                     "codebook_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2],
                     "num_lstm_layers": 1, "sampling_rate": 24000, "target_bandwidths": [96.0]},
}
GENERATION: dict[str, Any] = {
    "semantic_config": {"eos_token_id": 40, "text_encoding_offset": 48, "text_pad_token": 139,
                        "semantic_infer_token": 138, "semantic_vocab_size": 40,
                        "max_input_semantic_length": 12, "max_new_tokens": 20},
    "coarse_acoustics_config": {"coarse_semantic_pad_token": 76, "coarse_infer_token": 77,
                                "max_coarse_input_length": 12, "max_coarse_history": 20,
                                "sliding_window_len": 8},
    "fine_acoustics_config": {"max_fine_history_length": 16, "max_fine_input_length": 32,
                              "n_fine_codebooks": 8},
    "codebook_size": 16,
    "sample_rate": 24000,
}


def build(directory: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint, with generation configs of the sub-models."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.BarkModel._from_config(transformers.BarkConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "input_embeds" in name or ".attn." in name else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    return directory
