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
    from collections.abc import Callable, Iterable, Iterator, Mapping

_SCANNER = "transformers.utils.import_utils"
_SCAN, _SPREAD = "create_import_structure_from_path", "spread_import_structure"


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
        self._replaced: tuple[types.ModuleType, dict[str, Any]] | None = None

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
        scan, spread = getattr(scanner, _SCAN, None), getattr(scanner, _SPREAD, None)
        if not scan or not spread or scanner.__file__ is None:  # a version that has other ways
            return
        home = Path(scanner.__file__).parents[1] / "models"

        of_all = functools.cache(partial(_of_all, home, lambda: spread(scan(home))))

        def answer(path: Any) -> Any:
            return of_all() if Path(path) in (home, home / "__init__.py") else scan(path)

        def spread_answer(found: Any) -> Any:
            return dict(found) if isinstance(found, _Spread) else spread(found)

        self._replaced = (scanner, {_SCAN: scan, _SPREAD: spread})
        setattr(scanner, _SCAN, answer)
        setattr(scanner, _SPREAD, spread_answer)

    def leave(self) -> None:
        """Let the module be as it was."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._replaced is not None:
            scanner, replaced = self._replaced
            vars(scanner).update(replaced)


class _Spread(dict[frozenset[str], dict[str, set[str]]]):
    """The names of each file of all models, by the libraries that they need."""


def _of_all(home: Path, scan: Callable[[], Mapping[frozenset[str], Any]]) -> _Spread:
    """What the scan says of all models, from the cache where it is there."""
    place = _place(home)
    if place is None:
        return _Spread(scan())
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # none, or damaged
        if kept := _decoded(json.loads(place.read_bytes())):
            return kept
    from ..artifacts._rename import write_durable

    names = scan()
    with contextlib.suppress(OSError):  # a cache that can't be written to
        place.parent.mkdir(parents=True, exist_ok=True)
        write_durable(place, json.dumps(_encoded(names)).encode())
    return _Spread(names)


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
        key = (_SPREAD, str(home), package.version, record.st_mtime_ns, record.st_size,
               home.stat().st_mtime_ns)
    except (PackageNotFoundError, OSError):
        return None
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()
    return cache_root() / "names" / f"{digest[:16]}.json"


def _encoded(found: Mapping[frozenset[str], Mapping[str, Iterable[str]]]) -> list[Any]:
    """JSON, in transformers' order: ``[[library, …], {file: [name, …]}]`` for each."""
    return [[sorted(libraries), {file: sorted(names) for file, names in files.items()}]
            for libraries, files in found.items()]


def _decoded(stored: list[Any]) -> _Spread:
    return _Spread((frozenset(libraries), {file: set(names) for file, names in files.items()})
                   for libraries, files in stored)
