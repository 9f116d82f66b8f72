"""The source module itself, run eagerly: the reference that every artifact is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable
from . import CHECKPOINT, Runtime, _torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..session import Session


class TorchEager(Runtime):
    """Precision and attention are the model's: see ``checkpoints.load_reference``."""

    formats = (CHECKPOINT,)
    options: ClassVar[Mapping[str, Any]] = {"threads": 0}

    def unavailable(self, device: str = "cpu") -> str | None:
        return _torch.unavailable(device)

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads`` (0: torch's default). The model must hold its real weights."""
        chosen = self.resolve_options(options)
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        from ..checkpoints import LoadedModel

        assert isinstance(artifact, LoadedModel)
        return TorchSession(artifact, device, chosen["threads"])


class TorchSession(_torch.TensorSession):
    """Runs a module; floating-point feeds are brought to the precision it computes in.

    In float64, its own narrowing to float32 makes neither NaN nor infinity.
    """

    runtime = "torch_eager"

    def __init__(self, model: LoadedModel, device: str, threads: int) -> None:
        import torch

        super().__init__(model.spec, device, threads)
        self._module = model.module.to(device)
        floating = [p.dtype for p in self._module.parameters() if p.dtype.is_floating_point]
        self._float = floating[0] if floating else torch.float32

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_module", None)

    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        from ..checkpoints import precise

        with precise.kept(self._float):
            outputs: Sequence[torch.Tensor] = self._module(*tensors)
        return outputs

    def _tensors(self, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        tensors = super()._tensors(feeds)
        return [t.to(self._float) if t.dtype.is_floating_point else t for t in tensors]


RUNTIME = TorchEager()
