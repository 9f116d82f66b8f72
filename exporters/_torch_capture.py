"""What the exporters that start from torch share: named inputs, example tensors, torch.export."""

from __future__ import annotations

import inspect
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ClaimError, ExportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import torch

    from ..checkpoints import LoadedModel
    from ..spec import ModelSpec


def named(module: torch.nn.Module, spec: ModelSpec) -> torch.nn.Module:
    """The module behind a ``forward`` whose parameters have the names of the spec's inputs.

    Torch takes the names of a graph's inputs from there. Floating-point inputs are brought to the
    dtype the module computes in.
    """
    import torch

    floating = [p.dtype for p in module.parameters() if p.dtype.is_floating_point]
    compute = floating[0] if floating else None

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = module
            self.eval()

        def forward(self, *tensors: torch.Tensor) -> Any:
            if compute is not None:
                tensors = tuple(
                    t.to(compute) if t.is_floating_point() and t.dtype != compute else t
                    for t in tensors
                )
            return self.source(*tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *spec.input_names)]
    Named.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Named()


def attention(model: LoadedModel, asked: str) -> str | None:
    """Which attention a module computes: ``eager`` where a model lacks what was asked for, None
    where the module does not say.

    Raises:
        UsageError: another one than the default was asked of a module of the user's own.
    """
    if asked != "sdpa" and model.checkpoint.make is not None:
        raise UsageError(f"--attention {asked} would not change a module of one's own",
                         allowed="the attention that the module has",
                         hint="leave --attention out")
    config = getattr(getattr(model.module, "model", None), "config", None)
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def sample_tensors(
    model: LoadedModel, device: str = "cpu", sizes: Mapping[str, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """The model's example feeds in the spec's order, repeated or cut to other sizes if given."""
    return tuple(
        tensor(array(model, name, sizes)).to(device) for name in model.spec.input_names
    )


def array(model: LoadedModel, name: str, sizes: Mapping[str, int] | None = None) -> np.ndarray:
    """One example feed, repeated or cut to other sizes if given."""
    import numpy as np

    value = model.samples[name]
    spec = next(t for t in model.spec.inputs if t.name == name)
    for axis, dim in enumerate(spec.shape):
        if sizes and isinstance(dim, str):
            value = np.take(value, np.arange(sizes[dim]) % value.shape[axis], axis=axis)
    return value


def tensor(value: np.ndarray) -> torch.Tensor:
    """A torch tensor of an array, bfloat16 included."""
    import torch

    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(value)


def other_sizes(model: LoadedModel) -> dict[str, int]:
    """A size for each input dimension that differs from the example's, where its range allows."""
    from ..checkpoints.samples import sizes

    used = model.spec.check(model.samples)
    return sizes({name: model.spec.dims[name] for name in used}, step=1)


def program(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, ...],
    spec: ModelSpec,
    *,
    ranges: bool = True,
) -> torch.export.ExportedProgram:
    """Capture with ``torch.export``, every dynamic dimension dynamic.

    Sizes of 1 get no code of their own (``backed_size_oblivious``), so that a range may start
    there.

    Args:
        ranges: give each dimension its name and range, and fail where the code asks for another;
            without, only a dimension that comes out fixed fails.

    Raises:
        ExportError: the code asks for another range than a dimension has.
    """
    import torch
    from torch._dynamo.exc import UserError
    from torch.fx.experimental import _config

    config: Any = _config
    dims: dict[str, Any] = {
        name: torch.export.Dim(name, min=dim.min, max=dim.max)
        if ranges
        else torch.export.Dim.DYNAMIC
        for name, dim in spec.dims.items()
        if dim.min < dim.max
    }
    shapes = {
        t.name: {axis: dims[str(d)] for axis, d in enumerate(t.shape) if d in dims}
        for t in spec.inputs
    }
    with quiet(), torch.no_grad(), config.patch(backed_size_oblivious=True):
        try:
            return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
        except UserError as error:
            raise ExportError(_constraint(error)) from error


def _constraint(error: Exception) -> str:
    """What torch.export says of a dimension, without its advice on its own logging."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith("Not all values of")]
    return found[0] if found else lines[0]


def require_outputs(outputs: Any, spec: ModelSpec, sizes: Mapping[str, int]) -> None:
    """Compare outputs that a written file gave at ``sizes`` with the spec.

    Raises:
        ClaimError: another number of outputs, another dtype or another shape.
    """
    import torch

    found = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    if len(found) != len(spec.outputs):
        raise ClaimError(
            f"the file gives {len(found)} outputs",
            allowed=f"{len(spec.outputs)}: {', '.join(spec.output_names)}",
        )
    for want, value in zip(spec.outputs, found, strict=True):
        dtype = str(value.dtype).removeprefix("torch.")
        fits = len(want.shape) == value.ndim and all(
            size == (sizes.get(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(want.shape, value.shape, strict=True)
        )
        if dtype != want.dtype or not fits:
            at = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ClaimError(
                f"output {want.name} is {dtype}{list(value.shape)} at {at}",
                allowed=f"{want.dtype}[{', '.join(map(str, want.shape))}]",
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Capture talks: deprecations, tracer and progress messages that our own report replaces."""
    talkers = ("torch.onnx", "torch.export", "torch.fx", "torch._inductor", "onnxscript")
    loggers = [logging.getLogger(name) for name in talkers]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
