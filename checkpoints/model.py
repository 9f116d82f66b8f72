"""What a checkpoint becomes: where its bytes lie, and the module whose graph is captured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    import torch

    from ..spec import ModelSpec

Attention = Literal["eager", "sdpa"]
IN_MEMORY = "module:"
"""Before the name of a module that only the process it lives in can make."""

Dtype = Literal["float32", "float64", "float16", "bfloat16"]


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


class Scan(Protocol):
    """One pass over the weight files, running in the background; reading a property waits for it.

    Attributes:
        digest: sha256 over the sorted (name, sha256) of the files.
        nonfinite: for each stored tensor that holds NaN or infinity, how many.
    """

    @property
    def digest(self) -> str: ...

    @property
    def nonfinite(self) -> Mapping[TensorRef, int]: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the local disk; nothing is loaded yet.

    Attributes:
        root: directory with ``config.json`` and, where there is one, the tokenizer.
        tensors: every stored tensor by its name in the checkpoint.
        origin: :attr:`source`, but for the digest, which is still being computed.
        scan: the pass that computes it.
        make: makes a module that is not transformers' again; None for a transformers model.
    """

    root: Path
    tensors: Mapping[str, TensorRef]
    origin: Source
    scan: Scan = field(compare=False, repr=False)
    make: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    @property
    def task(self) -> str:
        return self.origin.task

    @property
    def own_code(self) -> bool:
        """Whether it is made by Python that is no library's, which no digest here covers."""
        return self.make is not None or self.origin.remote_code

    @property
    def source(self) -> Source:
        """The origin with its digest; waits until the weight files have been hashed."""
        return replace(self.origin, digest=self.scan.digest)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A module ready for capture (placeholder weights) or for reference runs (real weights).

    Attributes:
        spec: inputs, outputs and dynamic dimensions.
        module: in eval mode; ``forward(*tensors)`` takes ``spec.inputs`` in order and returns a
            tuple of ``spec.outputs`` in order. The transformers model is ``module.model``, so its
            parameter ``x`` is ``model.x`` here and in :attr:`weights`.
        checkpoint: where it came from.
        weights: for each name in ``module.state_dict()`` that is stored, where its bytes lie.
            Names of tied parameters map to the same reference. Shapes equal the module's; dtypes
            are the checkpoint's and may differ from the module's. Empty for a reference, which
            holds its weights.
        samples: example feeds with every dynamic dimension at least 2 and all sizes different,
            and padding in the mask.
        sidecars: files to carry along with the artifact (config, tokenizer).
        parts: by name, the parts of a model that is captured as several graphs, each a model of
            its own. The whole then has an empty spec, and its module is the transformers model.
    """

    spec: ModelSpec
    module: torch.nn.Module
    checkpoint: Checkpoint
    weights: Mapping[str, TensorRef]
    samples: Mapping[str, np.ndarray]
    sidecars: tuple[Path, ...] = field(default=())
    parts: Mapping[str, LoadedModel] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """Which weights these are; waits until they have been read once.

        Raises:
            CheckpointError: a tensor the module uses holds NaN or infinity.
        """
        broken = {name: self.checkpoint.scan.nonfinite[ref] for name, ref in self.weights.items()
                  if ref in self.checkpoint.scan.nonfinite}
        if broken:
            first = ", ".join(f"{n.removeprefix('model.')} ({c})" for n, c in
                              sorted(broken.items())[:3])
            more = f" and {len(broken) - 3} more tensors" if len(broken) > 3 else ""
            raise CheckpointError(
                f"the weights hold NaN or infinity: {first}{more}",
                allowed="finite weights: what is made from these can't be compared with anything",
                hint="another revision of the checkpoint, or train it again from a finite one",
            )
        return self.checkpoint.source
