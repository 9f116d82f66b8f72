"""The machine a run was made on; the steady part of it is in every cell's key."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from .records import digest

PACKAGES = (
    "modelport", "numpy", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
         "asimd", "i8mm", "bf16", "sve")
"""Instruction sets that decide which kernels a runtime picks."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Attributes:
        cores: logical cores this process may use; ``physical`` None where unknown.
        memory: bytes of RAM.
        governor: CPU frequency governor, or why there is none to read.
        virtual: whether a hypervisor is below (its neighbours are invisible from here).
        packages: versions of the installed ones among :data:`PACKAGES`.
        gpus: name, memory, driver and fixed limits of each GPU.
        load: load averages over 1, 5 and 15 minutes at the start; not part of the digest.
    """

    system: str
    python: str
    cpu: str
    cores: int
    physical: int | None
    flags: tuple[str, ...]
    memory: int
    governor: str
    virtual: bool
    packages: Mapping[str, str]
    gpus: tuple[Mapping[str, Any], ...] = ()
    load: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))

    @property
    def digest(self) -> str:
        """Identity of the machine and its software; the load is left out."""
        content = asdict(self)
        del content["load"]
        return digest(content)

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        packages = ", ".join(f"{k} {v}" for k, v in self.packages.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory / 2**30:.1f} GiB"
            + (", virtual machine" if self.virtual else ""),
            f"{self.system}, Python {self.python}, governor: {self.governor}",
            *(f"GPU: {g['name']}, {g['memory'] / 2**30:.0f} GiB, driver {g['driver']}"
              for g in self.gpus),
            packages,
            f"load average at the start: {self.load[0]:.2f}",
        )


def read() -> Environment:
    """Read the environment of this machine."""
    info = _cpuinfo()
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=cores(),
        physical=_physical(),
        flags=tuple(f for f in FLAGS if f in info.get("flags", info.get("Features", "")).split()),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        governor=_governor(),
        virtual="hypervisor" in info.get("flags", "").split(),
        packages=_packages(),
        gpus=tuple(gpus()),
        load=os.getloadavg(),
    )


def cores() -> int:
    """Logical cores that this process may use: fewer than there are in a container, say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical() -> int | None:
    import psutil

    return cast("int | None", psutil.cpu_count(logical=False))


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return "not readable"


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor_time() -> tuple[float, float] | None:
    """Seconds that all cores together were busy, and that a hypervisor took, since boot.

    From the first line of ``/proc/stat`` (proc(5)); None where there is none.
    """
    try:
        with Path("/proc/stat").open("r", encoding="ascii") as f:
            fields = [int(v) for v in f.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


def _nvml() -> Any:
    """The initialised NVML module, or None without the package, a driver or a GPU."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpus() -> list[dict[str, Any]]:
    """What does not change about each GPU: name, bytes of memory, driver version, power limit."""
    nvml = _nvml()
    if nvml is None:
        return []
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    found = []
    for i in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(i)
        found.append({
            "name": _text(nvml.nvmlDeviceGetName(handle)), "driver": driver,
            "memory": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            "power_limit_watt": _try(
                nvml, lambda h=handle: nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000),
        })
    return found


def gpu_readings(pid: int) -> list[dict[str, Any]]:
    """Clocks (MHz), temperature (°C), power (W), throttle reasons and this process's bytes, now."""
    nvml = _nvml()
    if nvml is None:
        return []
    return [_reading(nvml, nvml.nvmlDeviceGetHandleByIndex(i), pid)
            for i in range(nvml.nvmlDeviceGetCount())]


def throttles(readings: Iterable[Mapping[str, Any]]) -> str:
    """Why readings say that a GPU slowed down; "" where it did not."""
    found = sorted({why for reading in readings for why in reading.get("throttle") or ()
                    if why != "GpuIdle"})
    return "GPU throttled: " + ", ".join(found) if found else ""


def _reading(nvml: Any, handle: Any, pid: int) -> dict[str, Any]:
    def used() -> int | None:
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == pid and process.usedGpuMemory is not None:  # MIG, WSL: untold
                return int(process.usedGpuMemory)
        return None

    def throttle() -> list[str]:
        mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        prefix = "nvmlClocksThrottleReason"
        named = {n.removeprefix(prefix): getattr(nvml, n) for n in dir(nvml)
                 if n.startswith(prefix)}
        return sorted(n for n, bit in named.items()
                      if isinstance(bit, int) and bit and bit & mask and n not in ("All", "None"))

    clock = nvml.nvmlDeviceGetClockInfo
    return {
        "sm_mhz": _try(nvml, lambda: clock(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": _try(nvml, lambda: clock(handle, nvml.NVML_CLOCK_MEM)),
        "celsius": _try(
            nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "watt": _try(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        "throttle": _try(nvml, throttle),
        "process_bytes": _try(nvml, used),
    }


def _try(nvml: Any, read_one: Any) -> Any:
    """A reading, or None where this GPU or driver does not offer it."""
    try:
        return read_one()
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
