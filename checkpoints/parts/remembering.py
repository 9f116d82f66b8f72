"""A decoder that keeps hidden states instead of keys and values, as one graph: tokens and the
states of those before them in; the logits of the last token, and the states with these, out.

The last of the tokens is the one to be filled in: nothing attends to it but itself. This is how
transformers generates with XLNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...spec import Dim, ModelSpec, TensorSpec
from .. import precise, samples
from . import DECODER, PAST, TOTAL, Part

if TYPE_CHECKING:
    from ..facts import Facts

MEMORY = f"{PAST}_memory_"
"""Before the number of a layer, in the names of the states that go in."""


def part(model: Any, facts: Facts, longest: int) -> Part:
    """The one part of a model whose output has ``mems``.

    Args:
        longest: most positions that the model has; it may keep fewer.
    """
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with precise.kept(model.dtype), torch.no_grad():
        result = model(input_ids=ids, use_mems=True, **filling(ids, model.dtype))
    longest = min(longest, getattr(model.config, "mem_len", None) or longest)
    text = ("batch", "sequence")
    past = tuple(TensorSpec(f"{MEMORY}{i}", facts.dtype, ("batch", PAST, int(state.shape[2])),
                            "features") for i, state in enumerate(result.mems))
    present = (TensorSpec(t.name.replace(PAST, "present"), t.dtype, ("batch", TOTAL, t.shape[2]))
               for t in past)
    tokens = TensorSpec("input_ids", "int64", text, "tokens", high=facts.vocabulary, pad=facts.pad)
    logits = TensorSpec("logits", facts.dtype, ("batch", int(result.logits.shape[-1])))
    dims = {
        "batch": Dim(1, 8, 64),
        "sequence": Dim(1, min(128, longest), longest),
        PAST: Dim(0, min(64, longest - 1), longest - 1),
        TOTAL: Dim(1, min(192, longest), longest),
    }
    spec = ModelSpec((tokens, *past), (logits, *present), dims)
    return Part(DECODER, spec, Remembering(model).eval(), samples.example(spec))


def filling(ids: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What tells the model to fill in the last token of each row, and it alone.

    Returns:
        perm_mask [batch, tokens, tokens], 1 where a token does not see another; target_mapping
        [batch, 1, tokens], 1 where an answer is wanted.
    """
    last = torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1
    row = last.to(dtype)[None, None].expand(ids.shape[0], -1, -1)
    return {"perm_mask": row.expand(-1, ids.shape[1], -1), "target_mapping": row}


class Remembering(torch.nn.Module):
    """Calls the model with states whose first axis is the batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.model(input_ids=ids, mems=[state.transpose(0, 1) for state in past],
                            use_mems=True, **filling(ids, past[0].dtype))
        return (result.logits[:, 0], *(state.transpose(0, 1) for state in result.mems))
