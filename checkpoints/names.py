"""The names in the sources of transformers' models, looked for once for each installation.

transformers reads the sources of all its models at every import to learn what they define: half of
the seconds that its import takes. What it found is kept in the cache, beside converted weights.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import json
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator, Mapping

_SCANNER, _SCAN = "transformers.utils.import_utils", "create_import_structure_from_path"


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Inside, transformers is imported with the names that an earlier import of it found."""
    scanner = sys.modules.get(_SCANNER)
    waiting = _Waiting()
    if scanner is None:
        sys.meta_path.insert(0, waiting)
    else:
        waiting.found(scanner)
    try:
        yield
    finally:
        waiting.leave()


class _Waiting(importlib.abc.MetaPathFinder):
    """Replaces the scan as soon as the module that has it is imported."""

    def __init__(self) -> None:
        self._replaced: tuple[types.ModuleType, Callable[[Any], Any]] | None = None

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == _SCANNER else None
        if spec is None or not isinstance(spec.loader, importlib.abc.Loader):
            return None
        execute = spec.loader.exec_module

        def executed(module: types.ModuleType) -> None:
            execute(module)
            self.found(module)

        vars(spec.loader)["exec_module"] = executed
        return spec

    def found(self, scanner: types.ModuleType) -> None:
        """Answer for the folder of all models; for what is below it, the scan itself does."""
        scan = getattr(scanner, _SCAN, None)
        if scan is None or scanner.__file__ is None:  # another version, that has other ways
            return
        home = Path(scanner.__file__).parents[1] / "models"

        of_all = functools.cache(partial(_of_all, home, scan))

        def answer(path: Any) -> Any:
            return of_all() if Path(path) in (home, home / "__init__.py") else scan(path)

        self._replaced = (scanner, scan)
        setattr(scanner, _SCAN, answer)

    def leave(self) -> None:
        """Let the module be as it was."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._replaced is not None:
            scanner, scan = self._replaced
            setattr(scanner, _SCAN, scan)


def _of_all(home: Path, scan: Callable[[Any], Any]) -> Any:
    """What the scan says of all models, from the cache where it is there."""
    place = _place(home)
    if place is None:
        return scan(home)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # none, or damaged
        if kept := _decoded(json.loads(place.read_bytes())):
            return kept
    from ..artifacts._rename import write_durable

    names = scan(home)
    with contextlib.suppress(OSError):  # a cache that can't be written to
        place.parent.mkdir(parents=True, exist_ok=True)
        write_durable(place, json.dumps(_encoded(names)).encode())
    return names


def _place(home: Path) -> Path | None:
    """Where the names of this installation are kept; None for one whose sources may change.

    An installer writes its record anew each time, and does not list what lies elsewhere.
    """
    from .build import cache_root

    try:
        package = distribution("transformers")
        installed = Path(str(package.locate_file("transformers"))).resolve()
        record = Path(str(package.locate_file(
            f"transformers-{package.version}.dist-info/RECORD"))).stat()
        if installed != home.parent.resolve():
            return None
        key = (str(home), package.version, record.st_mtime_ns, record.st_size,
               home.stat().st_mtime_ns)
    except (PackageNotFoundError, OSError):
        return None
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()
    return cache_root() / "names" / f"{digest[:16]}.json"


def _encoded(found: Mapping[Any, Any]) -> list[Any]:
    """JSON of nested folders whose files' names are grouped by the libraries that they need.

    A folder is a list, in transformers' order: ``[folder, its own list]``, or
    ``[[library, …], {file: [name, …]}]``.
    """
    return [[key, _encoded(value)] if isinstance(key, str)
            else [sorted(key), {file: sorted(names) for file, names in value.items()}]
            for key, value in found.items()]


def _decoded(stored: list[Any]) -> dict[Any, Any]:
    return {key if isinstance(key, str) else frozenset(key):
            _decoded(value) if isinstance(key, str)
            else {file: set(names) for file, names in value.items()}
            for key, value in stored}
