"""Importing torch and transformers without what only training needs, and in less time.

``transformers.modeling_utils`` imports every loss, and the losses of detection models import
``scipy.optimize`` for one function: 0.35 s and 25 MB that no export uses. transformers reads the
sources of all its models for their names: see :mod:`.names`. And a million objects come into being
that all live on: looking through them for garbage takes 0.8 s.

In a program of our own more is left out that no export by trace uses: what distributes a model over
processes, and torch's compiler, its symbolic shapes and sympy, for which :mod:`.standins` wait.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from . import names, standins

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAVY, _FUNCTION = "scipy.optimize", "linear_sum_assignment"

_WANTED = ("transformers.modeling_utils", "transformers.masking_utils")
"""What nearly every model's file imports and what decorates functions for the compiler."""

_own = False


def own_process() -> None:
    """For a program of our own: its objects mostly live to its end, and it computes alone."""
    global _own
    _own = True
    gc.set_threshold(100_000, 50, 50)


def preload() -> None:
    """Import ``transformers.modeling_utils``, and with it torch.

    The compiler and symbolic shapes are there once something asks for them.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    with _uncollected(), _deferred():
        if _own and "transformers" not in sys.modules:
            try:
                standins.put()
                with names.remembered():
                    _rule_out_distribution()
                    for name in _WANTED:
                        importlib.import_module(name)
                return
            except (ImportError, AttributeError):  # another version, that wants more of them
                for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
                    del sys.modules[name]
        with names.remembered():
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


def _rule_out_distribution() -> None:
    """Tell transformers, for good, that this torch can't distribute: builds differ in that."""
    from transformers import utils
    from transformers.utils import import_utils

    for home in (utils, import_utils):
        if hasattr(home, "is_torch_distributed_available"):
            home.is_torch_distributed_available = lambda: False
