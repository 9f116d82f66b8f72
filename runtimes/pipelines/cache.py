"""The cache of a model whose steps are sessions: transformers' own class over a runtime's memory.

A session returns its keys and values as tensors over its own memory, which become the layers of a
``DynamicCache`` and go back in as they are. Whatever the library does to a cache between steps
(reordering for beams, cropping, repeating) it does to these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...checkpoints.parts.cache import filled
from ...errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ...spec import TensorSpec


def past(cache: Any, specs: Sequence[TensorSpec], batch: int, device: str) -> list[torch.Tensor]:
    """The tensors of a cache in the order of a graph's inputs; empty ones where it holds nothing.

    Raises:
        UsageError: a cache of a kind, a shape or a length that the graph does not take.
    """
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    if cache is None or (isinstance(cache, Cache) and _empty(cache)):
        return [torch.empty([batch if d == "batch" else 0 if isinstance(d, str) else d
                             for d in t.shape], dtype=getattr(torch, t.dtype), device=device)
                for t in specs]
    layers = getattr(cache, "layers", ())
    plain = all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in layers)
    if not isinstance(cache, Cache) or not plain:
        raise UsageError(
            f"the cache is a {type(cache).__name__} that another model filled or of a fixed size",
            allowed="cache_implementation unset or 'dynamic', and past_key_values from this model",
        )
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    length = tensors[0].shape[2]
    wanted = [tuple(batch if d == "batch" else length if isinstance(d, str) else d
                    for d in t.shape) for t in specs]
    if [tuple(t.shape) for t in tensors] != wanted:
        raise UsageError(
            f"the cache has {len(layers)} layers of shape {list(tensors[0].shape)}",
            allowed=f"{len(wanted) // 2} layers of shape {list(wanted[0])}",
        )
    return tensors


def keep(cache: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The cache with these keys and values for its layers; a new one where there is none."""
    made = filled(tensors)
    if cache is None:
        return made
    cache.layers = made.layers
    return cache


def _empty(cache: Any) -> bool:
    from transformers.cache_utils import DynamicCache

    return isinstance(cache, DynamicCache) and cache.get_seq_length() == 0
