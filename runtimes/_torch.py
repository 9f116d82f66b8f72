"""What every runtime on torch shares: arrays in, arrays out, on one device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable, UsageError
from ..session import Placement, Session
from . import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..spec import ModelSpec


def unavailable(device: str) -> str | None:
    """Why torch cannot run on a device here; None when it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed: pip install torch"
    if device not in ("cpu", "cuda"):
        return f"there is no device {device!r} for torch here; there are cpu, cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    return None


def compiled(module: torch.nn.Module, **options: Any) -> Any:
    """What ``torch.compile`` makes of a module, without the warnings of the compiler's own modules
    when they are first imported."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
        return torch.compile(module, **options)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As ``malloc.h`` has them: bytes at the end of the heap, or in a block of its own, that are given
back."""


def keep_memory() -> None:
    """Let the C library keep what one call frees for the next, in this whole process.

    glibc gives large blocks back to the system, which clears their pages again for the next call:
    290,000 pages in each call of CamemBERT-base in float32 at 32 × 128, which takes 9 % less time
    without (Intel Xeon, 2 cores; at 8 × 128 and below there is no difference). Another C library
    is left alone.
    """
    import ctypes
    import sys

    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


class TensorSession(Session):
    """Runs under ``torch.inference_mode`` with TF32 off; a subclass says what is called.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: 0 leaves torch's number.
    """

    def __init__(self, spec: ModelSpec, device: str, threads: int = 0) -> None:
        import torch

        super().__init__(spec)
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._device = device

    @abstractmethod
    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run once on tensors in the order of the spec's inputs."""

    def placement(self) -> Placement:
        return Placement(self._device, ("torch",))

    def synchronize(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()

    def device_seconds(self, launch: Callable[[], None]) -> float:
        """Time between two events around a launch on torch's current stream; CUDA only."""
        import torch

        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def device_memory(self) -> tuple[int, int]:
        """Peak bytes that torch allocated and reserved; CUDA only."""
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _tensors(self, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        return [to_tensor(feeds[name]).to(self._device) for name in self.spec.input_names]

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            outputs = self._call(self._tensors(feeds))
            return {
                name: to_numpy(value)
                for name, value in zip(self.spec.output_names, outputs, strict=True)
            }

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        import torch

        tensors = self._tensors(feeds)
        if self._device == "cpu":
            keep_memory()

        def launch() -> None:
            with torch.inference_mode():
                self._call(tensors)

        return launch


class ArchiveSession(TensorSession):
    """A program that torch loads from a file; a subclass says how."""

    def __init__(self, spec: ModelSpec, path: Path, device: str, threads: int) -> None:
        super().__init__(spec, device, threads)
        self._program = self._load(path)

    @abstractmethod
    def _load(self, path: Path) -> Any:
        """The file's program, on this session's device."""

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_program", None)

    def _call(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs = self._program(*tensors)
        return (outputs,) if hasattr(outputs, "dtype") else tuple(outputs)


class ArchiveRuntime(Runtime):
    """Opens an archive that says, in a record, what it was made for.

    Attributes:
        file: its name in an artifact.
        session: what runs it.
    """

    options: ClassVar[Mapping[str, Any]] = {"threads": 0}
    file: ClassVar[str]
    session: ClassVar[type[ArchiveSession]]

    @abstractmethod
    def _require_fit(self, path: Path, device: str, artifact: Artifact) -> None:
        """Read the record, and refuse what would not run on ``device`` here.

        Raises:
            UsageError, BackendUnavailable: as :func:`require_fit`.
        """

    def unavailable(self, device: str = "cpu") -> str | None:
        return unavailable(device)

    def require(self, artifact: Artifact, device: str = "cpu") -> None:
        super().require(artifact, device)
        self._require_fit(artifact.root / self.file, device, artifact)

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
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        self.require(artifact, device)
        path = artifact.root / self.file
        return self.session(artifact.spec, path, device, chosen["threads"])


def to_tensor(value: np.ndarray) -> torch.Tensor:
    """A row-major tensor; it shares the array's memory where that is row-major and writable."""
    import numpy as np
    import torch

    value = np.require(value, requirements=["C", "W"])
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """An array of a tensor on any device, bfloat16 included."""
    import torch

    value = value.cpu()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def no_compiler(device: str) -> str | None:
    """Why torch's inductor cannot generate code for a device here; None when it can."""
    import importlib.util
    import os
    import shutil

    if device == "cuda":
        found = importlib.util.find_spec("triton")
        return None if found else "triton is not installed: pip install triton"
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    if any(name and shutil.which(name) for name in candidates):
        return None
    return "there is no C++ compiler here: install g++, or name one in CXX"


def archive_record(path: Path, name: str) -> dict[str, Any]:
    """The JSON record that an exporter put into a torch archive, read without running anything.

    Args:
        path: a zip file, as torch writes them.
        name: how the record's path inside it ends.

    Raises:
        UsageError: not such an archive, or the record is absent or damaged.
        UnsafeError: an archive that torch would not have written, see :mod:`..artifacts.archives`.
    """
    import json
    import zipfile

    from ..artifacts.archives import check_archive

    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith(name))
            found = json.loads(archive.read(member))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path.name} is no archive of this program: it holds no readable {name}",
            hint="export it again",
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{name} in {path.name} is no record", hint="export it again")
    return found


def require_fit(record: Mapping[str, Any], device: str, format: str) -> None:  # noqa: A002
    """Refuse an archive that was made for another device or by a newer torch.

    Raises:
        UsageError: made for another device.
        BackendUnavailable: torch here is older than the one that made it.
    """
    import torch
    from packaging.version import Version

    made_for, made_by = str(record.get("device")), str(record.get("torch"))
    if made_for != device:
        raise UsageError(
            f"this archive was made for {made_for} and cannot run on {device}",
            allowed=f"--device {made_for}",
            hint=f"modelport export {format} --device {device}",
        )
    if Version(torch.__version__).release < Version(made_by).release:
        raise BackendUnavailable(
            f"torch here is {torch.__version__}, older than the {made_by} that made this archive",
            allowed=f"torch {Version(made_by).base_version} or later",
            hint=f'pip install "torch>={Version(made_by).base_version}", or export again with this '
            "one",
        )
