"""The source module through ``torch.compile``, to compare artifacts with; on a GPU, CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable, UsageError
from . import CHECKPOINT, Runtime, _torch
from .torch_eager import TorchSession

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..session import Session

MODES = ("default", "reduce-overhead", "max-autotune")


class TorchCompile(Runtime):
    formats = (CHECKPOINT,)
    options: ClassVar[Mapping[str, Any]] = {"threads": 0, "mode": "default", "dynamic": True}

    def unavailable(self, device: str = "cpu") -> str | None:
        return _torch.unavailable(device) or _torch.no_compiler(device)

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads``; ``mode`` (``default``; ``reduce-overhead``: CUDA graphs on a GPU;
        ``max-autotune``); ``dynamic`` (True: one compilation for all shapes; False: one for each
        shape met). Compilation happens in the first run."""
        chosen = self.resolve_options(options)
        if chosen["mode"] not in MODES:
            raise UsageError(f"mode {chosen['mode']!r} is unknown", allowed=", ".join(MODES))
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        from ..checkpoints import LoadedModel

        assert isinstance(artifact, LoadedModel)
        return TorchCompileSession(artifact, device, chosen)


class TorchCompileSession(TorchSession):
    runtime = "torch_compile"

    def __init__(self, model: LoadedModel, device: str, options: Mapping[str, Any]) -> None:
        super().__init__(model, device, options["threads"])
        self._compiled = _torch.compiled(
            self._module, mode=options["mode"], dynamic=options["dynamic"])

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_compiled", None)

    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        import torch

        mark: Any = torch.compiler.cudagraph_mark_step_begin
        mark()  # the outputs of the run before may be overwritten
        outputs: Sequence[torch.Tensor] = self._compiled(*tensors)
        return outputs


RUNTIME = TorchCompile()
