"""The original module, its layers rounded the way a quantised artifact claims to round them.

Written against torch alone: it shares no code with the transform that makes the artifact, so an
error in either shows as a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..session import Session

PRECISIONS = ("int8-dynamic", "int8-static", "int8-symmetric", "int8-weights", "int4-weights")


def fake(
    opener: Callable[[], Session], facts: Mapping[str, Any], *, rounded_inputs: bool
) -> Callable[[], Session]:
    """Opens the original with the layers that ``facts`` lists as quantised rounded alike.

    Weights: symmetric, 127 levels, a step for each output channel. Inputs: asymmetric, 256
    levels; the range is that of the input at hand (ONNX, DynamicQuantizeLinear) or the one that
    calibration found. Layers with a block: weights in ``bits``, a step for each block of inputs
    that turns its largest magnitude into the lowest level; inputs symmetric, 127 levels, by block.
    """

    def opened() -> Session:
        session = opener()
        module = session._module  # type: ignore[attr-defined]
        ranges = facts.get("ranges", {})
        for name, layer in facts["layers"].items():
            if not layer["kept"]:
                block = layer.get("block")
                hook = _blockwise(block) if block else _rounding(ranges.get(name))
                for owner in _owners(module, name):
                    if block:
                        _round_blocks(owner, layer["transposed"], layer["bits"], block)
                    else:
                        _round(owner, layer["transposed"])
                    if rounded_inputs:
                        owner.register_forward_pre_hook(hook)
        return session

    return opened


def _owners(module: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    """Modules that multiply by a parameter: tied ones share it with an embedding, which keeps it.

    Raises:
        UsageError: the model has no such parameter.
    """
    import torch

    parameters = dict(module.named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise UsageError(f"the manifest names a layer {name}, which the model has not")
    wanted = parameters[name]
    return [m for m in module.modules()
            if getattr(m, "weight", None) is wanted and not isinstance(m, torch.nn.Embedding)]


def _round(owner: torch.nn.Module, transposed: bool) -> None:
    import torch

    weight = owner.weight
    assert isinstance(weight, torch.Tensor)
    axis = 1 if transposed else 0
    real = weight.detach().float()
    step = real.abs().amax(dim=axis, keepdim=True) / 127
    step = torch.where(step > 0, step, torch.ones_like(step))
    rounded = (real / step).round().clamp(-127, 127).to(weight.dtype) * step.to(weight.dtype)
    owner.weight = torch.nn.Parameter(rounded, requires_grad=False)


def _round_blocks(owner: torch.nn.Module, transposed: bool, bits: int, block: int) -> None:
    import torch

    weight = owner.weight
    assert isinstance(weight, torch.Tensor)
    real = weight.detach().float()
    rows = real if transposed else real.T
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    made = torch.empty_like(rows, dtype=weight.dtype)
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block]
        step = part.gather(1, part.abs().argmax(dim=1, keepdim=True)) / lowest
        step = torch.where(step != 0, step, torch.ones_like(step))
        levels = (part / step).round().clamp(lowest, highest)
        made[:, start : start + block] = levels.to(weight.dtype) * step.to(weight.dtype)
    kept = made if transposed else made.T.contiguous()
    owner.weight = torch.nn.Parameter(kept, requires_grad=False)


def _blockwise(block: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    import torch

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = inputs
        parts = []
        for part in torch.split(x, block, dim=-1):
            step = part.abs().amax(dim=-1, keepdim=True) / 127
            step = torch.where(step > 0, step, torch.ones_like(step))
            parts.append((part / step).round() * step)
        return (torch.cat(parts, dim=-1), *rest)

    return hook


def _rounding(limits: tuple[float, float] | None) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = inputs
        low, high = limits or (float(x.min()), float(x.max()))
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        zero = round(-low / step)
        grid = ((x / step).round() + zero).clamp(0, 255)
        return ((grid - zero) * step, *rest)

    return hook
