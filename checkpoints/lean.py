"""Importing torch and transformers without what only training needs, and in less time.

``transformers.modeling_utils`` imports every loss, and the losses of detection models import
``scipy.optimize`` for one function: 0.35 s and 25 MB that no export uses. transformers reads the
sources of all its models for their names, twice, 0.2 s each time. And a million objects come into
being that all live on: looking through them for garbage takes 0.8 s.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAVY, _FUNCTION = "scipy.optimize", "linear_sum_assignment"


def collect_rarely() -> None:
    """For a program of our own, whose objects mostly live to its end."""
    gc.set_threshold(100_000, 50, 50)


def preload() -> None:
    """Import ``transformers.modeling_utils``, and with it torch."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with _uncollected(), _deferred(), _scanned_once():
        importlib.import_module("transformers.modeling_utils")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage, and take what there is at the end for what stays."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """Find scipy's function on its first call."""
    if _HEAVY in sys.modules:
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


@contextlib.contextmanager
def _scanned_once() -> Iterator[None]:
    """Let ``transformers.models`` have the names that ``transformers`` has just read and kept."""
    import transformers
    from transformers.utils import import_utils

    home = Path(transformers.__file__).parent / "models"
    scan = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:  # another version, that has other ways
        yield
        return
    import_utils.create_import_structure_from_path = lambda path: scan(
        home if Path(path) == home / "__init__.py" else path)
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = scan
