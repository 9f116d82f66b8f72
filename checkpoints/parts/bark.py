"""Bark as five graphs: embeddings, semantic, coarse, fine, codec.

``semantic`` begins with embeddings of a text and a voice added up, so it takes embeddings and the
table is a graph of its own; ``coarse`` takes tokens. Both are decoders with a past, empty or not.
``fine`` is one graph for every codebook, whose number is an input. ``codec`` turns codes into
samples.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UsageError
from ...spec import Dim, ModelSpec, TensorSpec
from .. import samples
from . import Part
from .cache import PAST, TOTAL, filled, flat

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..model import Dtype

EMBEDDINGS, SEMANTIC, COARSE, FINE, CODEC = "embeddings", "semantic", "coarse", "fine", "codec"
NAMES = (EMBEDDINGS, SEMANTIC, COARSE, FINE, CODEC)
IDS, EMBEDDED, CODES, CODEBOOK = "input_ids", "inputs_embeds", "codes", "codebook"
FEW_FRAMES, MANY_FRAMES = 375, 1536
"""Five seconds and twenty at the codec's 75 frames a second; 768 semantic tokens, the most that
Bark speaks, are 1154."""

MANY_ROWS, DECODED_ROWS = 16, 4
"""Largest batch; and of the codec, which is given more rows in turn: a row is 24 000 samples for
each second, at 32 channels."""


def parts(model: Any, root: Path, dtype: Dtype) -> tuple[Part, ...]:
    """The parts of a Bark model.

    Raises:
        UsageError: another model, or one whose codec pads in another way than Bark's.
    """
    if not all(hasattr(model, name) for name in ("semantic", "coarse_acoustics", "fine_acoustics",
                                                 "codec_model")):
        raise UsageError(f"{type(model).__name__} speaks in another way than Bark",
                         allowed="checkpoints of BarkModel", hint="--task feature-extraction")
    semantic, coarse = model.semantic, model.coarse_acoustics
    made = (
        (EMBEDDINGS, _embeddings_spec(semantic.config, dtype), Embeddings(semantic)),
        (SEMANTIC, _decoder_spec(semantic.config, EMBEDDED, dtype), Decoder(semantic, EMBEDDED)),
        (COARSE, _decoder_spec(coarse.config, IDS, dtype), Decoder(coarse, IDS)),
        (FINE, _fine_spec(model.fine_acoustics.config, dtype), Fine(model.fine_acoustics)),
        (CODEC, _codec_spec(model, dtype), Codec(model.codec_model)),
    )
    return tuple(Part(name, spec, module.eval(), samples.example(spec))
                 for name, spec, module in made)


class Embeddings(torch.nn.Module):
    """The semantic model's table: tokens in, their embeddings out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.table = model.input_embeds_layer

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.table(input_ids),)


