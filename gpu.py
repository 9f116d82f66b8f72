"""The GPU of this machine and its TensorRT: whether they are here, which, and what fits them.

Shared by the side that builds engines and the side that runs them. Only :func:`refusal` and the
records are needed to look at an artifact; nothing here is imported before it is called.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BackendUnavailable, ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

OLDEST, MAJORS = (10, 16), (10, 11)
"""Lowest version and the major versions whose Python bindings the code is checked against."""

READS = {(10, 10), (11, 11), (10, 11)}
"""Major versions of a version-compatible engine and of a runtime that reads it (TensorRT 11.4,
Support Matrix)."""

INSTALL = 'pip install "modelport[tensorrt]"'

DTYPES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64",
    "int32": "INT32", "int8": "INT8", "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip
"""Names of ``tensorrt.DataType`` by NumPy name. ``tensorrt.nptype`` knows no bfloat16."""

EXACT, SAME_CAPABILITY, AMPERE_PLUS = "none", "same-compute-capability", "ampere-plus"
AMPERE = 8.0
"""Lowest compute capability that an ``ampere-plus`` engine runs on."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine is tied to.

    Attributes:
        gpu: product name.
        compute_capability: ``major.minor``.
        driver: version of the NVIDIA driver, or ``unknown``.
        cuda: CUDA version that torch was built with.
        tensorrt: all four numbers.
    """

    gpu: str
    compute_capability: str
    driver: str
    cuda: str
    tensorrt: str

    def target(self, *, version_compatible: bool = False, hardware: str = EXACT) -> dict[str, str]:
        """For the manifest of an engine that is built here."""
        return {
            "device": "cuda",
            "gpu": self.gpu,
            "compute_capability": self.compute_capability,
            "driver": self.driver,
            "cuda": self.cuda,
            "tensorrt": self.tensorrt,
            "version_compatible": "yes" if version_compatible else "no",
            "hardware_compatible": hardware,
        }


def tensorrt() -> Any:
    """The module.

    Raises:
        BackendUnavailable: not installed, its libraries do not load, or a version whose API is not
            the one this was written for.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise BackendUnavailable(
                f"TensorRT is not installed here; install it with {INSTALL}"
            ) from error
        raise _broken(error) from error
    except (OSError, RuntimeError) as error:
        raise _broken(error) from error
    version = _numbers(str(trt.__version__))
    if version[0] not in MAJORS or version[:2] < OLDEST:
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} is not supported; TensorRT 10.16 or later and 11 are, "
            'install one with pip install "tensorrt>=10.16,<12"'
        )
    return trt


def unavailable() -> str | None:
    """Why no engine can be built or run here, in one sentence; None when it can."""
    try:
        tensorrt()
    except BackendUnavailable as error:
        return error.found
    try:
        import torch
    except ImportError:
        return "torch, which holds TensorRT's device memory, is not installed: pip install torch"
    if not torch.cuda.is_available():
        why = ("it was built without CUDA" if torch.version.cuda is None
               else "no GPU, or no driver for it")
        return f"torch sees no CUDA device here ({why}), and TensorRT runs nowhere else"
    return None


def machine() -> Machine:
    """This machine.

    Raises:
        BackendUnavailable: see :func:`unavailable`.
    """
    if reason := unavailable():
        raise BackendUnavailable(reason)
    import torch

    major, minor = torch.cuda.get_device_capability()
    return Machine(
        torch.cuda.get_device_name(), f"{major}.{minor}", driver_version(),
        str(torch.version.cuda), str(tensorrt().__version__),
    )  # fmt: skip


def present() -> bool:
    """Whether the CUDA driver is here and sees a GPU; whatever is built on it is not asked."""
    import ctypes
    import sys

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    found: bool = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0


