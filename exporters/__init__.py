"""One file per format. ``exporters/x.py`` defines ``EXPORTER``, an instance of :class:`Exporter`.

The file's name is the format's name on the command line; nothing else lists it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from .. import plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ..artifacts import Artifact, Component
    from ..checkpoints.model import Attention, LoadedModel
    from ..spec import ModelSpec

Options = TypeVar("Options")

NOTIFY: ContextVar[Callable[[str], None]] = ContextVar("notify", default=lambda _: None)
"""Receives short sentences of progress from an export that takes minutes."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a written file says of itself, read back after writing; never copied from the request.

    Attributes:
        spec: inputs, outputs and dynamic dimensions as found in the file; the range of each
            dimension is the model's, since most files cannot carry it.
        facts: format-specific properties for the manifest (opset, IR version, node count, …).
        target: what the file is tied to (device, torch version, instruction set); empty when it
            runs anywhere.
        components: the same of each graph, where there are several.
    """

    spec: ModelSpec
    facts: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, Component] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Derivation:
    """One transform of an artifact into the next.

    Attributes:
        transform: its name among the transforms.
        settings: what the transform is told.
        result: the exporter's options that describe the artifact afterwards.
    """

    transform: str
    settings: Mapping[str, Any]
    result: Any


class Exporter(ABC, Generic[Options]):
    """Turns a loaded model into files.

    Attributes:
        parent: the format this one is built from, or None when it is built from the checkpoint.
        options_type: frozen dataclass; each field is a command-line option. ``metadata`` of a
            field may hold ``help`` and ``choices``.
        notice: what a user of the format should know before choosing it; stated once per export.
        several: whether it can hold a model of several graphs.
    """

    notice: ClassVar[str] = ""
    several: ClassVar[bool] = False
    parent: ClassVar[str | None] = None
    options_type: type[Options]

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """One line for ``modelport export --help``: the first of the module's docstring."""
        return (sys.modules[type(self).__module__].__doc__ or "").strip().splitlines()[0]

    @abstractmethod
    def check(self, options: Options) -> None:
        """Refuse options that cannot work, before any work is done.

        Raises:
            UsageError: with what is allowed.
            BackendUnavailable: a package or device is absent.
        """

    @abstractmethod
    def strategies(self, options: Options) -> tuple[str, ...]:
        """Ways to capture the graph, from cheapest to dearest; tried until one passes parity."""

    def parent_of(self, options: Options) -> str | None:
        """The format to build from, for these options."""
        return self.parent

    def parent_options(self, options: Options) -> Any:
        """Options of the :attr:`parent`'s exporter; asked for where there is a parent."""
        raise NotImplementedError(f"{self.name} has no parent")

    def base(self, options: Options) -> Options:
        """What to export before :meth:`derivations` are applied: the artifact in float32."""
        return options

    def derivations(self, options: Options) -> tuple[Derivation, ...]:
        """Transforms that lead from :meth:`base` to what was asked for, in order."""
        return ()

    def candidates(self, options: Options) -> tuple[Options, ...]:
        """Combinations to build and measure, the most promising first, where the options leave the
        choice to a search; they then have ``objective`` and ``search_seconds``."""
        return ()

    def raised(self, options: Options, opset: int) -> Options | None:
        """The same options at a higher opset; None where they leave no room for one."""
        return None

    def attention(self, options: Options) -> Attention:
        """The attention implementation that the format can express."""
        return "sdpa"

    @abstractmethod
    def export(
        self,
        model: LoadedModel,
        parent: Artifact | None,
        out: Path,
        options: Options,
        strategy: str,
    ) -> None:
        """Write the artifact's files into the empty directory ``out``. Writes nothing else."""

    @abstractmethod
    def read_back(self, model: LoadedModel, out: Path, options: Options) -> Written:
        """Open what was written and compare it with the request.

        Raises:
            ClaimError: opset, dtypes, names or dynamic axes are not what was asked for.
        """


def names() -> tuple[str, ...]:
    """Every format there is an exporter for, without importing any."""
    return plugins.names(sys.modules[__name__])


def get(name: str) -> Exporter[Any]:
    """The exporter of a format.

    Raises:
        UsageError: no such format.
    """
    return cast("Exporter[Any]", plugins.load(sys.modules[__name__], name, "EXPORTER"))
