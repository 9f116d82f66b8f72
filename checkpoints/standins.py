"""Modules that wait: each answers what is asked of it in passing, and makes way for the real one.

Decorators, checks of sizes that are plain numbers and ``isinstance`` suffice to import torch's
compiler, its symbolic shapes and sympy, in processes that trace and never need them.
A stand-in answers those few questions as the real module would. Any other makes it import the real
one, tell it what was said so far, and pass everything on to it from then on.

What torch computes without data, and decomposes operators into, is imported for its effect: nobody
asks the module. It comes with the tables it fills, or once an operator is found missing: see
:func:`completed`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Union

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_DYNAMO = "torch._dynamo"
_SETTINGS = f"{_DYNAMO}.config"
_INDEXING, _INDEXES = f"{_DYNAMO}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_SYMPY = "sympy"
_DIMENSIONS = "onnx_ir._symbolic_shapes"
_ASIDE = ("torch.ao", "torch.export", "torch.masked", "torch.nn.intrinsic", "torch.nn.qat",
          "torch.nn.quantizable", "torch.nn.quantized", "torch.optim", "torch.profiler",
          "torch.quantization", "torch.utils.data", "torchgen.model")
"""What torch imports with itself and asks nothing: for training, its own quantisation, schemas."""
_METAS = "torch._meta_registrations"
_TABLES = ("torch._decomp", "torch._refs", "torch._prims")
"""What the module of that name imports, and who looks for an operator's meaning."""
_SEEN = ("2.11.", "2.13.", "2.14.")
"""Versions of torch that are known to import without them; one that doesn't can't try again."""
_PACKAGES = (_DYNAMO, _SYMPY, *_ASIDE, *_TABLES)


class StandIn(types.ModuleType):
    """A module known by its name only; what is asked of it imports it."""

    needs: tuple[str, ...] = ()
    """Modules that the real one is to find imported, not stood in for."""

    def __init__(self, name: str, *needs: str) -> None:
        super().__init__(name)
        self.needs = needs or self.needs
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # whoever looks through all modules
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> types.ModuleType:
        """The real module, told what this one was told."""
        name = self.__name__
        if sys.modules.get(name) is self:
            for needed in self.needs:
                imported(needed)
        if sys.modules.get(name) is self:  # and what it needs did not ask for it
            del sys.modules[name]
            self.tell(importlib.import_module(name))
        return sys.modules[name]

    def tell(self, real: types.ModuleType) -> None:
        """Repeat to the real module what it would have been told."""


def imported(name: str) -> types.ModuleType:
    """The real module of that name."""
    module = importlib.import_module(name)
    return module.real() if isinstance(module, StandIn) else module


class Compiler(StandIn):
    """``torch._dynamo`` as what only decorates knows it."""

    needs = (_SYMPY, _SHAPES, _METAS)

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
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
        if not isinstance(function, (types.FunctionType, types.MethodType)):
            return self.real().disable(function, recursive, **options)  # a module, or a class

        @functools.wraps(function)
        def disabled(*args: Any, **kwargs: Any) -> Any:
            return self.real().disable(function, recursive, **options)(*args, **kwargs)

        return disabled

    def real(self) -> types.ModuleType:
        if sys.modules.get(_DYNAMO) is self:
            sys.modules.pop(_INDEXING, None)
        return super().real()

    def tell(self, real: types.ModuleType) -> None:
        for function in self._allowed:
            real.allow_in_graph(function)
        for function in self._disabled:
            vars(function).pop("__dynamo_disable", None)


class SymbolicShapes(StandIn):
    """``torch.fx.experimental.symbolic_shapes`` where every size is a plain number."""

    needs = (_SYMPY, _METAS)

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # the real one is no package
            raise AttributeError(name)
        known = ANSWERS.get(name)
        if known is None:
            found = f"\ndef {name}(" in self._source and Later(_SHAPES, name)
            return found or super().__getattr__(name)
        plain, answer = known

        def function(*args: Any, **kwargs: Any) -> Any:
            if args and not kwargs and all(map(plain, args)):
                return answer(*args)
            return getattr(self.real(), name)(*args, **kwargs)

        return function

    @functools.cached_property
    def _source(self) -> str:
        place = Path(*sys.modules["torch"].__path__, *_SHAPES.split(".")[1:])
        return place.with_suffix(".py").read_text("utf-8")


def _all_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(size) is int for size in value)


def _itself(value: Any) -> Any:
    return value


_BOOL, _NUMBER = _all_of(bool), _all_of(bool, int, float)

