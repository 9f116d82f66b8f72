from __future__ import annotations

import os
import sys
import types
from dataclasses import replace

import pytest
from modelport.runtimes.benchmark import environment


def test_the_digest_is_of_the_machine_and_not_of_its_load():
    found = environment.read()
    assert replace(found, load=(9.0, 9.0, 9.0)).digest == found.digest
    assert replace(found, cpu="another").digest != found.digest
    assert replace(found, packages={**found.packages, "numpy": "0"}).digest != found.digest
    assert found.cores >= 1
    assert found.memory > 1 << 28
    assert found.packages["numpy"]
    assert any(found.cpu in line for line in found.lines())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_processor_time_grows_with_the_work_of_this_process():
    before = environment.processor_time()
    end = os.times().user + 0.2
    while os.times().user < end:
        pass
    assert environment.processor_time()[0] - before[0] >= 0.1


class NvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """The part of NVML that is read, with one card that offers no power reading."""
    module = types.ModuleType("pynvml")

    def no_power(_):
        raise NvmlError

    module.__dict__.update(
        NVMLError=NvmlError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlClocksThrottleReasonGpuIdle=1, nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlClocksThrottleReasonNone=0, nvmlClocksThrottleReasonAll=255,
        nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetName=lambda h: "A card",
        nvmlSystemGetDriverVersion=lambda: b"600.1",
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(total=1 << 33),
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 300_000, nvmlDeviceGetPowerUsage=no_power,
        nvmlDeviceGetClockInfo=lambda h, kind: 1000 * kind,
        nvmlDeviceGetTemperature=lambda h, kind: 45,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: 33,
        nvmlDeviceGetComputeRunningProcesses=lambda h: [
            types.SimpleNamespace(pid=7, usedGpuMemory=12345)])
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_gpu_is_read_through_its_driver(nvml):
    assert environment.gpus() == [
        {"name": "A card", "driver": "600.1", "memory": 1 << 33, "power_limit_watt": 300.0}]
    (reading,) = environment.gpu_readings(7)
    assert reading == {
        "sm_mhz": 1000, "memory_mhz": 2000, "celsius": 45, "watt": None,
        "throttle": ["GpuIdle", "SwThermalSlowdown"], "process_bytes": 12345}
    assert environment.gpu_readings(8)[0]["process_bytes"] is None
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda h: [
        types.SimpleNamespace(pid=7, usedGpuMemory=None)]  # as where a GPU is divided
    assert environment.gpu_readings(7)[0]["process_bytes"] is None


def test_without_a_driver_there_are_no_gpus(nvml, monkeypatch):
    def broken():
        raise NvmlError

    monkeypatch.setattr(nvml, "nvmlInit", broken)
    assert environment.gpus() == environment.gpu_readings(1) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert environment.gpus() == []
