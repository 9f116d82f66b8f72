"""What can be done to Bark without training it, alone and together."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from ..errors import BackendUnavailable
from .attention import fuse
from .setting import complete

if TYPE_CHECKING:
    from pathlib import Path

Attention = Literal["eager", "fused", "flash"]
Precision = Literal["float32", "float16", "bfloat16", "float64"]


@dataclass(frozen=True, slots=True)
class Optimisations:
    """One combination.

    Attributes:
        attention: Bark's own, :func:`~.attention.fuse`, or the package ``flash-attn``.
        precision: of weights and arithmetic; float64 is what the others are held against.
        offload: only the sub-model that is at work is on the device.
    """

    attention: Attention = "eager"
    precision: Precision = "float32"
    offload: bool = False

    @property
    def name(self) -> str:
        parts = {"fused": "fused attention", "flash": "flash attention 2"}.get(self.attention)
        half = None if self.precision == "float32" else self.precision
        chosen = [part for part in (parts, half, "offload" if self.offload else None) if part]
        return " + ".join(chosen) or "no optimisation"

    def unavailable(self, device: str) -> str | None:
        """Why it can't be had on a device here; None when it can."""
        if self.offload and device == "cpu":
            return "offload moves sub-models between an accelerator and the CPU, and this is a CPU"
        if self.offload and find_spec("accelerate") is None:
            return 'accelerate is not installed: pip install "modelport[offload]"'
        if self.attention == "flash" and device == "cpu":
            return "flash-attn has kernels for GPUs only"
        if self.attention == "flash" and find_spec("flash_attn") is None:
            return "flash-attn is not installed: pip install flash-attn"
        return None

    def load(self, root: Path, device: str) -> Any:
        """The model with this combination, in eval mode, its generation config complete.

        Raises:
            BackendUnavailable: see :meth:`unavailable`.
        """
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        import torch
        import transformers

        attention = "flash_attention_2" if self.attention == "flash" else "eager"
        model = transformers.BarkModel.from_pretrained(
            root, dtype=getattr(torch, self.precision), attn_implementation=attention,
            local_files_only=True, use_safetensors=True).eval()
        model.generation_config = complete(model.generation_config)
        if self.attention == "fused":
            fuse(model)
        if self.offload:
            model.enable_cpu_offload()
            return model
        return model.to(device)


def half(device: str) -> Precision:
    """The half precision that a device computes in: CPUs have bfloat16 arithmetic, if any."""
    return "bfloat16" if device == "cpu" else "float16"


def combinations(device: str) -> tuple[Optimisations, ...]:
    """Every combination, nothing first; flash attention only where it can compute (half)."""
    small = half(device)
    attentions: tuple[Attention, ...] = ("eager", "fused")
    precisions: tuple[Precision, ...] = ("float32", small)
    plain = [Optimisations(attention, precision, offload)
             for offload, precision, attention in product((False, True), precisions, attentions)]
    return (*plain, Optimisations("flash", small), Optimisations("flash", small, True))
