"""One file per graph transform. ``transforms/x.py`` defines ``TRANSFORM``.

A transform maps an ONNX graph to an ONNX graph. Weights are onnx-ir tensors that stay on disk
(``ir.ExternalTensor``) or are computed when written (``ir.LazyTensor``): a transform never holds
more than one of them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .. import plugins

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class TransformResult:
    """The graph after a transform.

    Attributes:
        model: the new graph (the old one may have been changed in place).
        changed: False when there was nothing to do.
        notes: for the manifest: node counts before and after, what was kept and why.
        target: what the graph is now tied to, if anything (``{"runtime": "onnxruntime"}``).
        precision: what it computes in now, where that is no longer what it was: ``float16``,
            ``bfloat16``, ``int8``, ``int4``. None means equal to before but for summation order.
    """

    model: ir.Model
    changed: bool
    notes: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=dict)
    precision: str | None = None


class Transform(ABC):
    """A named change to a graph that leaves what it computes alone, but for its declared effect.

    Attributes:
        lossy: whether the result is less precise, and so is judged against its own precision.
        measures: whether it runs the graph on ``options["samples"]``, a list of feeds.
        relaxes: whether ``options["keep"]`` makes the result more precise, at some cost.
    """

    lossy: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    relaxes: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def idle(self, model: ir.Model) -> dict[str, Any] | None:
        """Notes on a graph that this transform finds nothing to do in; None where it does.

        Such a graph is carried over as it is, where others of the same artifact are changed.
        """
        return None

    @abstractmethod
    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Apply to a graph.

        Raises:
            UsageError: the graph cannot be transformed (opset too low, already quantised, …).
        """


def names() -> tuple[str, ...]:
    """Every transform, without importing any."""
    return plugins.names(sys.modules[__name__])


def get(name: str) -> Transform:
    """The transform of that name.

    Raises:
        UsageError: no such transform.
    """
    found = plugins.load(sys.modules[__name__], name, "TRANSFORM")
    assert isinstance(found, Transform)
    return found
