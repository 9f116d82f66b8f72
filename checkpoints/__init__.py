"""A hub id, a directory or a bundled architecture becomes a :class:`~.model.LoadedModel`.

:func:`resolve` finds the files, :func:`load` builds the module for graph capture without its
weights, :func:`load_reference` builds it with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import cache_root
    from .custom import CustomModel
    from .loader import load, load_reference
    from .model import Checkpoint, Dtype, LoadedModel, Source, TensorRef
    from .resolver import resolve
    from .tokens import feature_extractor, has_tokenizer, tokenize, tokenizer

__all__ = [
    "Checkpoint",
    "CustomModel",
    "Dtype",
    "LoadedModel",
    "Source",
    "TensorRef",
    "cache_root",
    "feature_extractor",
    "has_tokenizer",
    "load",
    "load_reference",
    "resolve",
    "tokenize",
    "tokenizer",
]

_HOME = {"Checkpoint": "model", "LoadedModel": "model", "Source": "model", "TensorRef": "model",
         "cache_root": "build", "CustomModel": "custom",
         "load": "loader", "load_reference": "loader", "resolve": "resolver", "tokenize": "tokens",
         "tokenizer": "tokens", "has_tokenizer": "tokens", "feature_extractor": "tokens",
         "Dtype": "model"}


def __getattr__(name: str) -> Any:
    # On first use: artifacts reads checkpoints.model, and checkpoints.files reads artifacts.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
