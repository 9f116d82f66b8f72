"""AOTInductor packages on the device and instruction set they were compiled for."""

from __future__ import annotations

import json
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

PACKAGE = "model.pt2"
RECORD = "wrapper_metadata.json"

INSTRUCTIONS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}
"""The function of ``torch.cpu`` that tells whether this processor has an instruction set."""


class AOTInductor(Runtime):
    formats = ("aotinductor",)
    options: ClassVar[Mapping[str, Any]] = {"threads": 0}

    def unavailable(self, device: str = "cpu") -> str | None:
        return _torch.unavailable(device)

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads`` (0: torch's default).

        A package is a program: the caller has verified its digest. What it was made for is read
        before it is loaded.
        """
        chosen = self.resolve_options(options)
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        path = artifact.root / PACKAGE
        metadata = _torch.archive_record(path, RECORD)
        _torch.require_fit(json.loads(metadata["modelport"]), device, artifact.format)
        _require_instructions(metadata)
        return AOTInductorSession(artifact.spec, path, device, chosen["threads"])


class AOTInductorSession(_torch.TensorSession):
    """The package checks nothing by itself: a wrong dtype ends the process, a length beyond the
    range reads out of bounds. Feeds reach it only through the checks of ``Session``, row-major."""

    runtime = "aotinductor"

    def __init__(self, spec: ModelSpec, path: Path, device: str, threads: int) -> None:
        import torch._inductor

        super().__init__(spec, device, threads)
        self._package: Any = torch._inductor.aoti_load_package(str(path))

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_package", None)

    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Any = self._package(*tensors)
        return (outputs,) if hasattr(outputs, "dtype") else tuple(outputs)


def _require_instructions(metadata: Mapping[str, Any]) -> None:
    """Refuse a package for another processor, which would end the process at the first run.

    Raises:
        BackendUnavailable: another architecture, or an instruction set that is missing here.
    """
    import platform

    import torch

    machine = str(metadata.get("AOTI_MACHINE") or platform.machine())
    wanted = str(metadata.get("AOTI_CPU_ISA") or "").split()
    missing = [name for name in wanted if name in INSTRUCTIONS
               and not getattr(torch.cpu, INSTRUCTIONS[name])()]
    if machine != platform.machine() or missing:
        need = machine if machine != platform.machine() else ", ".join(missing)
        raise BackendUnavailable(
            f"this package was compiled for {need}, which this processor is not or lacks",
            allowed=f"a processor like the one it was made on: {' '.join((machine, *wanted))}",
            hint="modelport export aotinductor on this machine",
        )


RUNTIME = AOTInductor()
