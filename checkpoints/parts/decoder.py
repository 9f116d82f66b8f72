"""A decoder as one graph: tokens, mask and past in; logits and the past with these tokens, out.

The past may be empty, so prefill and decode are one graph. Whatever the architecture: its own
forward is called with its own cache class, filled with the graph's inputs.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ...errors import UsageError
from ...spec import Dim, ModelSpec, TensorSpec
from .. import probe, samples
from ..facts import Facts
from . import DECODER, KEEP, PAST, TOTAL, Part, remembering, rereading
from .cache import filled, flat, past_and_present

if TYPE_CHECKING:
    from pathlib import Path

    from ..model import Dtype

def parts(model: Any, root: Path, dtype: Dtype) -> tuple[Part, ...]:
    """The one part of a model that continues a text.

    Raises:
        UsageError: its state is not keys and values of attention.
    """
    facts = Facts.of(model, root, dtype)
    longest = min(facts.length_hint, facts.target_hint)
    try:
        cache, vocabulary = _one_step(model)
    except _NoCache as error:
        if error.state == ("mems",):
            return (remembering.part(model, facts, longest),)
        if error.state:
            raise
        return (rereading.part(model, facts, longest),)
    past, present = past_and_present(cache, dtype)
    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens",
                   high=facts.vocabulary, pad=facts.pad),
        TensorSpec("attention_mask", "int64", ("batch", TOTAL), "mask"),
        TensorSpec(KEEP, "int64", (), "tail", high=3),
        *past,
    )
    logits = TensorSpec("logits", dtype, ("batch", KEEP, vocabulary))
    dims = {
        "batch": Dim(1, 8, 64),
        "sequence": Dim(1, min(128, longest), longest),
        PAST: Dim(0, min(64, longest - 1), longest - 1),
        TOTAL: Dim(1, min(192, longest), longest),
    }
    spec = ModelSpec(inputs, (logits, *present), dims)
    return (Part(DECODER, spec, Decoder(model).eval(), samples.example(spec)),)


class Decoder(torch.nn.Module):
    """Calls a causal language model on flat tensors in the order of the spec."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._names = set(inspect.signature(model.forward).parameters)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # As generate counts them: from the first token that is not padding.
        positions = attention_mask.cumsum(-1) - 1
        positions = torch.where(positions < 0, 0, positions)[:, past[0].shape[2]:]
        asked = torch.arange(input_ids.shape[1], device=input_ids.device)
        # clamp would do, but has no integers below opset 12.
        some = (logits_to_keep > 0) & (logits_to_keep < asked.shape[0])
        asked = asked[torch.where(some, asked.shape[0] - logits_to_keep, 0):]
        given = {"position_ids": positions, KEEP: asked}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask,
                            past_key_values=filled(past), use_cache=True,
                            **{name: given[name] for name in given if name in self._names})
        logits = result.logits if KEEP in self._names else result.logits[:, asked]
        return (logits, *flat(result.past_key_values))


def _one_step(model: Any) -> tuple[Cache, int]:
    """The cache after one token, and the number of logits."""
    return probe.whichever(model, lambda with_data: _run(model))


def _run(model: Any) -> tuple[Cache, int]:
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def step(cache: Cache) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids),
                         past_key_values=cache, use_cache=True)

    try:
        result = step(DynamicCache())
    except Exception:
        if not _other_state(model):
            raise
        raise _NoCache(model, ("layers",)) from None
    cache = getattr(result, "past_key_values", None)
    keys_and_values = isinstance(cache, Cache) and cache.layers and all(
        isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4
        for layer in cache.layers)
    if not keys_and_values:
        raise _NoCache(model, tuple(n for n in _STATES if _holds(getattr(result, n, None))))
    assert cache is not None
    return cache, int(result.logits.shape[-1])


_STATES = ("past_key_values", "mems", "cache_params", "state", "past_buckets_states")
"""Names under which transformers' models return what they keep."""


def _holds(state: Any) -> bool:
    return bool(state.layers) if isinstance(state, Cache) else state is not None


def _other_state(model: Any) -> bool:
    """Whether the cache that the config asks for has layers of more than keys and values."""
    config = model.config.get_text_config(decoder=True)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return any(type(layer) not in plain for layer in DynamicCache(config=config).layers)


class _NoCache(UsageError):
    """There is no key-value cache; ``state`` names what else is kept from token to token."""

    def __init__(self, model: Any, state: tuple[str, ...]) -> None:
        super().__init__(
            f"{type(model).__name__} keeps no keys and values of attention from token to token",
            allowed="decoders with a key-value cache, or without any state",
            hint="--task feature-extraction")
        self.state = state
