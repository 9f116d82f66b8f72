"""The judge rejects every mutant of a toy transformer and accepts every correct variant."""

from __future__ import annotations

import pytest
from modelport.validate import ParityReport, Settings, judge, plan
from toy_transformer import MUTANTS, VARIANTS, Toy, ToySession, Variant, toy_spec, varied, weights

CASES = plan(toy_spec())
CAUSAL = {"missing causal mask"}


def judged(candidate, *, seed: int = 0, causal: bool = False, **settings) -> ParityReport:
    return judge(candidate, ToySession(Toy(weights(seed), causal=causal)),
                 ToySession(Toy(weights(seed), "float64", causal)), CASES,
                 settings=Settings(**settings))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_rejected(name):
    report = judged(MUTANTS[name](), causal=name in CAUSAL, case_seconds=0.5)
    assert not report.accepted, name
    assert report.failures
    assert all(r.reason for r in report.failures)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_correct_variant_is_accepted(name, causal):
    for seed in range(2):
        report = judged(varied(VARIANTS[name], seed, causal=causal), seed=seed, causal=causal)
        assert report.accepted, [(seed, r) for r in report.failures]
        assert report.comparisons > 1000
        assert report.noise_floor


def test_the_original_has_exactly_the_noise_of_itself():
    assert judged(varied(Variant())).worst_rho == 1.0
