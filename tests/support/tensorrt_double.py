"""A stand-in for the Python bindings of TensorRT, made from the signatures of each major version.

``load("10")`` and ``load("11")`` give an object to put in place of the module ``tensorrt``. What
the real bindings lack raises: an unknown attribute, a wrong number of arguments, an unknown
keyword, a value of another type, a property that is read-only. Enum members have the names and
values of that version. Every call is recorded.

What calls do is in :mod:`tensorrt_world`: engines are run by ONNX Runtime on the host, addresses
are real, and what a GPU would answer with a crash raises :class:`Misuse`.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = {"10": "10.16.1.11", "11": "11.4.0.106"}
SUBCLASSED = {"ILogger", "IProgressMonitor", "IStreamWriter", "IErrorRecorder", "IProfiler"}
"""Classes that Python code derives from: their methods are the deriving class's to write."""

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Misuse(AssertionError):
    """A call that the signature allows and that would end badly on a GPU."""


class Double:
    """The module. Attributes are the version's classes and ``__version__``.

    Attributes:
        calls: (class, method, arguments by name) of every call, in order; a property that is set
            is recorded as ``name=``.
    """

    def __init__(self, version: str, behaviour: Any = None) -> None:
        data = json.loads((FIXTURES / f"tensorrt-{version}.json").read_text())
        self.__version__ = version
        self.__spec__ = ModuleSpec("tensorrt", None)  # libraries that look for it find it
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.behaviour = behaviour
        self._classes: dict[str, Any] = {}
        for name, members in data["classes"].items():
            if members and all(value.lstrip("-").isdigit() for value in members.values()):
                self._classes[name] = _enumeration(name, members)
        for name, members in data["classes"].items():
            if name not in self._classes:
                self._classes[name] = _class(self, name, members)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_classes"][name]
        except KeyError:
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}") from None

    def called(self, method: str) -> list[dict[str, Any]]:
        """Arguments of every call of ``Class.method``, in order."""
        kind, _, name = method.partition(".")
        return [arguments for k, n, arguments in self.calls if (k, n) == (kind, name)]

    def make(self, kind: str, **state: Any) -> Any:
        """An object of a class that Python code cannot construct itself."""
        made = self._classes[kind].__new__(self._classes[kind])
        made.__dict__.update(state, _ready=True)
        return made


def load(major: str, behaviour: Any = None) -> Double:
    """The double of a major version."""
    return Double(VERSIONS[major], behaviour)


def _enumeration(name: str, members: dict[str, str]) -> type:
    """An enum whose members convert to int and do nothing else that ints do, as in pybind11."""
    return enum.Enum(  # type: ignore[return-value]
        name, {k: int(v) for k, v in members.items()}, type=_Int
    )


class _Int:
    def __int__(self) -> int:
        return int(self.value)  # type: ignore[attr-defined]


def _class(double: Double, name: str, members: dict[str, str]) -> type:
    body: dict[str, Any] = {"__module__": "tensorrt", "_double": double}
    properties: dict[str, bool] = {}
    for member, signature in members.items():
        if signature.startswith("property/"):
            properties[member] = signature.endswith("rw")
            body[member] = _property(double, name, member)
        elif member != "__init__" and "(" in signature and "->" in signature:
            if signature.startswith("static"):
                continue
            body[member] = _method(double, name, member, signature)
    if name in ("ILogger", "Logger"):
        severity = enum.Enum("Severity", {s: i for i, s in enumerate(SEVERITIES)}, type=_Int)
        body |= {"Severity": severity, **{s: severity[s] for s in SEVERITIES}}
    body["__init__"] = _constructor(double, name, members.get("__init__", ""))
    body["__setattr__"] = _setter(double, name, properties)
    return type(name, (), body)


def _constructor(double: Double, name: str, signature: str) -> Callable[..., None]:
    check = _checker(double, f"{name}.__init__", signature) if signature else None

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if check is None:
            raise TypeError(f"{name}: No constructor defined!")
        arguments = check(self, args, kwargs)
        self.__dict__["_ready"] = True
        double.calls.append((name, "__init__", arguments))
        hook = getattr(double.behaviour, f"{name}_init", None)
        if hook is not None:
            hook(self, **arguments)

    return init


