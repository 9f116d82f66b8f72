"""AOTInductor packages on the device and instruction set they were compiled for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, UsageError
from . import _torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..artifacts import Artifact

RECORD = "wrapper_metadata.json"

INSTRUCTIONS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}
"""The function of ``torch.cpu`` that tells whether this processor has an instruction set."""


class AOTInductorSession(_torch.ArchiveSession):
    """The package checks nothing by itself: a wrong dtype ends the process, a length beyond the
    range reads out of bounds. Feeds reach it only through the checks of ``Session``, row-major."""

    runtime = "aotinductor"

    def _load(self, path: Path) -> Any:
        import torch._inductor

        return torch._inductor.aoti_load_package(str(path))


class AOTInductor(_torch.ArchiveRuntime):
    formats = ("aotinductor",)
    file = "model.pt2"
    session = AOTInductorSession

    def _require_fit(self, path: Path, device: str, artifact: Artifact) -> None:
        metadata = _torch.archive_record(path, RECORD)
        try:
            record = json.loads(metadata["modelport"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path.name} is no package of this program: its metadata do not say what it is",
                hint="export it again",
            ) from error
        _torch.require_fit(record, device, artifact.format)
        _require_instructions(metadata, record.get("processor") or {})
        if device == "cuda":
            _require_capability(metadata)


def _require_instructions(metadata: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    """Refuse a package for another processor, which would end the process at the first run.

    Args:
        processor: what torch said of the one that it was made on; empty where it said nothing.

    Raises:
        BackendUnavailable: another architecture, or something that the compiler may have used and
            that is missing here.
    """
    import platform

    import torch

    machine = str(metadata.get("AOTI_MACHINE") or platform.machine())
    wanted = str(metadata.get("AOTI_CPU_ISA") or "").split()
    missing = [name for name in wanted if name in INSTRUCTIONS
               and not getattr(torch.cpu, INSTRUCTIONS[name])()]
    here = torch.cpu.get_capabilities() if processor else {}
    # Vectors of SVE are compiled for one length; caches and cores may differ.
    missing += [name for name, value in processor.items()
                if (value is True or name == "sve_max_length") and here.get(name) != value]
    if machine != platform.machine() or missing:
        need = machine if machine != platform.machine() else ", ".join(missing)
        raise BackendUnavailable(
            f"this package was compiled for {need}, which this processor is not or lacks",
            allowed=f"a processor like the one it was made on: {' '.join((machine, *wanted))}",
            hint="modelport export aotinductor on this machine",
        )


def _require_capability(metadata: Mapping[str, Any]) -> None:
    """Refuse a package whose kernels were compiled for another kind of GPU.

    Raises:
        BackendUnavailable: another compute capability.
    """
    import torch

    made_for = str(metadata.get("AOTI_COMPUTE_CAPABILITY") or "")
    major, minor = torch.cuda.get_device_capability()
    here = f"{major}{minor}"
    if made_for not in ("", here):
        raise BackendUnavailable(
            f"this package was compiled for compute capability {made_for}, and this GPU has {here}",
            allowed=f"a GPU of compute capability {made_for}",
            hint="modelport export aotinductor --device cuda on this machine",
        )


RUNTIME = AOTInductor()
