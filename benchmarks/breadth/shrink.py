"""A tiny config from a config class: its sizes made small, whatever it calls them.

What a field is shows in its name (a number of layers, of heads, a width, …), and widths keep their
proportions, because models divide them by one another. No architecture is named here; the few
whose sizes depend on each other in a way of their own are in ``exceptions.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = json.loads(
    (Path(__file__).parent / "exceptions.json").read_text("utf-8"))
"""Fields by model type, or by model type and task, dotted where they belong to a part; they go
over what the shrinker makes. ``(generation)`` has what a generation config must say, by model type;
``(noise)`` how much the weights whose names match are moved by, where :data:`NOISE` leaves every
answer the same."""

WIDTH, HEADS, HEAD, VOCABULARY, POSITIONS, LAYERS, EXPERTS = 32, 4, 8, 128, 64, 2, 4
NOISE = 0.02
"""Standard deviation of what is added to weights, so that none is 0 or 1 as drawn."""

Degree = Literal["small", "gentle", "whole"]
DEGREES: tuple[Degree, ...] = ("small", "gentle", "whole")
"""Everything; everything but widths and heads; nothing: for sizes that do not fit together when
they are made small one by one."""

MAX_LAYERS = 6
"""Layers kept where two would leave out a kind of layer."""

_LAYERS = re.compile(
    r"^(n_layers?|num_(\w+_)?(layers|blocks)|(encoder|decoder|text|vision)_layers|\w*_layers|layers"
    r"|depth|n_blocks|num_hidden_layers_\w+|encoder_depth|decoder_depth)$")
_HEADS = re.compile(
    r"^(n_heads?|num_heads|num_(\w+_)?attention_heads|(\w+_)?attention_heads|num_decoder_heads"
    r"|num_encoder_heads)$")
_KV_HEADS = re.compile(r"^(num_(\w+_)?key_value_heads|num_kv_heads|n_head_kv|n_kv_heads)$")
_HEAD = re.compile(r"^(\w+_)?(head_dim|d_kv|head_size|rotary_dim|kv_channels)$")
_EXPERTS = re.compile(r"^(\w*num_(\w+_)?experts|n_routed_experts|moe_num_experts)$")
_CHOSEN = re.compile(r"^(\w*experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k)$")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "width",
           "encoder_hidden_size", "emb_dim", "embedding_size")
_WIDTH = re.compile(
    r"^(\w*(hidden_size|hidden_dim|emb_dim|embed_dim|embedding_dim|embedding_size|intermediate_size|"
    r"ffn_dim|ffn_hidden_size|ffn_embed_dim|projection_dim|proj_dim|lora_rank|latent_dim|"
    r"output_dim|out_hidden_size|feedforward_dim|mlp_dim|inner_dim|bottleneck_dim|"
    r"hidden_act_dim|codebook_dim|d_inner)|d_model|d_ff|n_embd|n_inner|dim|width|"
    r"dim_feedforward|classifier_proj_size|feat_proj_dim|cross_attention_hidden_size|"
    r"input_hidden_size|tdnn_dim|xvector_output_dim|d_embed|qk_channels|v_channels|d_latents)$")
_WIDTHS = re.compile(r"^(\w*(hidden_sizes|embed_dims?|dims|widths|channels|conv_dim|filters)|"
                     r"hidden_sizes|neck_hidden_sizes)$")
_DEPTHS = re.compile(r"^(\w*depths|layers|num_blocks|num_layers|depth_per_stage|"
                     r"num_block_repeats)$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|seq_length|n_ctx|"
    r"max_target_positions|max_seq_length|max_decoder_position_embeddings|block_length|"
    r"max_encoder_position_embeddings|original_max_position_embeddings)$")
_TOKEN = re.compile(r"^(\w+_)?token_(id|index)$|^(image|video|audio|bos|eos|pad)_token$")


def tiny(config: Any, model_type: str, task: str = "", degree: Degree = "small") -> Any:
    """A config of the same class with small sizes.

    Args:
        config: with its class's defaults.
        model_type, task: looked up among the exceptions.
        degree: how much of it is made small.
    """
    fields = config.to_dict()
    if degree != "whole":
        _shrink(fields, gentle=degree == "gentle")
    if "vocab_size" in fields and fields.get("pad_token_id", 0) is None:
        fields["pad_token_id"] = 0  # without one, heads of decoders take no batch
    if task == "text-generation" and fields.get("is_decoder") is False:
        fields["is_decoder"] = True  # an encoder's class that generates where its config says so
    if fields.get("is_encoder_decoder") and fields.get("decoder_start_token_id") is None:
        fields["decoder_start_token_id"] = fields.get("pad_token_id") or 0
    for name in ("out_features", "out_indices", "stage_names",  # follow the layers
                 "transformers_version", "model_type", "architectures", "dtype", "torch_dtype"):
        fields.pop(name, None)
    for key in (model_type, f"{model_type} {task}"):
        for path, value in EXCEPTIONS.get(key, {}).items():
            _set(fields, path.split("."), value)
    return type(config)(**fields)


def _set(fields: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        fields = fields.setdefault(name, {})
    fields[path[-1]] = value


def _shrink(fields: dict[str, Any], gentle: bool) -> None:
    """Shrink the fields of a config and of its parts in place."""
    for value in fields.values():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            _shrink(value, gentle)
    _shrink_layers(fields)
    hidden = next((fields[n] for n in _HIDDEN if _is_size(fields.get(n))), 0)
    heads = next((v for n, v in fields.items() if _HEADS.match(n) and _is_size(v)), 0)
    ids = iter(range(VOCABULARY - 40, VOCABULARY))
    for name, value in list(fields.items()):
        fields[name] = _field(name, value, ids)
        if not gentle and fields[name] is value:
            fields[name] = _width(name, value, hidden, heads)
    staged = next((v for n, v in fields.items() if n == "num_heads" and isinstance(v, list)), [])
    if not gentle and staged and "embed_dim" in fields:  # stages double both
        fields["embed_dim"] = HEAD * staged[0]
    _shrink_image(fields)


def _shrink_layers(fields: dict[str, Any]) -> None:
    """Two layers, or as many as show every kind of layer; lists with an entry a layer follow."""
    counts = {n: v for n, v in fields.items() if _LAYERS.match(n) and _is_size(v)}
    for name, count in counts.items():
        lists = {n: v for n, v in fields.items()
                 if isinstance(v, list) and len(v) == count and count > LAYERS}
        if any(_DEPTHS.match(n) for n in lists):
            continue  # stages, each of which is made shallow by itself
        kept = LAYERS
        for entries in lists.values():
            if all(isinstance(e, str) for e in entries):
                kinds = {e: i for i, e in reversed(list(enumerate(entries)))}
                kept = max(kept, min(max(kinds.values()) + 1, MAX_LAYERS))
        stages = fields.get("out_features") or ()
        fields[name] = min(count, max(kept, len(stages)))
        for other, entries in lists.items():
            fields[other] = entries[:fields[name]]
        for other, value in fields.items():
            if other != "id2label" and isinstance(value, dict) and value and all(
                    str(k).isdigit() for k in value):
                fields[other] = {k: v for k, v in value.items() if int(k) < fields[name]}
        _read_last(fields, fields[name])


def _read_last(fields: dict[str, Any], layers: int) -> None:
    """A backbone that is read after some of its layers: after so many of the last ones."""
    stages = fields.get("out_features")
    if not isinstance(stages, list) or not all(re.fullmatch(r"stage\d+", str(s)) for s in stages):
        return
    if max((int(s[5:]) for s in stages), default=0) > layers:
        last = range(layers - len(stages) + 1, layers + 1)
        fields["out_features"] = [f"stage{i}" for i in last]
        fields.pop("out_indices", None)
        fields.pop("stage_names", None)


def _field(name: str, value: Any, ids: Any) -> Any:
    """What does not depend on the width; the value itself where the name says nothing."""
    if isinstance(value, list):
        if value and all(_is_size(v) for v in value) and _DEPTHS.match(name):
            return [min(v, 1) for v in value]
        return [VOCABULARY - 1 if _TOKEN.match(name) and _is_size(v) and v >= VOCABULARY else v
                for v in value] if _TOKEN.match(name) else value
    if not _is_size(value):
        return value
    if name in ("vocab_size", "n_words") or name.endswith("_vocab_size"):
        return min(value, VOCABULARY)
    if _POSITIONS.match(name):
        return min(value, POSITIONS)
    if _TOKEN.match(name) and value >= VOCABULARY - 40:
        return next(ids)
    if _EXPERTS.match(name):
        return min(value, EXPERTS)
    if _CHOSEN.match(name):
        return min(value, 2)
    if name in ("n_group", "topk_group"):
        return 1
    if name == "max_source_positions":
        return min(value, 32)
    if name in ("num_queries", "num_object_queries", "num_query_tokens"):
        return min(value, 8)
    return value


def _width(name: str, value: Any, hidden: int, heads: int) -> Any:
    if isinstance(value, list):
        if value and all(_is_size(v) for v in value) and _WIDTHS.match(name):
            factor = next((f for f in (64, 32, 16, 8, 4, 2)
                           if all(v % f == 0 for v in value) and min(value) // f >= 8), 1)
            return [v // factor for v in value]
        return value
    if not _is_size(value):
        return value
    if _HEADS.match(name):
        return min(value, HEADS)
    if _KV_HEADS.match(name):
        return HEADS if value == heads else min(value, 2)
    if _HEAD.match(name):
        return min(value, HEAD)
    if _WIDTH.match(name) and value > 8:
        if not hidden or value == hidden:
            return min(value, WIDTH)
        return min(value, max(8, -(-value * WIDTH // hidden // 8) * 8))
    return value


def _shrink_image(fields: dict[str, Any]) -> None:
    """Three patches a side; where images are halved from stage to stage, 64 pixels."""
    patch = fields.get("patch_size")
    staged = any(isinstance(fields.get(n), list) for n in ("depths", "hidden_sizes", "num_heads"))
    for name in ("image_size", "img_size", "input_size"):
        size = fields.get(name)
        side = 3 * patch if _is_size(patch) and not staged else 64
        if _is_size(size):
            fields[name] = min(size, side)
        elif isinstance(size, list) and size and all(_is_size(s) for s in size):
            fields[name] = [min(s, side) for s in size]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
