"""What a checkpoint becomes: where its bytes lie, and the module whose graph is captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..spec import ModelSpec

Attention = Literal["eager", "sdpa"]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor's little-endian, row-major bytes lie in a safetensors file.

    Attributes:
        file: the safetensors file.
        offset: of the first byte, from the start of the file.
        nbytes: length in bytes.
        dtype: NumPy name, or ``bfloat16``, ``float8_e4m3fn``, ``float8_e5m2``.
        shape: as stored.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Which weights these are; goes into the manifest.

    Attributes:
        model: as the user gave it: hub id, directory, ``demo`` or a bundled architecture.
        revision: commit of a hub model.
        task: the head that was loaded.
        weights: ``random`` when they were drawn from ``seed`` instead of read.
        digest: sha256 over the names and sha256 of the weight files; says *which* weights.
        pickle, remote_code: what the user had to allow to get here.
    """

    model: str
    task: str
    weights: Literal["pretrained", "random"]
    digest: str
    revision: str | None = None
    seed: int | None = None
    pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the local disk; nothing is loaded yet.

    Attributes:
        root: directory with ``config.json`` and, where there is one, the tokenizer.
        tensors: every stored tensor by its name in the checkpoint.
        source: see :class:`Source`.
    """

    root: Path
    tensors: Mapping[str, TensorRef]
    source: Source


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module ready for capture (placeholder weights) or for reference runs (real weights).

    Attributes:
        spec: inputs, outputs and dynamic dimensions.
        module: in eval mode; ``forward(*tensors)`` takes ``spec.inputs`` in order and returns a
            tuple of ``spec.outputs`` in order.
        checkpoint: where it came from.
        weights: for each name in ``module.state_dict()`` that is stored, where its bytes lie.
            Names of tied parameters map to the same reference. Shapes equal the module's; dtypes
            are the checkpoint's and may differ from the module's.
        samples: example feeds with every dynamic dimension at least 2 and all sizes different,
            and padding in the mask.
        sidecars: files to carry along with the artifact (config, tokenizer).
    """

    spec: ModelSpec
    module: torch.nn.Module
    checkpoint: Checkpoint
    weights: Mapping[str, TensorRef]
    samples: Mapping[str, np.ndarray]
    sidecars: tuple[Path, ...] = field(default=())

    @property
    def source(self) -> Source:
        return self.checkpoint.source
