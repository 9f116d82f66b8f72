"""An encoder with a decoder beside it, as three graphs: encoder, cross, decoder.

``cross`` computes what every decoder layer attends to in the encoder's output, once per prompt;
``decoder`` takes it together with the self-attention past, 0 positions or more, so that prefill and
decode are one graph. Whatever the architecture: its own forward is called with its own cache
classes, filled with the graph's inputs.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...errors import UsageError
from ...spec import Dim, ModelSpec, TensorSpec
from .. import inputs, probe, samples
from ..facts import Facts
from . import Part
from .cache import PAST, TOTAL, filled, flat, past_and_present

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ..model import Dtype

MASK = "attention_mask"
POSITIONS = "decoder_position_ids"
CROSS = "cross_"


def parts(model: Any, root: Path, dtype: Dtype) -> tuple[Part, ...]:
    """The encoder, the cross-attention and the decoder of a model that has these.

    Raises:
        UsageError: its decoder's state is not keys and values of attention.
    """
    layout = Layout.of(model)
    encoder = inputs.derive(model.get_encoder(), root, "feature-extraction", dtype).spec
    encoder = replace(encoder, outputs=encoder.outputs[:1])
    decoder = _decoder_spec(layout, encoder, Facts.of(model, root, dtype))
    made = (("encoder", encoder, Encoder(model, encoder.input_names)),
            ("cross", _cross_spec(layout, encoder), Cross(model, layout)),
            ("decoder", decoder, Decoder(model, decoder.input_names, 2 * len(layout.cross))))
    return tuple(Part(name, spec, module.eval(), samples.example(spec))
                 for name, spec, module in made)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that only a run of the decoder tells.

    Attributes:
        vocabulary: number of logits.
        own, cross: caches of the decoder's self-attention and of its attention to the encoder.
        attentions: names of the modules that attend to the encoder, layer by layer.
        width: of what they are called with.
        positions: whether the forward takes the decoder's positions.
    """

    vocabulary: int
    own: Cache
    cross: Cache
    attentions: tuple[str, ...]
    width: int
    positions: bool

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Run the decoder on one token."""
        return probe.whichever(model, lambda with_data: cls._of(model))

    @classmethod
    def _of(cls, model: Any) -> Layout:
        hidden = int(model.get_encoder().config.hidden_size)
        encoded = torch.zeros(1, 2, hidden, dtype=model.dtype)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with _watched(model) as called, torch.no_grad():
            result = model(encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                           decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64),
                           past_key_values=cache, use_cache=True)
        if not called or not flat(cache.cross_attention_cache):
            raise UsageError(
                f"the decoder of {type(model).__name__} keeps no keys and values of the encoder",
                allowed="encoder-decoder models with a key-value cache",
                hint="--task feature-extraction")
        return cls(
            vocabulary=int(result.logits.shape[-1]),
            own=cache.self_attention_cache,
            cross=cache.cross_attention_cache,
            attentions=tuple(called),
            width=next(iter(called.values())),
            positions=POSITIONS in inspect.signature(model.forward).parameters,
        )


@contextlib.contextmanager
def _watched(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Widths of what the modules are called with that attend to something else, by their names."""
    called: dict[str, int] = {}

    def watch(name: str) -> Any:
        def seen(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            if named.get("key_value_states") is not None:
                called[name] = int((given[0] if given else named["hidden_states"]).shape[-1])
        return seen

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True)
               for name, module in model.named_modules()
               if "past_key_values" in inspect.signature(module.forward).parameters
               and "key_value_states" in inspect.signature(module.forward).parameters]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class Encoder(torch.nn.Module):
    """What is encoded, in; the last hidden state, out."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        result = self.model.get_encoder()(**dict(zip(self.names, tensors, strict=True)))
        return (result.last_hidden_state,)


class Cross(torch.nn.Module):
    """The encoder's output in; keys and values of every decoder layer's cross-attention, out.

    The attention modules are called by themselves, because a decoder that was run as a whole would
    leave its layers in the graph wherever one asks for the shape of what came before it.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.names = layout.attentions
        self.width = layout.width

    def forward(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), Cache(layer_class_to_replicate=_TakenLayer))
        query = encoder_hidden_states[:, :1, :1].expand(-1, -1, self.width)
        for name in self.names:
            self.model.get_submodule(name)(
                query, key_value_states=encoder_hidden_states, past_key_values=cache)
        return flat(cache.cross_attention_cache)


class Decoder(torch.nn.Module):
    """Tokens, masks, cross-attention and past in; logits and the past with these tokens, out."""

    def __init__(self, model: Any, names: Sequence[str], cross: int) -> None:
        """``cross``: how many of the inputs are keys and values of the cross-attention."""
        super().__init__()
        self.model = model
        self.names = tuple(n for n in names if not n.startswith((CROSS, f"{PAST}_")))
        self.cross = cross

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named, states = tensors[:len(self.names)], tensors[len(self.names):]
        cross, past = states[:self.cross], states[self.cross:]
        cache = EncoderDecoderCache(filled(past), filled(cross))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        # Of the encoder's output only batch and length are read: its projections are given.
        encoded = BaseModelOutput(last_hidden_state=cross[0][:, 0])
        result = self.model(encoder_outputs=encoded, past_key_values=cache, use_cache=True,
                            **dict(zip(self.names, named, strict=True)))
        return (result.logits, *flat(cache.self_attention_cache))


class _TakenLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer that keeps the first keys and values as they come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True
        return key_states, value_states


def _cross(layout: Layout, source: int | str, dtype: str) -> tuple[TensorSpec, ...]:
    """Keys and values in turn, layer by layer, of an encoder's output of this length."""
    return tuple(
        TensorSpec(f"{CROSS}{('key', 'value')[index % 2]}_{index // 2}", dtype,
                   ("batch", int(tensor.shape[1]), source, int(tensor.shape[3])), "features")
        for index, tensor in enumerate(flat(layout.cross)))


def _cross_spec(layout: Layout, encoder: ModelSpec) -> ModelSpec:
    encoded = replace(encoder.outputs[0], name="encoder_hidden_states", role="features")
    found = _cross(layout, encoded.shape[1], encoded.dtype)
    return ModelSpec((encoded,), tuple(replace(t, role=None) for t in found), encoder.dims)


def _decoder_spec(layout: Layout, encoder: ModelSpec, facts: Facts) -> ModelSpec:
    length = encoder.outputs[0].shape[1]
    source: int | str = "source" if isinstance(length, str) else length
    target, longest = ("batch", "sequence"), facts.target_hint
    past, present = past_and_present(layout.own, facts.dtype)
    inputs = [
        TensorSpec("decoder_input_ids", "int64", target, "tokens", high=facts.vocabulary,
                   pad=facts.pad),
        TensorSpec("decoder_attention_mask", "int64", ("batch", TOTAL), "mask"),
    ]
    if layout.positions:
        inputs.append(TensorSpec(POSITIONS, "int64", target, "positions", high=longest))
    if MASK in encoder.input_names:
        inputs.append(TensorSpec(MASK, "int64", ("batch", source), "mask"))
    logits = TensorSpec("logits", facts.dtype, (*target, layout.vocabulary))
    dims = {
        "batch": encoder.dims["batch"],
        "sequence": Dim(1, 1, longest),
        PAST: Dim(0, min(64, longest - 1), longest - 1),
        TOTAL: Dim(1, min(65, longest), longest),
    }
    if isinstance(length, str):
        dims["source"] = encoder.dims[length]
    states = (*_cross(layout, source, facts.dtype), *past)
    return ModelSpec((*inputs, *states), (logits, *present), dims)
