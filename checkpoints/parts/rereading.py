"""A decoder that keeps nothing from token to token, as one graph: the text in; the logits of the
token that comes next, out.

Each step reads the whole text again, as the library's own ``generate`` makes such models do. What
it adds to the text before each step, such as a token to be filled in, is inside the graph.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ...spec import Dim, ModelSpec, TensorSpec
from .. import samples
from . import DECODER, Part

if TYPE_CHECKING:
    from ..facts import Facts

def part(model: Any, facts: Facts, longest: int) -> Part:
    """The one part of a model without a state.

    Args:
        longest: most positions that the model has.
    """
    ids = torch.zeros(2, 2, dtype=torch.int64)
    module = Rereading(model)
    given = module.prepared(ids, torch.ones_like(ids))
    with torch.no_grad():
        vocabulary = int(model(**given).logits.shape[-1])
    text = ("batch", "sequence")
    inputs = [TensorSpec("input_ids", "int64", text, "tokens", high=facts.vocabulary,
                         pad=facts.pad)]
    if "attention_mask" in given:
        inputs.append(TensorSpec("attention_mask", "int64", text, "mask"))
    logits = TensorSpec("logits", facts.dtype, ("batch", vocabulary))
    room = longest - (given["input_ids"].shape[1] - ids.shape[1])
    dims = {"batch": Dim(1, 8, 64), "sequence": Dim(1, min(128, room), room)}
    spec = ModelSpec(tuple(inputs), (logits,), dims)
    return Part(DECODER, spec, module.eval(), samples.example(spec))


class Rereading(torch.nn.Module):
    """Calls a language model as ``generate`` does at its first step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._names = set(inspect.signature(model.forward).parameters)

    def prepared(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        """What the model's own preparation makes of a text; int64 [batch, tokens] each."""
        given = {}
        if mask is not None:  # as generate counts positions: from the first token
            positions = mask.cumsum(-1) - 1
            given = {"attention_mask": mask, "position_ids": torch.where(
                positions < 0, 0, positions)}
            given = {name: given[name] for name in given if name in self._names}
        found = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return (self.model(**self.prepared(ids, mask)).logits[:, -1],)