class Decoder(torch.nn.Module):
    """A causal sub-model: tokens or embeddings and the past in; logits and a longer past out.

    It has no mask: Bark never masks a position, and pads its prompts with tokens of their own.
    """

    def __init__(self, model: Any, given: str) -> None:
        super().__init__()
        self.model = model
        self.given = given

    def forward(self, new: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(**{self.given: new}, past_key_values=filled(past), use_cache=True)
        return (result.logits, *flat(result.past_key_values))


class Fine(torch.nn.Module):
    """Codes and the number of a codebook in; logits of that codebook at every position out.

    The library picks embeddings and head by a Python number, which a trace would make a constant.
    Codebooks are counted from the first that has a head.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.given = int(model.config.n_codes_given)

    def forward(self, codes: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor]:
        model = self.model
        tables = model.input_embeds_layers
        known = (torch.arange(len(tables), device=codes.device) <= codebook + self.given)
        embedded = sum(table(codes[:, :, i]) * known[i] for i, table in enumerate(tables))
        positions = torch.arange(codes.shape[1], device=codes.device)
        hidden = model.drop(embedded + model.position_embeds_layer(positions))
        for block in model.layers:
            hidden = block(hidden)[0]
        heads = torch.stack([head.weight for head in model.lm_heads])
        return (model.layernorm_final(hidden) @ heads[codebook].transpose(0, 1),)


class Codec(torch.nn.Module):
    """Codes in, samples out: Encodec's quantizer and decoder, at any length.

    Raises:
        UsageError: its convolutions look ahead, or do not reflect.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        if not config.use_causal_conv or config.pad_mode != "reflect":
            raise UsageError(
                f"the codec pads by {config.pad_mode}, causal: {config.use_causal_conv}",
                allowed="causal convolutions that reflect, as in Bark's checkpoints")
        self.quantizer = model.quantizer
        self.decoder = model.decoder

    def forward(self, codes: torch.Tensor) -> tuple[torch.Tensor]:
        # As EncodecResidualVectorQuantizer.decode, whose loop a trace unrolls.
        hidden = self.quantizer.decode(codes.transpose(0, 1))
        return (_through(self.decoder.layers, hidden).squeeze(1),)


def _through(layers: Iterable[Any], hidden: torch.Tensor) -> torch.Tensor:
    """The layers one after the other, as they call themselves, but for the padding."""
    for layer in layers:
        if hasattr(layer, "padding_total"):
            hidden = _convolved(layer, hidden)
        elif hasattr(layer, "block"):
            hidden = _through([layer.shortcut], hidden) + _through(layer.block, hidden)
        else:
            hidden = layer(hidden)
    return hidden


def _convolved(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A causal convolution of stride 1.

    The layer's own padding asks whether the clip is shorter than the kernel, and a trace keeps the
    answer. Zeros at the end, reflecting, and cutting them off is the same for either answer.
    """
    convolution = layer.conv
    pad = (convolution.kernel_size[0] - 1) * convolution.dilation[0]
    length = hidden.shape[-1]
    hidden = torch.nn.functional.pad(hidden, (0, pad))
    hidden = torch.nn.functional.pad(hidden, (pad, 0), mode="reflect")[..., : length + pad]
    hidden = convolution(hidden)
    return layer.norm(hidden) if layer.norm_type == "time_group_norm" else hidden


def _embeddings_spec(config: Any, dtype: Dtype) -> ModelSpec:
    ids = TensorSpec(IDS, "int64", ("batch", "sequence"), "tokens", high=config.input_vocab_size)
    found = TensorSpec(EMBEDDED, dtype, ("batch", "sequence", config.hidden_size))
    return ModelSpec((ids,), (found,), _dims(config))


def _decoder_spec(config: Any, given: str, dtype: Dtype) -> ModelSpec:
    place = ("batch", "sequence")
    new = (TensorSpec(IDS, "int64", place, "tokens", high=config.input_vocab_size)
           if given == IDS else TensorSpec(EMBEDDED, dtype, (*place, config.hidden_size),
                                           "features"))
    size = config.hidden_size // config.num_heads
    names = [f"{kind}_{index}" for index in range(config.num_layers) for kind in ("key", "value")]
    past = (TensorSpec(f"past_{name}", dtype, ("batch", config.num_heads, PAST, size), "features")
            for name in names)
    present = (TensorSpec(f"present_{name}", dtype, ("batch", config.num_heads, TOTAL, size))
               for name in names)
    longest = int(config.block_size)
    dims = {**_dims(config), PAST: Dim(0, min(64, longest - 1), longest - 1),
            TOTAL: Dim(1, min(192, longest), longest)}
    logits = TensorSpec("logits", dtype, (*place, config.output_vocab_size))
    return ModelSpec((new, *past), (logits, *present), dims)


def _fine_spec(config: Any, dtype: Dtype) -> ModelSpec:
    codes = TensorSpec(CODES, "int64", ("batch", "sequence", config.n_codes_total), "tokens",
                       high=config.input_vocab_size)
    codebook = TensorSpec(CODEBOOK, "int64", (), "tokens",
                          high=config.n_codes_total - config.n_codes_given)
    logits = TensorSpec("logits", dtype, ("batch", "sequence", config.output_vocab_size))
    return ModelSpec((codes, codebook), (logits,), _dims(config))


def _codec_spec(model: Any, dtype: Dtype) -> ModelSpec:
    config, count = model.codec_model.config, model.fine_acoustics.config.n_codes_total
    hop = prod(config.upsampling_ratios)
    frames = Dim(1, FEW_FRAMES, MANY_FRAMES)
    codes = TensorSpec(CODES, "int64", ("batch", count, "frames"), "tokens",
                       high=config.codebook_size)
    audio = TensorSpec("audio", dtype, ("batch", "positions"))
    dims = {"batch": Dim(1, 1, DECODED_ROWS), "frames": frames,
            "positions": Dim(hop, hop * frames.opt, hop * frames.max)}
    return ModelSpec((codes,), (audio,), dims)


def _dims(config: Any) -> dict[str, Dim]:
    longest = int(config.block_size)
    return {"batch": Dim(1, 1, MANY_ROWS), "sequence": Dim(1, min(257, longest), longest)}
