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
import functools
import gc
import importlib
import inspect
import re
import sys
import types
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAVY, _FUNCTION = "scipy.optimize", "linear_sum_assignment"

_HUB, _HUB_API = "huggingface_hub", "huggingface_hub.hf_api"
_HUB_NAMES = ("Discussion", "HfApi", "ModelCard", "ModelCardData", "get_repo_discussions",
              "snapshot_download")
"""What transformers imports that talks to a hub, with all the records of its answers."""

_WANTED = ("transformers.modeling_utils", "transformers.masking_utils")
"""What nearly every model's file imports and what decorates functions for the compiler."""

_own = False


def own_process() -> None:
    """For a program of our own: its objects mostly live to its end, and it computes alone."""
    global _own
    _own = True
    gc.set_threshold(100_000, 50, 50)
    inspect.getmodule = _module_of


def preload() -> None:
    """Import ``transformers.modeling_utils``, and with it torch.

    The compiler and symbolic shapes are there once something asks for them.

    Raises:
        BackendUnavailable: one of the two is not installed.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    from . import names, standins  # not for who only asks for help

    with _installed(), _uncollected(), _deferred():
        if _own and "transformers" not in sys.modules:
            try:
                standins.put()
                with names.remembered():
                    _rule_out()
                    for name in _WANTED:
                        importlib.import_module(name)
                _compile_late()
                return
            except (ImportError, AttributeError):  # another version, that wants more of them
                for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
                    del sys.modules[name]
        with names.remembered():
            importlib.import_module("transformers.modeling_utils")


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Say what is missing where torch or transformers is."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise BackendUnavailable(f"{error.name} is not installed",
                                 allowed="an environment with torch and transformers",
                                 hint="pip install torch transformers") from error


_getmodule = inspect.getmodule


def _module_of(object: Any, _filename: str | None = None) -> types.ModuleType | None:  # noqa: A002
    """``inspect.getmodule``, which resolves the paths of all modules to find that of a frame.

    torch asks it for each operator that is defined in Python, where the frame itself knows.
    """
    if inspect.isframe(object):
        found = sys.modules.get(object.f_globals.get("__name__", ""))
        if getattr(found, "__file__", None) == object.f_code.co_filename:
            return found
    return _getmodule(object, _filename)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage, and take what there is at the end for old; in our own, for what stays."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if _own or not gc.get_freeze_count():  # what a user froze stays frozen
            gc.freeze()
            if not _own:
                gc.unfreeze()  # they are among the oldest now, which are looked through last
        gc.enable()


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """Let names of other libraries be imported that are looked for when they are used."""
    from . import standins

    with contextlib.ExitStack() as stack:
        if _HEAVY not in sys.modules:
            stand_in = types.ModuleType(_HEAVY)
            vars(stand_in)[_FUNCTION] = standins.Later(_HEAVY, _FUNCTION)
            stack.enter_context(_lent(sys.modules, {_HEAVY: stand_in}))
        if _own and _HUB_API not in sys.modules:
            hub = importlib.import_module(_HUB)
            names = {name: standins.Later(_HUB, name) for name in _HUB_NAMES}
            stack.enter_context(_lent(vars(hub), names))
        yield


@contextlib.contextmanager
def _lent(place: dict[str, Any], given: dict[str, Any]) -> Iterator[None]:
    """Add what is not there, and take it away again unless something else has come in its place."""
    place.update(given)
    try:
        yield
    finally:
        for name, value in given.items():
            if place.get(name) is value:
                del place[name]


def _rule_out() -> None:
    """Tell transformers, for good, that this torch can't distribute: builds differ in that. And
    that nobody reads what its models' docstrings say of their arguments."""
    from transformers import utils
    from transformers.utils import import_utils

    for home in (utils, import_utils):
        if hasattr(home, "is_torch_distributed_available"):
            home.is_torch_distributed_available = lambda: False
    if hasattr(utils, "auto_docstring"):
        utils.auto_docstring = _undocumented


def _compile_late() -> None:
    """Let transformers compile those of its renamings of weights that it uses.

    With the first model it makes 900 regular expressions, for every architecture.
    """
    loading = sys.modules.get("transformers.core_model_loading")
    if getattr(loading, "re", None) is re:
        vars(loading)["re"] = types.SimpleNamespace(**{**vars(re), "compile": _Expression})


class _Expression:
    """A regular expression, compiled on its first use."""

    def __init__(self, *given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._compiled, name)

    def __deepcopy__(self, _: Any) -> _Expression:
        return self

    @functools.cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(*self._given)


def _undocumented(described: Any = None, **_: Any) -> Any:
    return _undocumented if described is None else described
