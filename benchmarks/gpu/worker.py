"""The measured process of one variant: open it, go through shapes or sentences, write one file.

    python worker.py JOB.json RESULT.json

It says ``ready`` on stdout once everything is imported and waits for a line on stdin, so that the
next process starts up while the one before it is measured, and neither disturbs the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CALLS = 20
"""Launches in a row whose time on the host is taken: less than a stream's queue holds."""
LONG = 2e-3
"""Seconds of a call that the host does not hold up; then one launch tells as much."""


def main(job_path: Path, result_path: Path) -> None:
    import torch
    from modelport import checkpoints, pipeline, runtimes
    from modelport.runtimes.benchmark.environment import gpu_readings
    from modelport.runtimes.benchmark.records import Sampling, write_json

    job = json.loads(job_path.read_text("utf-8"))
    device = job["device"]
    model = None
    if job["artifact"] is None:
        request = pipeline.ModelRequest(job["model"], task=job["task"])
        model = checkpoints.load_reference(
            request.resolve(), dtype=job["dtype"], attention="sdpa"
        )
    print("ready", flush=True)
    sys.stdin.readline()

    start = time.perf_counter()
    if model is not None:
        session = runtimes.get(job["runtime"]).open(model, device, job["options"])
    else:
        _, session = pipeline.open_artifact(
            Path(job["artifact"]), runtime=job["runtime"], device=device, options=job["options"]
        )
    torch.backends.cuda.matmul.allow_tf32 = job["tf32"]
    opened = time.perf_counter() - start
    plan = Sampling(warmup=3, samples=30, min_samples=11, seconds=job["seconds"])
    with session:
        placement = session.placement()
        cells = [_cell(session, batch, sequence, plan, job) for batch, sequence in job["shapes"]]
        passes = [_pass(session, **p) for p in job["passes"]]
        readings = gpu_readings(os.getpid()) if device == "cuda" else []
        memory = {
            "allocated": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            "reserved": torch.cuda.max_memory_reserved() if device == "cuda" else None,
            "driver": [r.get("process_bytes") for r in readings],
        }
    write_json(result_path, {
        "status": "ok", "opened": opened, "cells": cells, "passes": passes, "memory": memory,
        "gpu": readings,
        "providers": placement.providers, "nodes": dict(placement.nodes),
        "fallback": dict(placement.fallback),
    })


def _pass(session: Any, sentences: int, order: str, batch: int) -> dict[str, Any]:
    """All sentences once, from host arrays to host arrays, in batches."""
    from modelport.runtimes.benchmark import built_in, feeds
    from modelport.runtimes.benchmark.corpus import batches

    source = built_in(0, sentences)
    plan = batches(source.lengths, order, batch=batch)
    data = [feeds.draw(session.spec, len(b.rows), b.length, seed=i,
                       lengths=[source.lengths[row] for row in b.rows])
            for i, b in enumerate(plan)]  # fmt: skip
    for given in data[:: max(len(data) // 8, 1)]:
        session.run(given)
    start = time.perf_counter()
    for given in data:
        session.run(given)
    seconds = time.perf_counter() - start
    return {"order": order, "batch": batch, "sentences": sentences, "seconds": seconds,
            "padding": 1 - sum(source.lengths) / sum(b.padded for b in plan)}  # fmt: skip


def _cell(
    session: Any, batch: int, sequence: int, plan: Any, job: dict[str, Any]
) -> dict[str, Any]:
    """Everything that is measured at one shape."""
    from modelport.runtimes.benchmark import feeds
    from modelport.runtimes.benchmark.cell import inner_loop, sample
    from modelport.runtimes.benchmark.records import Sampling

    data = feeds.draw(session.spec, batch, sequence, seed=0)
    start = time.perf_counter()
    launch = session.bind(data)
    launch()
    session.synchronize()
    first = time.perf_counter() - start

    def call() -> None:
        launch()
        session.synchronize()

    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    inner = inner_loop(once, 1e-7)
    taken, _ = sample(call, plan, inner)
    calls = CALLS if job["device"] == "cuda" and once < LONG else 1
    start = time.perf_counter()
    for _ in range(calls):
        launch()
    host = (time.perf_counter() - start) / calls
    session.synchronize()
    copied, _ = sample(lambda: session.run(data), Sampling(1, 5, 3, 0.05))
    noise = None
    if job["checked"]:
        # What was timed is what is checked, where a launch lets its outputs be seen.
        outputs = launch.download() if hasattr(launch, "download") else session.run(data)
        stored = Path(job["references"]) / f"{batch}x{sequence}.npz"
        if job["is_reference"]:
            np.savez(stored, **outputs)
        noise = sqnr(outputs, stored)
    return {
        "batch": batch, "sequence": sequence, "first": first, "samples": _short(taken),
        "host": host, "with_copies": _short(copied), "sqnr_db": noise,
    }


def _short(seconds: Any) -> list[float]:
    """Four significant digits, which is more than any of them holds."""
    return [float(f"{value:.4g}") for value in seconds]


def sqnr(outputs: dict[str, np.ndarray], stored: Path) -> float | None:
    """Signal to noise of the first output against eager float32, in dB; None without one."""
    if not stored.exists():
        return None
    with np.load(stored) as reference:
        name = reference.files[0]
        wanted = reference[name].astype(np.float64)
    error = outputs[name].astype(np.float64) - wanted
    if not np.isfinite(error).all():
        return -np.inf
    noise = float(np.square(error).sum())
    return 200.0 if noise == 0 else float(10 * np.log10(np.square(wanted).sum() / noise))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
