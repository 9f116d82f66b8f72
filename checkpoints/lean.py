"""Importing transformers without what only training needs.

``transformers.modeling_utils`` imports every loss, and the losses of detection models import
``scipy.optimize`` for one function: 0.35 s and 25 MB that no export uses.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAVY, _FUNCTION = "scipy.optimize", "linear_sum_assignment"


def preload() -> None:
    """Import ``transformers.modeling_utils`` with that function found on its first call instead."""
    with _deferred():
        importlib.import_module("transformers.modeling_utils")


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    if _HEAVY in sys.modules or "transformers.modeling_utils" in sys.modules:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(_HEAVY), _FUNCTION)(*args, **kwargs)

    stand_in = types.ModuleType(_HEAVY)
    setattr(stand_in, _FUNCTION, forward)
    sys.modules[_HEAVY] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(_HEAVY) is stand_in:
            del sys.modules[_HEAVY]
