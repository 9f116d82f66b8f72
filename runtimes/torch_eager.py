"""The source module itself, run eagerly: the reference that every artifact is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable
from ..session import Placement, Session
from . import CHECKPOINT, Runtime

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel


class TorchEager(Runtime):
    formats = (CHECKPOINT,)
    options = {"threads": 0}

    def unavailable(self, device: str = "cpu") -> str | None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            return "torch sees no CUDA device here"
        return None

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


class TorchSession(Session):
    """Runs a module under ``torch.inference_mode`` with TF32 off."""

    runtime = "torch_eager"

    def __init__(self, model: LoadedModel, device: str, threads: int) -> None:
        import torch

        super().__init__(model.spec)
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._device = device
        self._module = model.module.to(device)
        floating = [p.dtype for p in self._module.parameters() if p.dtype.is_floating_point]
        self._float = floating[0] if floating else torch.float32

    def placement(self) -> Placement:
        return Placement(self._device, ("torch",))

    def synchronize(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_module", None)

    def _tensors(self, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        import torch

        tensors = [torch.from_numpy(feeds[name]).to(self._device) for name in self.spec.input_names]
        return [t.to(self._float) if t.dtype.is_floating_point else t for t in tensors]

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            outputs = self._module(*self._tensors(feeds))
        return {
            name: _to_numpy(value)
            for name, value in zip(self.spec.output_names, outputs, strict=True)
        }

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Any:
        import torch

        tensors = self._tensors(feeds)

        def launch() -> None:
            with torch.inference_mode():
                self._module(*tensors)

        return launch


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    import torch

    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.cpu().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.cpu().numpy()


RUNTIME = TorchEager()