def driver_version() -> str:
    """Version of the NVIDIA driver, from NVML or the kernel module; ``unknown`` without either."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        try:
            found = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
        return found.decode() if isinstance(found, bytes) else str(found)
    except Exception:  # noqa: BLE001 - an optional package over an optional library
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else "unknown"


def new_stream() -> Any:
    """A CUDA stream of its own; its handle is the attribute ``cuda_stream``."""
    import torch

    make: Any = torch.cuda.Stream  # has no annotations
    return make()


def refusal(target: Mapping[str, str], here: Machine) -> str | None:
    """Why an engine made for ``target`` cannot run here, in one sentence; None when it can.

    TensorRT reads an engine of its exact version on the very GPU it was timed on. A
    version-compatible engine is read by later versions too; hardware compatibility widens the GPUs.
    """
    made, present = target.get("tensorrt", ""), here.tensorrt
    if target.get("version_compatible") == "yes":
        then, now = _numbers(made), _numbers(present)
        if then > now or (then[0], now[0]) not in READS:
            return (f"this version-compatible engine was made by TensorRT {made}, and here is "
                    f"{present}; the same or a later version is needed, of 11 at most")
    elif made != present:
        return f"this engine was made by TensorRT {made or 'unknown'}, and here is {present}"
    capability, hardware = target.get("compute_capability", ""), target.get("hardware_compatible")
    if hardware == AMPERE_PLUS:
        if _capability(here.compute_capability) < AMPERE:
            return (f"this engine runs on compute capability {AMPERE} and later, and the "
                    f"{here.gpu} here has {here.compute_capability}")
        return None
    if capability != here.compute_capability:
        return (f"this engine was made for compute capability {capability or 'unknown'} "
                f"({target.get('gpu', 'unknown GPU')}), and the {here.gpu} here has "
                f"{here.compute_capability}")
    if hardware != SAME_CAPABILITY and target.get("gpu") != here.gpu:
        made_for = target.get("gpu", "an unknown GPU")
        return f"this engine was made for {made_for}, and here is {here.gpu}"
    return None


def logger(trt: Any, lines: list[str]) -> Any:
    """A TensorRT logger that appends ``severity: message`` to ``lines``, verbose ones left out.

    It must outlive every object that was made with it.
    """

    class Log(trt.ILogger):  # type: ignore[misc] # the module is known when it is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name != "VERBOSE":
                lines.append(f"{severity.name.lower()}: {msg}")

    return Log()


def complaints(lines: list[str], limit: int = 5) -> str:
    """The last errors among log lines, or the last warnings, for an error message."""
    for kinds in (("internal_error", "error"), ("warning",)):
        found = [line for line in lines if line.split(":", 1)[0] in kinds]
        if found:
            return "; ".join(found[-limit:])
    return "TensorRT logged no reason"


def parser_errors(parser: Any) -> str:
    """Every error of an ONNX parser, each with the node it is about."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        place = f"node {error.node()}"
        if error.node_operator() or error.node_name():
            place = f"{error.node_operator()} {error.node_name()!r} ({place})"
        found.append(f"{place}: {error.desc()}")
    return "; ".join(found) or "the parser gave no reason"


def refit(trt: Any, engine: Any, log: Any, graph: Path) -> None:
    """Put the weights of an ONNX file into an engine that was stored without them.

    Raises:
        ExportError: the weights are not those the engine was made with.
    """
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)):
        raise ExportError(f"the engine's weights cannot be filled in: {parser_errors(parser)}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:10]) or "none is missing"
        raise ExportError(f"the engine refused its weights (missing: {missing})")


def stream_weights(engine: Any, budget: int = -1) -> None:
    """Say how many bytes of weights stay on the GPU, where some may stay on the host.

    Must come before the first context, which otherwise takes them all.

    Args:
        budget: bytes; -1 leaves it to TensorRT. Ignored by engines built without weight streaming.
    """
    if engine.streamable_weights_size > 0:
        if budget < 0:
            budget = engine.get_weight_streaming_automatic_budget()
        engine.weight_streaming_budget_v2 = budget


def major(trt: Any) -> int:
    """The major version of the module."""
    return _numbers(str(trt.__version__))[0]


def _numbers(version: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:4])
    return found or (0,)


def _capability(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _broken(error: BaseException) -> BackendUnavailable:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BackendUnavailable(
        f"TensorRT is installed but does not load ({first}); install it again with {INSTALL}"
    )
