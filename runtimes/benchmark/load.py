"""MLPerf's own load generator drives a session; its verdict is passed on as it is.

The load generator (``mlcommons-loadgen``) decides what is sent and when, and whether the run was
long and quick enough; here queries are only answered. Scenarios: MLPerf Inference Rules, §3.1.
Such a run is no submission to MLPerf: the model, the data and the accuracy are not those it asks
for.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BackendUnavailable
from .corpus import batches
from .records import Load, Traffic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...session import Session
    from ...spec import ModelSpec

    Rows = Sequence[Mapping[str, NDArray[Any]]]

PACKAGE = "mlcommons-loadgen"
QUICKER = 0.7
"""Queries are generated before the run: for calls that take this share of the time seen before it,
because a run that uses them up early is INVALID."""
SERVED = 0.5
"""Queries a second of ``Server``, of those that calls of one sentence would sustain."""
PROBES = 10
REPEATED = 10
LOGS = "mlperf_log_"


def require() -> None:
    """Raise where there is no load generator.

    Raises:
        BackendUnavailable: names the extra.
    """
    try:
        import mlperf_loadgen  # noqa: F401
    except ImportError as e:
        raise BackendUnavailable(f"{PACKAGE} is not installed",
                                 hint='pip install "modelport[loadgen]"') from e


def drive(
    session: Session, rows: Rows, lengths: Sequence[int], traffic: Traffic, *,
    most: int, budget: int, seed: int = 0,
) -> tuple[Load, tuple[float, ...]]:
    """Run one scenario in this process.

    Args:
        rows: feeds of one sentence each.
        lengths: tokens of each sentence.
        most: sentences that are answered in one call at most, but for ``MultiStream``.
        budget: padded tokens of a call of ``Offline`` at most.

    Returns:
        What the load generator says, and the seconds of each call.
    """
    import mlperf_loadgen as generator

    answering = _Answering(session, rows, lengths, traffic, most, budget)
    settings = _settings(traffic, answering, seed)
    with tempfile.TemporaryDirectory() as folder:
        logs = generator.LogSettings()
        logs.log_output.outdir = folder
        logs.enable_trace = False
        system = generator.ConstructFastSUT(answering.issue, lambda: None)
        library = generator.ConstructQSL(len(rows), len(rows), lambda _: None, lambda _: None)
        with answering:
            generator.StartTestWithLogSettings(
                system, library, settings, logs, str(Path(folder, "audit.config")))
        generator.DestroyQSL(library)
        generator.DestroyFastSUT(system)
        found = read_logs(Path(folder))
    return found, tuple(answering.taken)


class _Answering:
    """Answers queries: at once, or for ``Server`` in a thread that takes what has queued up."""

    def __init__(
        self, session: Session, rows: Rows, lengths: Sequence[int], traffic: Traffic, most: int,
        budget: int,
    ) -> None:
        self._session, self._rows, self._lengths = session, rows, lengths
        self._scenario, self._most, self._budget = traffic.scenario, most, budget
        self._per_query = traffic.per_query
        self._waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve)
        self.taken: list[float] = []

    def __enter__(self) -> None:
        if self._scenario == "Server":
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def seconds(self, chosen: Sequence[int]) -> float:
        """Time of one call on these sentences, the second of two."""
        for _ in "12":
            start = time.perf_counter()
            self._session.run(collate(self._session.spec, [self._rows[i] for i in chosen]))
        return time.perf_counter() - start

    def rate(self) -> float:
        """Sentences a second, from one call of typical length; the corpus is sent many times."""
        sent = [*range(len(self._rows))] * REPEATED
        plan = [[sent[place] for place in batch] for batch in self._batches(sent)]
        padded = [len(b) * max(self._lengths[i] for i in b) for b in plan]
        middle = len(plan) // 2
        share: float = padded[middle] / sum(padded)
        return len(sent) * share / self.seconds(plan[middle])

    def issue(self, responses: list[int], indices: list[int]) -> None:
        """What the load generator calls, from a thread of its own."""
        if self._scenario == "Server":
            for pair in zip(responses, indices, strict=True):
                self._waiting.put(pair)
            return
        together = (self._batches(indices) if self._scenario == "Offline"
                    else [list(range(len(indices)))])
        for places in together:
            self._answer([responses[i] for i in places], [indices[i] for i in places])

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Places in ``indices``, as token-budget batching cuts them."""
        lengths = [self._lengths[i] for i in indices]
        cut = batches(lengths, "token-budget", batch=self._most, budget=self._budget)
        return [list(batch.rows) for batch in cut]

    def _serve(self) -> None:
        while (first := self._waiting.get()) is not None:
            taken = [first]
            while len(taken) < self._most and not self._waiting.empty():
                other = self._waiting.get()
                if other is None:
                    self._waiting.put(None)
                    break
                taken.append(other)
            self._answer([r for r, _ in taken], [i for _, i in taken])

    def _answer(self, responses: Sequence[int], indices: Sequence[int]) -> None:
        import mlperf_loadgen as generator

        try:
            start = time.perf_counter_ns()
            self._session.run(collate(self._session.spec, [self._rows[i] for i in indices]))
            self.taken.append((time.perf_counter_ns() - start) * 1e-9)
        except BaseException:  # noqa: BLE001 - the generator would wait for the answer for ever
            traceback.print_exc()
            os._exit(1)
        generator.QuerySamplesComplete(
            [generator.QuerySampleResponse(r, 0, 0) for r in responses])