def _setter(double: Double, name: str, properties: dict[str, bool]) -> Callable[..., None]:
    def set_attribute(self: Any, attribute: str, value: Any) -> None:
        if attribute in properties:
            _require_ready(self, name)
            if not properties[attribute]:
                raise AttributeError(f"{name}.{attribute} is read-only")
            double.calls.append((name, f"{attribute}=", {"value": value}))
            self.__dict__[f"p_{attribute}"] = value
            hook = getattr(double.behaviour, f"{name}_set_{attribute}", None)
            if hook is not None:
                hook(self, value)
        elif type(self).__module__ == "tensorrt":
            raise AttributeError(f"{name!r} object has no attribute {attribute!r}")
        else:  # a class derived in Python has a dictionary of its own
            self.__dict__[attribute] = value

    return set_attribute


def _property(double: Double, name: str, member: str) -> property:
    def get(self: Any) -> Any:
        _require_ready(self, name)
        hook = getattr(double.behaviour, f"{name}_{member}", None)
        if hook is not None:
            return hook(self)
        if f"p_{member}" in self.__dict__:
            return self.__dict__[f"p_{member}"]
        raise NotImplementedError(f"the double does not say what {name}.{member} is")

    return property(get)


def _method(double: Double, name: str, member: str, signature: str) -> Callable[..., Any]:
    check = _checker(double, f"{name}.{member}", signature)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _require_ready(self, name)
        arguments = check(self, args, kwargs)
        double.calls.append((name, member, arguments))
        hook = getattr(double.behaviour, f"{name}_{member}", None)
        if hook is None:
            raise NotImplementedError(f"the double does not say what {name}.{member}() does")
        return hook(self, **arguments)

    return call


def _require_ready(instance: Any, name: str) -> None:
    if not instance.__dict__.get("_ready"):
        raise TypeError(f"{name}.__init__() must be called when overriding __init__")


Checker = Callable[[Any, tuple[Any, ...], dict[str, Any]], dict[str, Any]]


def _checker(double: Double, label: str, signature: str) -> Checker:
    """Binds arguments to the first overload that takes them."""
    overloads = [_parameters(line) for line in signature.splitlines()]

    def check(instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        reasons = []
        for parameters, types in overloads:
            try:
                bound = parameters.bind(instance, *args, **kwargs)
            except TypeError as error:
                reasons.append(str(error))
                continue
            given = {k: v for k, v in bound.arguments.items() if k != "self"}
            wrong = [k for k, v in given.items() if not _fits(double, types[k], v)]
            if not wrong:
                return given
            reasons.append(", ".join(f"{k} is no {types[k]}: {given[k]!r}" for k in wrong))
        raise TypeError(f"{label}(): incompatible function arguments ({'; '.join(reasons)})")

    return check


def _parameters(line: str) -> tuple[inspect.Signature, dict[str, str]]:
    """``1. f(self: X, a: int, b: str = None) -> bool`` as a signature and types by name."""
    inside = line[line.index("(") + 1 : line.rindex(")") if "->" not in line
                  else line.rindex(")", 0, line.rindex("->"))]
    parameters, types = [], {}
    for part in _split(inside):
        declared, equals, default = part.partition(" = ")
        name, _, kind = declared.partition(":")
        types[name.strip()] = kind.strip()
        if not equals:  # pybind11 allows defaults before it, and they are of no use there
            parameters = [p.replace(default=inspect.Parameter.empty) for p in parameters]
        parameters.append(inspect.Parameter(
            name.strip(), inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=default if equals else inspect.Parameter.empty))
    return inspect.Signature(parameters), types


def _split(text: str) -> list[str]:
    """Split at commas that lie in no bracket."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([<") - (character in ")]>")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [p.strip() for p in (*parts, current) if p.strip()]


def _fits(double: Double, kind: str, value: Any) -> bool:
    """Whether pybind11 would convert a value to a parameter's type."""
    base = re.split(r"[\[.: ]", kind.removeprefix("typing.").removeprefix("typing_extensions."))[0]
    kind_of = double._classes.get(kind.rpartition("::")[2].rpartition(".")[2])
    if value is None:
        return kind_of is not None and not issubclass(kind_of, enum.Enum)
    plain = {"int": int, "bool": bool, "str": str, "tuple": tuple, "list": list}
    if base in plain:
        matches = isinstance(value, plain[base])
        return matches and not (base == "int" and isinstance(value, bool))
    if base == "SupportsFloat":
        return isinstance(value, int | float)
    if base == "Sequence":
        return isinstance(value, list | tuple)
    if base == "Buffer":
        try:
            memoryview(value)
        except TypeError:
            return hasattr(value, "nbytes")
        return True
    if kind == "Dims":  # tuples and lists convert
        return isinstance(value, tuple | list) and all(isinstance(v, int) for v in value)
    if kind_of is not None:
        return isinstance(value, kind_of) or (kind == "ILogger" and
                                              isinstance(value, double._classes["Logger"]))
    return True
