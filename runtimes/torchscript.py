"""TorchScript archives on the device they were made for."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable
from . import Runtime, _torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..session import Session
    from ..spec import ModelSpec

ARCHIVE = "model.pt"
RECORD = "extra/modelport.json"


class TorchScript(Runtime):
    formats = ("torchscript",)
    options: ClassVar[Mapping[str, Any]] = {"threads": 0}

    def unavailable(self, device: str = "cpu") -> str | None:
        if sys.version_info >= (3, 14):
            return "TorchScript does not exist on Python 3.14 and later"
        return _torch.unavailable(device)

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads`` (0: torch's default).

        An archive is a program: the caller has verified its digest. What it was made for is read
        before it is loaded.
        """
        chosen = self.resolve_options(options)
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        path = artifact.root / ARCHIVE
        _torch.require_fit(_torch.archive_record(path, RECORD), device, artifact.format)
        return TorchScriptSession(artifact.spec, path, device, chosen["threads"])


class TorchScriptSession(_torch.TensorSession):
    runtime = "torchscript"

    def __init__(self, spec: ModelSpec, path: Path, device: str, threads: int) -> None:
        import torch

        super().__init__(spec, device, threads)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
            load: Any = torch.jit.load
            self._module = load(str(path), map_location=device)

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_module", None)

    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Any = self._module(*tensors)
        return (outputs,) if hasattr(outputs, "dtype") else tuple(outputs)


RUNTIME = TorchScript()
