"""What a module takes and returns, derived from its forward, its config and one abstract run.

The table here is keyed by the *name of an input*, which transformers keeps across architectures;
no architecture is named.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..spec import Dim, ModelSpec, TensorSpec
from . import probe, samples
from .facts import Facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from .model import Dtype

_TEXT = ("batch", "sequence")


def _tokens(
    name: str, facts: Facts, dims: tuple[str, ...], end: int | None = None
) -> TensorSpec:
    return TensorSpec(name, "int64", dims, "tokens", high=facts.vocabulary, pad=facts.pad, end=end)


def _waveform(facts: Facts) -> TensorSpec:
    if facts.mel_bins and facts.frames:  # a spectrogram under the waveform's name
        return TensorSpec("input_values", facts.dtype, ("batch", facts.frames, facts.mel_bins),
                          "features")
    return TensorSpec("input_values", facts.dtype, ("batch", "samples"), "waveform")


def _pixels(name: str, facts: Facts) -> TensorSpec:
    clip = (facts.clip,) if facts.clip else ()
    shape = ("batch", *clip, facts.channels, *facts.image_size)
    return TensorSpec(name, facts.dtype, shape, "pixels")


def _features(facts: Facts) -> TensorSpec:
    if facts.source_positions:  # two frames a position: fixed length, bins first
        shape: tuple[int | str, ...] = ("batch", facts.mel_bins or 80, 2 * facts.source_positions)
    else:
        shape = ("batch", "frames", facts.feature_size)
    return TensorSpec("input_features", facts.dtype, shape, "features")


def _mask(facts: Facts) -> TensorSpec:
    dims = _TEXT if facts.text else ("batch", "samples" if facts.waveform else "frames")
    return TensorSpec("attention_mask", "int64", dims, "mask")


KNOWN: Mapping[str, Callable[[Facts], TensorSpec]] = {
    "input_ids": lambda f: _tokens("input_ids", f, _TEXT, f.end),
    "attention_mask": _mask,
    "token_type_ids": lambda f: TensorSpec(
        "token_type_ids", "int64", _TEXT, "segments", high=f.segments or 1),
    "bbox": lambda f: TensorSpec("bbox", "int64", (*_TEXT, 4), "boxes", high=f.box_positions),
    "pixel_values": lambda f: _pixels("pixel_values", f),
    "pixel_values_videos": lambda f: _pixels("pixel_values_videos", f),
    "input_values": _waveform,
    "input_features": _features,
    "global_attention_mask": lambda f: TensorSpec(
        "global_attention_mask", "int64", _TEXT, "flags", high=2),
    "decoder_input_ids": lambda f: _tokens("decoder_input_ids", f, ("batch", "target")),
}
"""How to make an input of that name from what is known of the model."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A module with its contract and example feeds for it."""

    spec: ModelSpec
    module: torch.nn.Module
    samples: Mapping[str, np.ndarray]


def derive(
    model: torch.nn.Module,
    root: Path,
    task: str,
    dtype: Dtype,
    dims: Mapping[str, Dim] | None = None,
) -> Derived:
    """Find the inputs, outputs and dimension ranges of a transformers model.

    Outputs are those of its ModelOutput but for caches and per-layer states. A dimension of an
    output is the input dimension it follows, a constant, or a named dimension of its own
    (``frames``) where it follows one by a rule such as a strided convolution's.

    Raises:
        UsageError: the forward needs inputs that can't be derived.
    """
    from .adapter import Adapter

    facts = Facts.of(model, root, dtype)
    parameters = _parameters(model)
    constants: dict[str, Any] = {}
    if "use_cache" in parameters:
        constants["use_cache"] = False
    failures: list[str] = []
    for names in _candidates(model, facts, parameters, root):
        inputs = tuple(_shaped(KNOWN[name](facts), task) for name in names)
        ranges = _ranges(model, inputs, facts)
        try:
            outputs, extra = probe.outputs(model, inputs, ranges, constants)
        except probe.ForwardFailed as error:
            failures.append(f"with {', '.join(names)}: {error}")
            continue
        ranges = {**ranges, **extra, **{k: v for k, v in (dims or {}).items() if k in ranges}}
        spec = ModelSpec(inputs, outputs, ranges)
        module = Adapter(model, spec.input_names, spec.output_names, constants)
        return Derived(spec, module.eval(), samples.example(spec))
    raise UsageError(
        f"{type(model).__name__} can't be run on inputs derived from its config; {failures[-1]}",
        allowed="models that take " + ", ".join(KNOWN), hint="another --task")


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(model.forward).parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _candidates(
    model: torch.nn.Module, facts: Facts, parameters: Mapping[str, inspect.Parameter], root: Path
) -> Sequence[tuple[str, ...]]:
    """Sets of inputs to try, smallest first, each in the forward's order."""
    required = [n for n, p in parameters.items() if p.default is p.empty]
    unknown = [n for n in required if n not in KNOWN]
    if unknown:
        raise UsageError(
            f"{type(model).__name__} needs inputs that can't be derived: {', '.join(unknown)}",
            allowed="models that take " + ", ".join(KNOWN), hint="another --task")
    first = {*required}
    if facts.main_input in parameters and facts.main_input in KNOWN:
        first.add(facts.main_input)
    if "attention_mask" in parameters and (facts.text or facts.wants_audio_mask):
        first.add("attention_mask")
    if "token_type_ids" in parameters and facts.segments:
        first.add("token_type_ids")
    if "bbox" in parameters and facts.box_positions:
        first.add("bbox")
    optional = [n for n in parameters if n in KNOWN and n not in first
                and n not in ("token_type_ids", "bbox", "attention_mask")]
    sets = [first, *(first | {name} for name in optional), first | set(optional)]
    result: list[tuple[str, ...]] = []
    for names in sets:
        ordered = tuple(n for n in parameters if n in names)
        if ordered and ordered not in result:
            result.append(ordered)
    if not result:
        raise UsageError(f"none of the inputs of {type(model).__name__} is known: "
                         + ", ".join(parameters), allowed=", ".join(KNOWN), hint="another --task")
    return result


def _shaped(tensor: TensorSpec, task: str) -> TensorSpec:
    if task == "multiple-choice" and tensor.shape[:1] == ("batch",):
        return replace(tensor, shape=("batch", "choices", *tensor.shape[1:]))
    return tensor


def _ranges(
    model: torch.nn.Module, inputs: tuple[TensorSpec, ...], facts: Facts
) -> dict[str, Dim]:
    used = dict.fromkeys(d for t in inputs for d in t.shape if isinstance(d, str))
    found: dict[str, Dim] = {}
    for name in used:
        if name == "batch":
            found[name] = Dim(1, 8, 64)
        elif name == "choices":
            found[name] = Dim(2, 4, 16)
        elif name == "samples":
            found[name] = Dim(facts.min_samples, max(facts.sampling_rate, facts.min_samples),
                              max(10 * facts.sampling_rate, facts.min_samples))
        elif name == "sequence":
            longest = probe.longest(model, inputs, facts.length_hint)
            found[name] = Dim(1, min(128, longest), longest)
        else:
            longest = {"target": facts.target_hint, "frames": facts.frames_hint}.get(
                name, facts.length_hint)
            found[name] = Dim(1, min(128, longest), longest)
    return found


