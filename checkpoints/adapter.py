"""The module that is captured: tensors in and out in the spec's order, keywords inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Adapter(torch.nn.Module):
    """Calls a transformers model with keywords and returns a tuple.

    Attributes:
        model: the transformers model; its parameter ``x`` is ``model.x`` in the state dict.
        inputs: names of the positional tensors, in order.
        outputs: names of the returned tensors, in order.
        constants: keyword arguments that are the same in every call.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Sequence[str],
        outputs: Sequence[str],
        constants: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.constants = dict(constants)
        self.train(model.training)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model on one tensor for each of :attr:`inputs`."""
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.constants)
        return tuple(result[name] for name in self.outputs)