def _settings(traffic: Traffic, answering: _Answering, seed: int) -> Any:
    import mlperf_loadgen as generator

    found = generator.TestSettings()
    found.scenario = getattr(generator.TestScenario, traffic.scenario)
    found.mode = generator.TestMode.PerformanceOnly
    found.min_duration_ms = int(traffic.seconds * 1e3)
    found.min_query_count = traffic.queries
    found.qsl_rng_seed, found.sample_index_rng_seed, found.schedule_rng_seed = (
        seed + 1, seed + 2, seed + 3)
    count = len(answering._rows)
    if traffic.scenario == "Offline":
        found.offline_expected_qps = answering.rate() / QUICKER
        found.min_query_count = 1
    elif traffic.scenario == "MultiStream":
        found.multi_stream_samples_per_query = traffic.per_query
        together = answering.seconds([i % count for i in range(traffic.per_query)])
        found.multi_stream_expected_latency_ns = int(together * QUICKER * 1e9)
    else:
        every = max(count // PROBES, 1)
        seen = [answering.seconds([i]) for i in range(0, count, every)]
        found.single_stream_expected_latency_ns = int(np.median(seen) * QUICKER * 1e9)
        found.server_target_qps = traffic.rate or SERVED / float(np.mean(seen))
        found.server_target_latency_ns = int(traffic.limit * 1e9)
    return found


def collate(spec: ModelSpec, rows: Rows) -> dict[str, NDArray[Any]]:
    """One batch of sentences, each padded to the longest: tokens with the pad id, the rest with 0.
    """
    if len(rows) == 1:
        return dict(rows[0])
    found = {}
    for tensor in spec.inputs:
        values = [row[tensor.name] for row in rows]
        longest = max(v.shape[1] if v.ndim > 1 else 0 for v in values)
        fill = tensor.pad if tensor.role == "tokens" and tensor.pad is not None else 0
        padded = [
            np.pad(v, [(0, 0), (0, longest - v.shape[1]), *[(0, 0)] * (v.ndim - 2)],
                   constant_values=fill) if v.ndim > 1 and v.shape[1] < longest else v
            for v in values
        ]
        found[tensor.name] = np.concatenate(padded)
    return found


def read_logs(folder: Path) -> Load:
    """The load generator's verdict from the files it wrote."""
    values: dict[str, Any] = {}
    for line in Path(folder, f"{LOGS}detail.txt").read_text("utf-8").splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        values[entry["key"]] = entry["value"]
    figures = {
        key: float(value) for key, value in values.items()
        if key.startswith(("result_", "early_stopping_")) and isinstance(value, (int, float))
    }
    return Load(
        version=version(PACKAGE), valid=values["result_validity"] == "VALID",
        reason=str(values.get("result_invalid_reason", "")).strip(),
        early_stopping=str(values.get("early_stopping_result", "")).strip(), figures=figures,
        settings={k.removeprefix("effective_"): v for k, v in values.items()
                  if k.startswith("effective_")},
        summary=Path(folder, f"{LOGS}summary.txt").read_text("utf-8"),
    )
