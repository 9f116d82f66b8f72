"""One file per runtime. ``runtimes/x.py`` defines ``RUNTIME``, an instance of :class:`Runtime`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from .. import plugins
from ..errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..session import Session
    from ..spec import ModelSpec

CHECKPOINT = "checkpoint"
"""The format of a runtime that runs the source itself: it opens a LoadedModel, not an artifact."""


class Runtime(ABC):
    """Opens artifacts of some formats as sessions.

    Attributes:
        formats: what it can open; :data:`CHECKPOINT` for runtimes of the source model.
        package: what it runs on, as Python imports it.
        suffixes: endings of bare model files it can open without an artifact around them.
        options: option names it accepts, with their defaults.
    """

    formats: ClassVar[tuple[str, ...]]
    package: ClassVar[str] = "torch"
    suffixes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def unavailable(self, device: str = "cpu") -> str | None:
        """Why this runtime cannot be used on ``device`` here, in one sentence; None when it can."""

    def require(self, artifact: Artifact, device: str = "cpu") -> None:
        """Refuse what cannot be run on ``device`` here, by what is known before it is opened.

        Raises:
            BackendUnavailable: the runtime is :meth:`unavailable`, or the artifact was made for
                another machine or runtime.
            UsageError: it was made for another device.
        """
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)

    @abstractmethod
    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Open on a device (``cpu`` or ``cuda``) and read back that it really is there.

        The caller has verified the artifact's digests.

        Raises:
            BackendUnavailable: the package or device is absent, or the runtime fell back.
            UsageError: an unknown option.
        """

    def open_file(
        self,
        path: Path,
        spec: ModelSpec,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Open a bare model file, made by whatever, under a contract taken from elsewhere.

        Raises:
            UsageError: this runtime opens artifacts only.
        """
        raise UsageError(
            f"runtime {self.name} does not open {path.suffix or 'this kind of'} files",
            allowed=", ".join(self.suffixes) or "artifacts",
        )

    def resolve_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """The options given, completed by the defaults.

        Raises:
            UsageError: a name this runtime does not know.
        """
        given = dict(options or {})
        if unknown := sorted(set(given) - set(self.options)):
            raise UsageError(
                f"runtime {self.name} has no option {', '.join(unknown)}",
                allowed=", ".join(self.options) or "none",
            )
        return {**self.options, **given}


def names() -> tuple[str, ...]:
    """Every runtime, without importing any."""
    return plugins.names(sys.modules[__name__])


def get(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UsageError: no such runtime.
    """
    return cast("Runtime", plugins.load(sys.modules[__name__], name, "RUNTIME"))


def for_format(name: str) -> tuple[Runtime, ...]:
    """All runtimes that can open a format, available here or not."""
    return tuple(r for r in map(get, names()) if name in r.formats)
