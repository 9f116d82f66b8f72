"""Importing torch and transformers without what only training needs, and in less time.

``transformers.modeling_utils`` imports every loss, and the losses of detection models import
``scipy.optimize`` for one function: 0.35 s and 25 MB that no export uses. transformers reads the
sources of all its models for their names: see :mod:`.names`. And a million objects come into being
that all live on: looking through them for garbage takes 0.8 s.

In a program of our own two things more are left out that no export by trace uses, 1 s in each of
its processes: torch's compiler, which a decorator suffices to import, and what distributes a model
over processes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import names

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAVY, _FUNCTION = "scipy.optimize", "linear_sum_assignment"
_DYNAMO = "torch._dynamo"
_SETTINGS = f"{_DYNAMO}.config"
_INDEXING, _INDEXES = f"{_DYNAMO}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"

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

    The compiler is there once something asks for it.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    with _uncollected(), _deferred():
        if _own and "transformers" not in sys.modules:
            try:
                _put_off_compiler()
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


class _LazyCompiler(types.ModuleType):
    """``torch._dynamo`` as what only decorates knows it; whatever else is asked for imports it."""

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
        self.__spec__ = importlib.machinery.ModuleSpec(_DYNAMO, None)
        self.config: types.ModuleType
        self._allowed: list[Any] = []
        self._disabled: list[Any] = []

    def allow_in_graph(self, function: Any) -> Any:
        self._allowed.append(function)
        return function

    def assume_constant_result(self, function: Any) -> Any:
        function._dynamo_marked_constant = True  # all that the real one does
        return function

    def disable(self, function: Any = None, recursive: bool = True, **options: Any) -> Any:
        """The function itself for torch, which asks anew on a later call; else what the real one
        makes of it, from the first call on."""
        if function is None:
            return lambda one: self.disable(one, recursive, **options)
        if options.get("wrapping") is False:  # torch._compile, which keeps what it is given
            self._disabled.append(function)
            return function

        @functools.wraps(function)
        def disabled(*args: Any, **kwargs: Any) -> Any:
            return self.real().disable(function, recursive, **options)(*args, **kwargs)

        return disabled

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks through all modules
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> types.ModuleType:
        """The real module, told what this one was told."""
        if sys.modules.get(_DYNAMO) is self:
            for name in (_DYNAMO, _INDEXING):
                sys.modules.pop(name, None)
            real = importlib.import_module(_DYNAMO)
            for function in self._allowed:
                real.allow_in_graph(function)
            for function in self._disabled:
                vars(function).pop("__dynamo_disable", None)
        return sys.modules[_DYNAMO]


class _AlreadyThere(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Parts of ``torch._dynamo`` that came with it while one of them was being looked for."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{_DYNAMO}.") and name in sys.modules:
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """It was executed already."""


def _put_off_compiler() -> None:
    """Let torch's compiler be imported when it is needed, not when something is decorated."""
    importlib.import_module("torch")
    if _DYNAMO in sys.modules:
        return
    lazy, indexes = _LazyCompiler(), types.ModuleType(_INDEXING)

    def indexing() -> Any:
        lazy.real()
        return getattr(importlib.import_module(_INDEXING), _INDEXES)()

    setattr(indexes, _INDEXES, indexing)
    sys.modules.update({_DYNAMO: lazy, _INDEXING: indexes})
    sys.meta_path.insert(0, _AlreadyThere())
    # Its settings stand alone, and fake tensors read them.
    place = Path(*sys.modules["torch"].__path__, "_dynamo", "config.py")
    spec = importlib.util.spec_from_file_location(_SETTINGS, place)
    if place.exists() and spec is not None and spec.loader is not None:
        lazy.config = sys.modules[_SETTINGS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lazy.config)


def _rule_out_distribution() -> None:
    """Tell transformers, for good, that this torch can't distribute: builds differ in that."""
    from transformers import utils
    from transformers.utils import import_utils

    for home in (utils, import_utils):
        if hasattr(home, "is_torch_distributed_available"):
            home.is_torch_distributed_available = lambda: False
