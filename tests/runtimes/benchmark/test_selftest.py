"""The self-test passes, and it fails when the statistics lie."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from modelport.cli import execute
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import selftest
from modelport.runtimes.benchmark import statistics as st
from modelport.runtimes.benchmark.selftest import Simulation, alarms, coverage, self_test


def test_all_promises_are_kept():
    found = self_test(real_clock=False)
    assert found.passed, found.lines()
    assert len(found.checks) == 4


@pytest.mark.parametrize("processes", [3, 5, 9])
@pytest.mark.parametrize("between", [0.0, 0.03])
def test_intervals_cover_whatever_the_processes_and_their_spread(processes, between):
    model = Simulation(processes=processes, between=between)
    assert coverage(model, 200, 1) >= 0.93


def test_the_true_median_of_the_simulation_is_what_it_says():
    model = Simulation(processes=200, samples=500, between=0.0, interrupted=0.1)
    pooled = np.concatenate(list(model.draw(1e-3, np.random.default_rng(0)).values()))
    assert np.median(pooled) == pytest.approx(model.truth(1e-3), rel=1e-3)


def test_intervals_that_forget_the_processes_are_caught(monkeypatch):
    """Treating all samples as independent is the usual mistake; it must not pass."""
    def pooled(processes, *, seed=0):
        return st.percentile(np.concatenate(list(processes)), 0.5).interval

    monkeypatch.setattr(selftest.st, "centre", pooled)
    assert coverage(Simulation(), 200, 0) < selftest.COVERAGE


def test_a_comparison_of_pooled_samples_raises_false_alarms(monkeypatch):
    real = st.ratio

    def bold(a, b, *, seed=0):
        found = real(a, b, seed=seed)
        return replace(found, low=found.value * 0.999, high=found.value * 1.001)

    monkeypatch.setattr(selftest.st, "ratio", bold)
    assert alarms(Simulation(), 1.0, 100, 0) > selftest.FALSE_ALARMS


def test_a_slowdown_below_the_noise_is_not_claimed():
    assert alarms(Simulation(between=0.05), 1.005, 100, 0) <= 0.1


def test_measuring_costs_at_most_one_percent_of_a_millisecond(tmp_path):
    overhead, parent = selftest.measure_overhead(tmp_path)
    assert 0 <= overhead <= 0.01
    assert parent <= 0.02


@pytest.mark.slow
def test_a_slowdown_of_5_percent_is_found_on_the_real_clock(tmp_path):
    assert selftest._slowdown(tmp_path, 0) == 1.0


@pytest.mark.parametrize(("value", "code"), [(0.95, 0), (0.5, 1)])
def test_the_command_ends_with_its_verdict(value, code, monkeypatch, capsys):
    found = selftest.SelfTest((selftest.Check("something", value, 0.93, True),), 0.1)
    monkeypatch.setattr(benchmark, "self_test", lambda: found)
    assert execute(["bench", "--self-test"]) == code
    assert str(found.checks[0]) in capsys.readouterr().out
    assert execute(["bench", "--self-test", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["checks"][0]["value"] == value


@pytest.mark.slow
def test_the_command_keeps_all_promises_here(capsys):
    assert execute(["bench", "--self-test"]) == 0, capsys.readouterr().out


def test_a_failed_check_says_so():
    check = selftest.Check("something", 0.5, 0.93, True)
    assert not check.passed
    assert str(check).startswith("FAILED something: 50.00% (required ≥ 93%)")
