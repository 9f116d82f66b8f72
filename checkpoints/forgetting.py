"""Runs that a module is to forget: those that only find something out."""

from __future__ import annotations

import functools
import sys
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_Cached = type(functools.lru_cache(lambda: None))


@contextmanager
def forgotten(model: torch.nn.Module) -> Iterator[None]:
    """What the modules of ``model``, or functions beside them, keep of runs inside is dropped.

    Some keep a table they have computed, in an attribute or an ``lru_cache``; one that was computed
    on tensors without data would be taken for a real one by the next run.
    """
    # Hooks lie in a mapping that their handles know: it is put back as it was, itself.
    before = [(part, [(key, value, dict(value) if isinstance(value, dict) else None)
                      for key, value in vars(part).items()]) for part in model.modules()]
    replaced = _without_caches(model)
    try:
        yield
    finally:
        for home, name, value in replaced:
            setattr(home, name, value)
        for part, attributes in before:
            vars(part).clear()
            for key, value, held in attributes:
                if held is not None:
                    value.clear()
                    value.update(held)
                vars(part)[key] = value


def _without_caches(model: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """Put functions in place of those that cache, where the parts are written; what was there."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__
             if kind.__module__.split(".")[0] not in ("torch", "builtins")}
    homes = {sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules}
    found = []
    for home in (*homes, *kinds):
        for key, value in list(vars(home).items()):
            plain = _plain(value)
            if plain is not None:
                found.append((home, key, value))
                setattr(home, key, plain)
    return found


def _plain(value: Any) -> Any:
    """The function behind a cache, also where a decorator of its own holds the cache."""
    if isinstance(value, staticmethod):
        inner = _plain(value.__func__)
        return staticmethod(inner) if inner is not None else None
    if isinstance(value, _Cached):
        return value.__wrapped__
    cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
    for cell in cells:
        try:
            inner = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(inner, _Cached):
            return inner.__wrapped__
    return None
