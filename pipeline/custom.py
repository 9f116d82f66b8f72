"""``modelport.export``: a checkpoint by name, or a module that the caller holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from . import exporting
from .request import ModelRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..artifacts import Artifact
    from ..spec import Dim
    from .request import Notify


@overload
def export(
    what: str,
    source: ModelRequest,
    output: Path,
    options: Any = None,
    *,
    force: bool = False,
    validate: bool = True,
    notify: Notify = lambda _: None,
) -> Artifact: ...


@overload
def export(
    what: torch.nn.Module,
    source: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
    output: Path,
    options: Any = None,
    *,
    format: str = "onnx",
    dims: Mapping[str, Mapping[int, str]] | None = None,
    ranges: Mapping[str, Dim] | None = None,
    force: bool = False,
    validate: bool = True,
    notify: Notify = lambda _: None,
) -> Artifact: ...


def export(
    what: str | torch.nn.Module,
    source: Any,
    output: Path,
    options: Any = None,
    *,
    format: str = "onnx",  # noqa: A002 - the word users know
    dims: Mapping[str, Mapping[int, str]] | None = None,
    ranges: Mapping[str, Dim] | None = None,
    force: bool = False,
    validate: bool = True,
    notify: Notify = lambda _: None,
) -> Artifact:
    """Export a checkpoint or a module, prove it, and place it at ``output``.

    Either ``export("onnx", ModelRequest("demo"), output)``, or
    ``export(module, example_inputs, output, dims={"x": {0: "batch"}})``; what follows is the same,
    see :func:`~.exporting.export`. A module is proven in this process; the manifest says that no
    other one can make it again (``file.py:factory`` is for that).

    Args:
        what: name of a format, or a module.
        source: the model request, or the module's example inputs.
        format, dims, ranges: for a module; see :class:`~..checkpoints.CustomModel`.

    Raises:
        ModelportError: as :func:`~.exporting.export`.
    """
    if isinstance(what, str):
        return exporting.export(what, source, output, options, force=force, validate=validate,
                                notify=notify)
    from ..checkpoints import custom

    name = custom.hold(custom.CustomModel(what, source, dims, ranges or {}))
    return exporting.export(format, ModelRequest(name), output, options, force=force,
                            validate=validate, notify=notify)
