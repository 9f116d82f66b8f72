from __future__ import annotations

from dataclasses import replace

import pytest
from benchmark_fakes import outcome, request, result, subject, typical
from modelport.errors import GateRefused
from modelport.runtimes.benchmark.against import compare_runs
from modelport.runtimes.benchmark.records import Corpus
from modelport.runtimes.benchmark.summary import summarise
from modelport.runtimes.benchmark.views import comparison_table


def run(tmp_path, seconds, *, seed=0, **changes):
    asked = request(tmp_path, *map(subject, seconds), rounds=5, aa=True, **changes)
    return summarise(asked, outcome(asked, typical(seconds, seed)))


@pytest.mark.parametrize(("factor", "word", "past"), [
    (1.0, "no difference shown", False), (1.03, "slower", False), (1.10, "slower", True),
    (0.9, "faster", False)])
def test_a_regression_needs_the_interval_behind_it(tmp_path, factor, word, past):
    new = run(tmp_path, {"base": factor}, seed=1)
    found = compare_runs(new, run(tmp_path, {"base": 1.0}))
    (change,) = found.changes
    if factor == 1.0:
        assert change.comparison.ratio.value == pytest.approx(1.0, abs=0.005)
    assert change.comparison.word == word
    assert change.past_limit is past
    assert bool(found.past_limit) is past
    assert bool(found.regressions) is (word == "slower")
    assert found.same_machine


def test_the_limit_must_lie_outside_the_interval(tmp_path):
    new, old = run(tmp_path, {"base": 1.052}), run(tmp_path, {"base": 1.0})
    (change,) = compare_runs(new, old, max_regression=0.05).changes
    assert change.comparison.ratio.value > 1.05
    assert change.comparison.ratio.low < 1.05
    assert not change.past_limit


def test_rounds_of_two_runs_are_not_paired(tmp_path):
    """The machine drifted alike in both by chance; that must not narrow the interval."""
    drift = (1.0, 1.1, 1.25, 1.4, 1.6)

    def drifting(factor):
        asked = request(tmp_path, subject("base"), rounds=5, aa=True)
        return summarise(asked, outcome(asked, lambda c: result(c, factor * drift[c.round])))

    (change,) = compare_runs(drifting(1.1), drifting(1.0)).changes
    assert change.comparison.word == "no difference shown"


def test_rows_without_a_counterpart_are_listed(tmp_path):
    new = run(tmp_path, {"base": 1.0, "new": 1.0}, seed=1)
    old = run(tmp_path, {"base": 1.0, "old": 1.0})
    found = compare_runs(new, old)
    assert [c.label.split()[0] for c in found.changes] == ["base"]
    assert found.only_new[0].startswith("new")
    assert found.only_old[0].startswith("old")
    assert "base" in comparison_table(found).rows[0][0]


def test_where_nothing_has_a_counterpart_the_gate_is_not_passed(tmp_path):
    found = compare_runs(run(tmp_path, {"new": 1.0}), run(tmp_path, {"old": 1.0}))
    with pytest.raises(GateRefused, match="no measurement has a counterpart in OLD") as caught:
        found.require_counterparts("OLD")
    assert "new · fake" in str(caught.value)
    assert "old · fake" in str(caught.value)


def test_a_run_is_not_compared_with_its_own_samples(tmp_path):
    found = compare_runs(run(tmp_path, {"base": 1.0}), run(tmp_path, {"base": 1.0}))
    assert not found.changes
    assert len(found.repeated) == 1
    with pytest.raises(GateRefused, match="already holds"):
        found.require_counterparts("OLD")


@pytest.mark.parametrize(("tokens", "compared"), [(300, 1), (301, 0)])
def test_passes_over_different_texts_are_not_compared(tmp_path, tokens, compared):
    def passing(seed, count):
        text = Corpus(30, count, 400, (1,) * 30, (10,) * 30)
        asked = request(tmp_path, subject("base"), rounds=5, aa=True, batches=(), sequences=(),
                        batchings=("padded",))
        return summarise(asked, outcome(asked, lambda c: result(c, 1.0, seed=seed, corpus=text)))

    found = compare_runs(passing(1, tokens), passing(0, 300))
    assert len(found.changes) == compared


def test_only_the_artifact_that_is_asked_for_counts(tmp_path):
    new, old = run(tmp_path, {"a": 1.2, "b": 1.0}, seed=1), run(tmp_path, {"a": 1.0, "b": 1.0})
    assert [c.label.split()[0] for c in compare_runs(new, old).past_limit] == ["a"]
    found = compare_runs(new, old, identity="identity of b")
    assert [c.label.split()[0] for c in found.changes] == ["b"]


def sourced(tmp_path, seconds, seed):
    """A run of an artifact beside its source."""
    both = replace(subject("model"), parity="source"), subject("mine")
    asked = request(tmp_path, *both, rounds=5, aa=True)
    return summarise(asked, outcome(asked, typical(seconds, seed)))


def test_the_source_is_no_artifact(tmp_path):
    new = sourced(tmp_path, {"model": 1.5, "mine": 1.0}, 1)
    old = sourced(tmp_path, {"model": 1.0, "mine": 1.0}, 0)
    found = compare_runs(new, old)
    assert [c.label.split()[0] for c in found.changes] == ["mine"]
    assert not found.past_limit


def test_what_the_source_differs_by_is_the_machine_not_the_artifact(tmp_path):
    old = sourced(tmp_path, {"model": 1.0, "mine": 1.0}, 0)
    found = compare_runs(sourced(tmp_path, {"model": 1.2, "mine": 1.18}, 1), old)
    assert not found.past_limit
    assert "noise floor" in found.changes[0].comparison.reason
    assert compare_runs(sourced(tmp_path, {"model": 1.0, "mine": 1.18}, 1), old).past_limit
