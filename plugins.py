"""Formats and runtimes are found by file name: dropping a file in is all it takes to add one."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from .errors import UsageError


def names(package: ModuleType) -> tuple[str, ...]:
    """Names of the plugins in a package, without importing any of them.

    A plugin is a public module of the package; packages and names with a leading underscore are
    the package's own business.
    """
    found = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_")))


def load(package: ModuleType, name: str, attribute: str) -> object:
    """Import the plugin ``name`` and return its ``attribute``.

    Raises:
        UsageError: there is no such plugin; the message lists those there are.
    """
    known = names(package)
    kind = package.__name__.rpartition(".")[2]
    if name not in known:
        raise UsageError(f"there is no {name!r} among the {kind}", allowed=", ".join(known))
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), attribute)