ANSWERS: dict[str, tuple[Callable[[Any], bool], Callable[..., Any]]] = {
    "expect_true": (_BOOL, _itself),
    "guard_or_false": (_BOOL, _itself),
    "guard_or_true": (_BOOL, _itself),
    "guard_size_oblivious": (_BOOL, _itself),
    "statically_known_true": (_BOOL, _itself),
    "sym_and": (_BOOL, lambda *values: all(values)),
    "sym_or": (_BOOL, lambda *values: any(values)),
    "sym_eq": (_sizes, lambda one, other: tuple(one) == tuple(other)),
    "guarding_hint_or_throw": (_all_of(bool, int), _itself),
    "has_guarding_hint": (_NUMBER, lambda _: True),
    "is_nested_int": (_NUMBER, lambda _: False),
}
"""Functions of symbolic shapes: which arguments are plain, and what plain ones make them return."""


class Operators:
    """``torch.ops.prims`` before its operators are defined."""

    def __getattr__(self, name: str) -> Any:
        torch = imported(_METAS).torch
        vars(torch.ops).pop("prims", None)  # the real one comes when it isn't there
        return getattr(torch.ops.prims, name)


class Later:
    """A class or function that is imported once it is used, not when it is named."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._real())

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - for annotations: it is no class

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks what kind of thing it is
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> Any:
        known = vars(imported(self._module))
        if known.get(self._name, self) is self:  # known there by this stand-in, or on demand
            return known["__getattr__"](self._name)
        return known[self._name]


class Sympy(StandIn):
    """``sympy``, of which torch asks whether a number is one of its expressions."""

    def __init__(self) -> None:
        super().__init__(_SYMPY)
        self.Basic = _Basic(_SYMPY, "Basic")


class _Basic(Later):
    """``sympy.Basic`` to whoever asks what is one: nothing, as long as sympy isn't imported."""

    def __instancecheck__(self, value: object) -> bool:
        return not isinstance(sys.modules[_SYMPY], StandIn) and super().__instancecheck__(value)

    def __subclasscheck__(self, kind: type) -> bool:
        return not isinstance(sys.modules[_SYMPY], StandIn) and super().__subclasscheck__(kind)

    def __or__(self, other: Any) -> Any:
        return self._real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real()


class _AlreadyThere(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Parts of a module that came with it while one of them was being looked for."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in sys.modules and name.startswith(tuple(f"{one}." for one in _PACKAGES)):
            return importlib.util.spec_from_loader(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """It was executed already."""


def completed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run again where it stopped at an operator that can't do without data yet.

    torch has most of those operators without :mod:`torch._meta_registrations`; for the others,
    C++ raises.
    """
    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except NotImplementedError:
            if not isinstance(sys.modules.get(_METAS), StandIn):
                raise
        imported(_METAS)
        return function(*args, **kwargs)

    return run


def _attach(name: str, module: types.ModuleType) -> None:
    """Make a module an attribute of its package, as its import would."""
    package, _, short = name.rpartition(".")
    if sys.modules[name] is module:
        setattr(importlib.import_module(package), short, module)


def put() -> None:
    """Import torch, with stand-ins for what it can put off; nothing once its compiler is there."""
    sys.meta_path.insert(0, _AlreadyThere())
    early = {
        **{name: StandIn(name) for name in (*_ASIDE, _METAS)},
        **{name: StandIn(name, _METAS) for name in _TABLES},
    } if "torch" not in sys.modules and version("torch").startswith(_SEEN) else {}
    sys.modules.update(early)
    torch = importlib.import_module("torch")
    for name, module in early.items():
        _attach(name, module)
    if isinstance(sys.modules.get(_METAS), StandIn):
        torch.ops.prims = Operators()
    if _DYNAMO in sys.modules:
        return
    for module in (Sympy(), SymbolicShapes(_SHAPES), StandIn(_DIMENSIONS)):
        sys.modules.setdefault(module.__name__, module)
    _attach(_SHAPES, sys.modules[_SHAPES])
    compiler, indexes = Compiler(), types.ModuleType(_INDEXING)

    def indexing() -> Any:
        compiler.real()
        return getattr(importlib.import_module(_INDEXING), _INDEXES)()

    setattr(indexes, _INDEXES, indexing)
    sys.modules.update({_DYNAMO: compiler, _INDEXING: indexes})
    # Its settings stand alone, and fake tensors read them.
    place = Path(*torch.__path__, "_dynamo", "config.py")
    spec = importlib.util.spec_from_file_location(_SETTINGS, place)
    if place.exists() and spec is not None and spec.loader is not None:
        compiler.config = sys.modules[_SETTINGS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler.config)
