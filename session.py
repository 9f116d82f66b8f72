"""One way to run a model, whatever runs it.

The base class owns the contract (feeds are checked, a closed session says so); a runtime
implements ``_run``. ``validate/`` and ``runtimes/benchmark/`` receive sessions and never open one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the work really happens, read back from the runtime.

    Attributes:
        device: ``cpu`` or ``cuda``.
        providers: the runtime's own names (execution providers), in order of preference.
        nodes: number of graph nodes on each provider; empty where the runtime has no such notion.
        fallback: of those, the ones left on the CPU although another device was asked for, by
            operator.
    """

    device: str
    providers: tuple[str, ...] = ()
    nodes: Mapping[str, int] = field(default_factory=dict)
    fallback: Mapping[str, int] = field(default_factory=dict)


class Session(ABC):
    """A loaded model that maps named arrays to named arrays.

    Attributes:
        spec: the contract that :meth:`run` checks feeds against.
        runtime: name of the runtime that opened it (``onnxruntime``, ``torch_eager``, …).
    """

    runtime: str

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._closed = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on host arrays.

        Args:
            feeds: one array for each of ``spec.inputs``, of its dtype and shape.

        Returns:
            The outputs by name, on the host, as the runtime produced them.

        Raises:
            SpecError: the feeds do not match the spec.
            UsageError: the session is closed.
        """
        self._check_open()
        self.spec.check(feeds)
        return self._run(feeds)

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once on tensors that lie where the session runs, for steps that feed each other.

        The caller keeps to the spec: nothing is checked here. A runtime that can reads the tensors
        in place and returns its own memory as tensors; this one goes through the host.
        """
        import torch

        self._check_open()
        outputs = self._run({name: value.numpy(force=True) for name, value in feeds.items()})
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    def bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Place feeds where the runtime reads them and return a launch for timing.

        The returned callable runs the model once on the bound inputs and leaves outputs where the
        runtime puts them; on a device it may return before the work is done (:meth:`synchronize`).
        """
        self._check_open()
        self.spec.check(feeds)
        return self._bind(feeds)

    def synchronize(self) -> None:
        """Return once all launched work is done. A host runtime has nothing to wait for."""

    @abstractmethod
    def placement(self) -> Placement:
        """Where the graph really runs."""

    def close(self) -> None:
        """Release the model. Closing twice is allowed."""
        self._closed = True

    @abstractmethod
    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        held = dict(feeds)

        def launch() -> None:
            self._run(held)

        return launch

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this session is closed", hint="open the artifact again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
