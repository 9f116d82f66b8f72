"""A runtime of known latency, and of known misbehaviour, for the self-test and the tests.

It is no plugin of ``runtimes``: no artifact has its format.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendUnavailable, UsageError
from ...session import Placement, Session
from ...spec import Dim, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

DEFAULTS: Mapping[str, Any] = {
    "latency": 1e-3, "per_token": 0.0, "jitter": 0.0, "between": 0.0, "wait": "spin", "seed": 0,
    "fault": "", "where": "call", "at": 0, "weights": 0, "activations": 0, "spike": 0,
    "device": "", "missing": "", "fallback": 0,
}
SPEC = ModelSpec(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", high=1000, pad=0),
        TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask", high=2),
    ),
    outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
    dims={"batch": Dim(1, 8, 4096), "sequence": Dim(1, 128, 4096)},
)


def open_session(
    path_or_model: str, *, runtime: str | None, device: str, options: Mapping[str, Any]
) -> Session:
    """Open a session that takes as long as ``options`` say.

    Args:
        options: ``latency`` and ``per_token`` in seconds; ``jitter`` and ``between``: standard
            deviation of the logarithm between calls and between processes; ``wait``: spin or
            sleep; ``fault``: "", segfault, abort, kill, hang, memory, error, nan;
            ``where``: open or call, ``at``: number of the call; ``weights``, ``activations``:
            bytes held and touched, ``spike``: bytes touched only while opening;
            ``missing``: why the backend is absent; ``fallback``: of ten nodes, those on the CPU.
    """
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise UsageError(f"the fake runtime has no option {', '.join(unknown)}",
                         allowed=", ".join(DEFAULTS))
    chosen = {**DEFAULTS, **options}
    if chosen["missing"]:
        raise BackendUnavailable(str(chosen["missing"]))
    return FakeSession(chosen, device)


class FakeSession(Session):
    """Waits for a drawn time and returns zeros; ``drawn`` lists the times in seconds."""

    runtime = "fake"

    def __init__(self, options: Mapping[str, Any], device: str = "cpu") -> None:
        super().__init__(SPEC)
        self._options = {**DEFAULTS, **options}
        self._device = device
        self._calls = 0
        self._rng = np.random.default_rng(self._options["seed"])
        process = np.random.default_rng().normal(0, self._options["between"])
        self._latency = self._options["latency"] * math.exp(process)
        self._weights = np.ones(self._options["weights"], np.uint8)
        np.ones(self._options["spike"], np.uint8)
        self.drawn: list[float] = []
        if self._options["where"] == "open":
            misbehave(self._options["fault"])

    def placement(self) -> Placement:
        left = self._options["fallback"]
        return Placement(self._options["device"] or self._device, ("fake",),
                         {"fake": 10 - left, "cpu": left}, {"Gather": left} if left else {})

    def device_seconds(self, launch: Callable[[], None]) -> float:
        launch()
        return self.drawn[-1]

    def device_memory(self) -> tuple[int, int]:
        held = int(self._options["weights"])
        return held, held + (2 << 20)

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._wait(feeds["input_ids"].size)
        logits = np.zeros((len(feeds["input_ids"]), 2), np.float32)
        if self._options["fault"] == "nan":
            logits[0, 0] = np.nan
        return {"logits": logits}

    def _bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        size = feeds["input_ids"].size
        return lambda: self._wait(size)

    def _wait(self, tokens: int) -> None:
        start = time.perf_counter_ns()
        if self._options["where"] == "call" and self._calls == self._options["at"]:
            misbehave(self._options["fault"])
        self._calls += 1
        typical = self._latency + self._options["per_token"] * tokens
        seconds = typical * math.exp(self._rng.normal(0, 1) * self._options["jitter"])
        self.drawn.append(seconds)
        if self._options["activations"]:
            np.ones(self._options["activations"], np.uint8)
        if self._options["wait"] == "sleep":
            time.sleep(seconds)
            return
        end = start + int(seconds * 1e9)
        while time.perf_counter_ns() < end:
            pass


def misbehave(fault: str) -> None:
    """End the process, or never end, in the named way; "" and "nan" do nothing here."""
    if fault == "segfault":
        ctypes.string_at(0)
    elif fault == "abort":
        os.abort()
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(3600)
    elif fault == "memory":
        hoard = []
        while True:
            hoard.append(np.ones(16 << 20, np.uint8))
    elif fault == "error":
        raise RuntimeError("the fake runtime was told to fail")
