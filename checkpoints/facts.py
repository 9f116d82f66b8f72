"""What a config says of sizes, under whichever name and at whichever depth it says it."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .files import TIMM

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_CHARACTERS = 0x110000
"""Code points of Unicode: ids of models that read characters and have no vocabulary."""

_UNLIMITED = 1_000_000
"""A tokenizer without a limit says 1e30; positions beyond this are no limit either."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes and ids that inputs are made from.

    Attributes:
        main_input: name of the model's first input.
        text, waveform: what the main input is.
        dtype: of floating-point inputs.
        vocabulary: number of token ids; pad: the padding id, None where there is none.
        end: the id that texts end in, of models with an encoder and a decoder: they look for it,
            or the decoder's input begins with it. None for others.
        segments: number of token types, 0 where the model has one at most.
        length_hint: most positions by the config and the tokenizer; still to be probed.
        target_hint: most positions of a decoder beside an encoder.
        frames_hint: most frames of a recording.
        box_positions: exclusive bound of layout coordinates; 0 without layout.
        channels, image_size: of images; clip: images of a video, 0 where the model reads one.
        sampling_rate: samples a second; min_samples: shortest waveform that gives one frame.
        mel_bins, frames, feature_size, source_positions: of spectrograms; 0 where not stated.
        wants_audio_mask: whether waveforms go with a mask.
    """

    main_input: str
    text: bool
    waveform: bool
    dtype: str
    vocabulary: int
    pad: int | None
    end: int | None
    segments: int
    length_hint: int
    target_hint: int
    frames_hint: int
    box_positions: int
    channels: int
    clip: int
    image_size: tuple[int, int]
    sampling_rate: int
    min_samples: int
    mel_bins: int
    frames: int
    feature_size: int
    source_positions: int
    wants_audio_mask: bool

    @classmethod
    def of(cls, model: torch.nn.Module, root: Path, dtype: str) -> Facts:
        """Read them from a transformers model and the files beside its config."""
        config: Any = model.config
        text = config.get_text_config()
        tokenizer = read_optional(root, "tokenizer_config.json")
        processor = read_optional(root, "preprocessor_config.json")
        main = str(getattr(model, "main_input_name", "input_ids"))
        vocabulary = _number(text, "vocab_size") or (_CHARACTERS if main == "input_ids" else 0)
        pad = getattr(text, "pad_token_id", None)
        mel_bins = _number(config, "num_mel_bins")
        return cls(
            main_input=main,
            text=main == "input_ids",
            waveform=main == "input_values",
            dtype=dtype,
            vocabulary=vocabulary,
            pad=pad if isinstance(pad, int) and 0 <= pad < vocabulary else None,
            end=_end(model, vocabulary),
            segments=_segments(text, tokenizer),
            length_hint=_length(text, tokenizer),
            target_hint=(_number(config, "max_target_positions", "max_decoder_position_embeddings",
                                 "max_text_positions") or _length(text, tokenizer)),
            frames_hint=_number(config, "max_source_positions") or _length(text, tokenizer),
            box_positions=_number(config, "max_2d_position_embeddings"),
            channels=_number(config, "num_channels") or (_timm_input(config) or (3,))[0],
            clip=_clip(config) if main.startswith("pixel_values") else 0,
            image_size=_image_size(config, processor),
            sampling_rate=int(processor.get("sampling_rate") or 16_000),
            min_samples=_min_samples(config, pooled=hasattr(model, "tdnn")),
            mel_bins=mel_bins,
            frames=_number(config, "max_length") if mel_bins else 0,
            feature_size=(_number(config, "input_feat_per_channel", "feature_size", "input_dim",
                                  "feature_projection_input_dim")
                          or int(processor.get("feature_size") or 0) or mel_bins or 80),
            source_positions=_number(config, "max_source_positions") if mel_bins else 0,
            wants_audio_mask=bool(processor.get(
                "return_attention_mask", getattr(config, "feat_extract_norm", "") == "layer")),
        )


def read_optional(root: Path, name: str) -> dict[str, Any]:
    """A JSON object beside the config, or an empty one where it is absent or no object."""
    try:
        value = json.loads((root / name).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(config: Any, *names: str) -> int:
    """The first of these that the config or one of its parts states as a positive integer."""
    parts = [config, *(getattr(config, part, None) for part in
                       ("vision_config", "audio_config", "text_config", "encoder",
                                "encoder_config"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _end(model: Any, vocabulary: int) -> int | None:
    end = getattr(model.config, "eos_token_id", None)
    told = isinstance(end, int) and 0 <= end < vocabulary
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return end if told and decodes else None


def _clip(config: Any) -> int:
    """Stated by the config itself: a part of it may see videos in a model that does not."""
    for name in ("num_frames", "frames_per_clip"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return 0


def _segments(text: Any, tokenizer: dict[str, Any]) -> int:
    size = getattr(text, "type_vocab_size", None)
    if isinstance(size, int) and size > 1:
        return size
    if "token_type_ids" in (tokenizer.get("model_input_names") or ()):
        return max(size if isinstance(size, int) else 1, 1)
    return 0


def _length(text: Any, tokenizer: dict[str, Any]) -> int:
    stated = [_number(text, "max_position_embeddings"), _number(text, "n_positions"),
              _number(text, "max_seq_len")]
    limit = tokenizer.get("model_max_length")
    if isinstance(limit, int | float):
        stated.append(int(min(limit, _UNLIMITED)))
    usable = [s for s in stated if 1 < s < _UNLIMITED]
    return min(usable) if usable else 512


def _timm_input(config: Any) -> tuple[int, ...]:
    """Channels, height and width that a checkpoint of timm was trained with; empty of others."""
    told = getattr(config, TIMM, None)
    size = told.get("input_size") if isinstance(told, dict) else None
    return tuple(int(length) for length in size or ())


def _image_size(config: Any, processor: dict[str, Any]) -> tuple[int, int]:
    candidates: list[Any] = [getattr(config, "image_size", None), _timm_input(config)[1:]]
    candidates.append(getattr(getattr(config, "vision_config", None), "image_size", None))
    candidates += [processor.get("crop_size"), processor.get("size")]
    for value in candidates:
        if isinstance(value, dict):
            value = ((value.get("height"), value.get("width")) if "height" in value
                     else value.get("shortest_edge"))
        if isinstance(value, int) and value > 0:
            return value, value
        if isinstance(value, list | tuple) and len(value) == 2 and all(value):
            return int(value[0]), int(value[1])
    return 224, 224


def _min_samples(config: Any, *, pooled: bool) -> int:
    """Receptive field of the stack of convolutions that turns samples into frames.

    Args:
        pooled: whether dilated convolutions over the frames follow.
    """
    kernels = getattr(config, "conv_kernel", None)
    strides = getattr(config, "conv_stride", None)
    if not kernels or not strides:
        return 1600
    need = 2  # frames: a stack that yields one is traced as if it always did
    if pooled:
        need += sum((kernel - 1) * dilation for kernel, dilation in zip(
            config.tdnn_kernel, config.tdnn_dilation, strict=True))
    for kernel, stride in zip(reversed(list(kernels)), reversed(list(strides)), strict=True):
        need = (need - 1) * stride + kernel
    return int(need)
