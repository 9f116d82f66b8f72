"""``scaled_dot_product_attention`` in place of Bark's own attention, which writes out every score.

transformers has no such class for Bark (``attn_implementation="sdpa"`` raises), so the one method
that computes scores is replaced in each module. Weights, cache and masks stay where they are.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

METHOD = "_attn"


def fuse(model: torch.nn.Module) -> int:
    """Replace the attention of every layer; returns in how many.

    Raises:
        UsageError: the model has no layer of this kind.
    """
    found = [m for m in model.modules() if hasattr(m, METHOD) and hasattr(m, "is_causal")]
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention that can be fused here",
                         allowed="Bark, built with eager attention")
    for module in found:
        setattr(module, METHOD, MethodType(_fused, module))
    return len(found)


def _fused(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """As ``BarkSelfAttention._attn``, but for the weights, which are never made."""
    from torch.nn.functional import scaled_dot_product_attention

    length, total = query.shape[-2], key.shape[-2]
    causal = bool(self.is_causal) and length > 1
    dropout = float(self.attn_dropout.p) if self.training else 0.0
    if causal and (attention_mask is not None or length < total):
        # The kernel's own causal mask begins at the upper left; with a past it must end at the
        # lower right, and it can't be combined with another mask.
        seen = self.bias[:, :, total - length: total, :total]
        attention_mask = _both(seen, attention_mask, query.dtype)
        causal = False
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal)
    return output, None


def _both(
    seen: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """One mask of what may be seen and another, boolean or added to the scores."""
    import torch

    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return seen & mask
    return torch.where(seen, mask, torch.finfo(dtype).min)
