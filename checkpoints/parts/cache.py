"""Key-value caches that a graph takes and returns as tensors, key and value in turn by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...spec import TensorSpec
from . import PAST, TOTAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["PAST", "TOTAL", "GivenLayer", "filled", "flat", "past_and_present"]


class GivenLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that starts with these keys and values instead of nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


def filled(tensors: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache of keys and values in turn, layer by layer.

    No layer forgets what has left its window, whatever the model's own cache would do: the mask
    leaves it out.
    """
    cache = DynamicCache()
    cache.layers = [GivenLayer(keys, values)
                    for keys, values in zip(tensors[::2], tensors[1::2], strict=True)]
    return cache


def flat(cache: Cache) -> tuple[torch.Tensor, ...]:
    """The tensors of a cache, in the order of :func:`filled`."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def past_and_present(
    cache: Cache, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs ``past_key_0``, ``past_value_0``, … and outputs ``present_key_0``, … like a cache."""
    past, present = [], []
    for index, tensor in enumerate(flat(cache)):
        name = f"{('key', 'value')[index % 2]}_{index // 2}"
        heads, size = int(tensor.shape[1]), int(tensor.shape[3])
        past.append(TensorSpec(f"past_{name}", dtype, ("batch", heads, PAST, size), "features"))
        present.append(TensorSpec(f"present_{name}", dtype, ("batch", heads, TOTAL, size)))
    return tuple(past), tuple(present)
