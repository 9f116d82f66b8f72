"""What every module of a running torch model returned, by the scope a tracer would give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _torch

if TYPE_CHECKING:
    import numpy as np


INPUT = " (input)"
"""Follows a scope in the name of what its module was given."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module.

    Attributes:
        scope: ``/model/encoder/layer.0/attention``; the second call of a module ends in ``_1``.
            The trace-based exporter of torch names nodes like this.
        start: how many calls had begun before it; calls come in order of completion.
        weighty: whether it, or a module in it, has parameters.
        shape: of the tensor it returned (of the first, where it returned several).
        several: whether it returned several, so that the first is not the last it computed.
        given: whether it was given a floating-point tensor by position.
    """

    scope: str
    start: int
    weighty: bool
    shape: tuple[int, ...]
    several: bool
    given: bool


@dataclass(frozen=True, slots=True)
class Recording:
    """Calls in order of completion, and the values of those that were asked for."""

    calls: tuple[Call, ...]
    values: Mapping[str, np.ndarray]


def record(run: Callable[[], object], keep: Container[str] | None = None) -> Recording:
    """Run something that calls a torch module, and watch.

    Args:
        run: calls one module, on this thread; the module may call others.
        keep: scopes whose values are wanted; None for all. A scope followed by :data:`INPUT`
            stands for the first tensor the module was given by position.
    """
    from torch.nn.modules import module as hooks

    watch = _Watch(keep)
    before = hooks.register_module_forward_pre_hook(watch.enter)
    after = hooks.register_module_forward_hook(watch.leave)
    try:
        run()
    finally:
        before.remove()
        after.remove()
    return Recording(tuple(watch.calls), watch.values)


class _Watch:
    def __init__(self, keep: Container[str] | None) -> None:
        self.calls: list[Call] = []
        self.values: dict[str, np.ndarray] = {}
        self._keep = keep
        self._names: dict[Any, str] = {}
        self._open: list[tuple[str, str, int, bool]] = []  # name, scope, start, given
        self._seen: Counter[str] = Counter()
        self._started = 0

    def enter(self, module: Any, inputs: object) -> None:
        if not self._open:
            self._names = {m: n for n, m in module.named_modules()}
        name = self._names.get(module, type(module).__name__)
        scope = ""
        if self._open:
            outer, path, *_ = self._open[-1]
            scope = f"{path}/{name.removeprefix(f'{outer}.') if outer else name}"
        count = self._seen[scope]
        self._seen[scope] += 1
        scope = f"{scope}_{count}" if count else scope
        tensors = _tensors(inputs)
        given = bool(tensors) and tensors[0].dtype.is_floating_point
        self._open.append((name, scope, self._started, given))
        self._started += 1
        if given:
            self._keep_value(scope + INPUT, tensors[0])

    def leave(self, module: Any, _inputs: object, output: object) -> None:
        _, scope, start, given = self._open.pop()
        tensors = _tensors(output)
        if not tensors or not tensors[0].dtype.is_floating_point:
            return
        tensor = tensors[0]
        weighty = next(module.parameters(), None) is not None
        self.calls.append(
            Call(scope, start, weighty, tuple(tensor.shape), len(tensors) > 1, given))
        self._keep_value(scope, tensor)

    def _keep_value(self, name: str, tensor: Any) -> None:
        if self._keep is None or name in self._keep:
            # Later modules may write into what this one returned.
            self.values[name] = _torch.to_numpy(tensor.detach().clone())


def _tensors(output: object) -> list[Any]:
    import torch

    inner: Iterable[object] = (output,)
    if isinstance(output, Mapping):
        inner = output.values()
    elif isinstance(output, list | tuple):
        inner = output
    return [v for v in inner if isinstance(v, torch.Tensor)]
