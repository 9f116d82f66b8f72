"""Requests on the fake runtime, and results of known figures; no artifact, no framework."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from modelport.runtimes.benchmark import environment
from modelport.runtimes.benchmark.records import (
    Cell,
    CellResult,
    ColdStart,
    Conditions,
    Memory,
    Sampling,
)
from modelport.runtimes.benchmark.sweep import Subject, SweepOutcome, SweepRequest, plan

if TYPE_CHECKING:
    from pathlib import Path

QUICK = Sampling(warmup=1, samples=12, min_samples=11, seconds=0.5)


def subject(name: str, **options: Any) -> Subject:
    return Subject(name, "nowhere", f"identity of {name}", "fake",
                   options={"latency": 2e-4, **options}, opener="fake", parity="pass")


def request(output: Path, *subjects: Subject, **changes: Any) -> SweepRequest:
    defaults = {
        "batches": (1,), "sequences": (8,), "rounds": 1, "aa": False, "sampling": QUICK,
        "timeout": 60.0, "measure_ceilings": False}
    return SweepRequest(subjects or (subject("base"),), output, **{**defaults, **changes})


def cell(**changes: Any) -> Cell:
    options = {"latency": 2e-4, **changes.pop("options", {})}
    defaults = {"runtime": "fake", "opener": "fake", "sequence": 8, "sampling": QUICK,
                "options": options}
    return Cell("fake", "nowhere", "identity", **{**defaults, **changes})


MACHINE = environment.read()


def result(cell, typical, *, peak=100 << 20, seed=0, **changes):
    rng = np.random.default_rng([seed, cell.round, cell.batch, cell.twin, len(cell.subject)])
    samples = typical * np.exp(rng.normal(0, 0.002) + rng.normal(0, 0.005, 30))
    return replace(CellResult(
        cell, cell.key(""), "ok", runtime="fake", samples=tuple(samples.tolist()),
        memory=Memory(10 << 20, 60 << 20, 60 << 20, peak, 0),
        conditions=Conditions((0,), {}, {}, 0.0, 6e-8), cold=ColdStart(0.1, 0.2, 0.3, 0.1)),
        **changes)


def outcome(asked, make, ceilings=()):
    return SweepOutcome(MACHINE, tuple(make(c) for c in plan(asked)), ceilings, 0, 0)


def typical(seconds, seed=0):
    return lambda c: result(c, seconds[c.subject] * c.batch**0.5, seed=seed)
