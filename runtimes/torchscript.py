"""TorchScript archives on the device they were made for."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from . import _torch

if TYPE_CHECKING:
    from pathlib import Path

    from ..artifacts import Artifact

RECORD = "extra/modelport.json"


class TorchScriptSession(_torch.ArchiveSession):
    runtime = "torchscript"

    def _load(self, path: Path) -> Any:
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
            load: Any = torch.jit.load
            return load(str(path), map_location=self._device)


class TorchScript(_torch.ArchiveRuntime):
    formats = ("torchscript",)
    file = "model.pt"
    session = TorchScriptSession

    def unavailable(self, device: str = "cpu") -> str | None:
        if sys.version_info >= (3, 14):
            return "TorchScript does not exist on Python 3.14 and later"
        return super().unavailable(device)

    def _require_fit(self, path: Path, device: str, artifact: Artifact) -> None:
        _torch.require_fit(_torch.archive_record(path, RECORD), device, artifact.format)


RUNTIME = TorchScript()
