from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from modelport.runtimes.benchmark import statistics as st

times = some.lists(some.floats(1e-6, 1e3), min_size=1, max_size=300).map(np.array)


def flat(value: float, n: int = 30) -> np.ndarray:
    return np.full(n, value)


def noisy(rng: np.random.Generator, typical: float, n: int = 60, between: float = 0.005):
    return typical * np.exp(rng.normal(0, between) + rng.normal(0, 0.02, n))


def rounds(rng: np.random.Generator, typical: float, count: int = 5):
    return {i: noisy(rng, typical) for i in range(count)}


@pytest.mark.parametrize(("q", "n"), [(0.90, 64), (0.95, 130), (0.99, 662)])
def test_a_percentile_needs_two_samples_beyond_it_with_99_percent_confidence(q, n):
    def chance_of_fewer_than_two_beyond(size: int) -> float:
        return float(sum(math.comb(size, k) * (1 - q) ** k * q ** (size - k) for k in (0, 1)))

    assert st.samples_needed(q) == n
    assert chance_of_fewer_than_two_beyond(n) <= 0.01 < chance_of_fewer_than_two_beyond(n - 1)


@given(some.floats(0.01, 0.99))
def test_the_rule_is_symmetric_and_needs_more_towards_the_tails(q):
    assert st.samples_needed(q) == pytest.approx(st.samples_needed(1 - q), abs=1)
    assert st.samples_needed(q) >= st.samples_needed(0.5)


def test_a_percentile_beyond_its_sample_says_so_and_gives_no_number():
    found = st.percentile(np.linspace(1, 2, 63), 0.9)
    assert found.interval is None
    assert str(found) == "n too small (63 of 64)"
    assert st.percentile(np.linspace(1, 2, 64), 0.9).interval is not None


@given(some.integers(1, 400), some.floats(0.01, 0.99))
def test_the_binomial_distribution_function_is_exact(n, p):
    exact = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(min(n, 60) + 1)])
    assert np.allclose(st.binomial_cdf(n, p)[: len(exact)], exact, rtol=1e-9, atol=1e-200)


@given(times, some.sampled_from([0.5, 0.75, 0.9]))
def test_bounds_of_a_percentile_are_samples_around_it(samples, q):
    found = st.percentile(samples, q)
    if len(samples) < st.samples_needed(q):
        assert found.interval is None
        return
    bounds = found.interval
    assert bounds.low <= bounds.value <= bounds.high
    assert {bounds.low, bounds.high} <= set(samples) | {bounds.value}


def test_bounds_of_the_median_of_100_are_the_textbook_ranks():
    bounds = st.percentile(np.arange(1.0, 101.0), 0.5).interval
    assert (bounds.low, bounds.high) == (40.0, 61.0)  # e.g. Conover, Practical Nonparametrics


@given(times, some.floats(1e-3, 1e3))
def test_percentiles_scale_with_their_unit(samples, factor):
    one, other = st.percentile(samples, 0.5), st.percentile(samples * factor, 0.5)
    assert (one.interval is None) == (other.interval is None)
    if one.interval:
        assert other.interval.value == pytest.approx(one.interval.value * factor)


@given(times)
def test_outliers_are_counted_and_none_is_dropped(samples):
    found = st.outliers(samples)
    counts = (found.severe_low, found.mild_low, found.mild_high, found.severe_high)
    assert found.n == len(samples)
    assert all(c >= 0 for c in counts)
    assert sum(counts) <= len(samples) / 2


def test_outliers_are_told_mild_from_severe():
    samples = np.concatenate([np.linspace(10, 11, 101), [12.3], [30.0, 40.0], [1.0]])
    found = st.outliers(samples)
    assert (found.severe_low, found.mild_low, found.mild_high, found.severe_high) == (1, 0, 1, 2)


@pytest.mark.parametrize(("freedom", "t"), [
    (1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (100, 1.984)])
def test_student_quantiles_are_those_of_the_tables(freedom, t):
    assert st.student_quantile(0.975, freedom) == pytest.approx(t, abs=5e-4)


def test_a_median_drawn_by_the_beta_shortcut_is_a_resampled_median():
    rng = np.random.default_rng(0)
    for n in (5, 8):
        samples = np.exp(rng.normal(0, 1, n))
        table = st.LogMedians([samples])
        drawn = np.sort(table.draw(np.zeros((20000, 1), int), rng)[:, 0])
        plain = np.sort(np.log(np.median(rng.choice(samples, (20000, n)), axis=1)))
        assert np.abs(drawn - plain).mean() < 0.02


@settings(deadline=None)
@given(some.integers(0, 1000), some.floats(1e-6, 1e3))
def test_a_ratio_is_free_of_units_and_turns_over(seed, unit):
    rng = np.random.default_rng(seed)
    a, b = rounds(rng, 1.0), rounds(rng, 1.3)
    one = st.ratio(a, b)
    scaled = st.ratio({k: v * unit for k, v in a.items()}, {k: v * unit for k, v in b.items()})
    assert scaled.value == pytest.approx(one.value)
    assert scaled.low == pytest.approx(one.low)
    assert st.ratio(b, a).value == pytest.approx(1 / one.value)
    assert one.low <= one.value <= one.high


def test_pairing_by_round_cancels_a_drift_of_the_machine():
    rng = np.random.default_rng(3)
    drift = [1.0, 1.1, 1.25, 1.4, 1.6]
    a = {i: noisy(rng, d, between=0) for i, d in enumerate(drift)}
    b = {i: noisy(rng, d * 1.05, between=0) for i, d in enumerate(drift)}
    paired = st.ratio(b, a)
    unpaired = st.ratio({i + 100: v for i, v in b.items()}, a)
    assert paired.excludes(1.0)
    assert not unpaired.excludes(1.0)


def test_no_claim_without_five_processes():
    rng = np.random.default_rng(1)
    found = st.compare(rounds(rng, 2.0, 4), rounds(rng, 1.0, 5), floor=0.0)
    assert found.word == "not compared"
    assert "4 processes" in found.reason


def test_no_claim_within_the_noise_floor_even_when_the_interval_excludes_1():
    a = {i: flat(1.02) for i in range(5)}
    b = {i: flat(1.0) for i in range(5)}
    assert st.compare(a, b, floor=0.0).word == "slower"
    found = st.compare(a, b, floor=0.03)
    assert found.ratio.excludes(1.0)
    assert found.word == "no difference shown"


def test_no_claim_when_the_interval_includes_1():
    a = {i: flat(v) for i, v in enumerate([1.0, 1.3, 0.8, 1.2, 1.1])}
    b = {i: flat(1.0) for i in range(5)}
    assert st.compare(a, b, floor=0.0).word == "no difference shown"


def test_faster_means_less_time():
    rng = np.random.default_rng(2)
    assert st.compare(rounds(rng, 0.8), rounds(rng, 1.0), floor=0.01).word == "faster"


def test_the_noise_floor_is_the_largest_difference_in_either_direction():
    down, up = st.Interval(0.9, 0.95, 1.0), st.Interval(0.99, 1.01, 1.03)
    assert st.noise_floor([down, up]) == pytest.approx(1 / 0.95 - 1)
    assert st.noise_floor([], timer=0.002) == 0.002


def test_one_process_says_that_its_interval_knows_nothing_of_other_processes():
    rng = np.random.default_rng(0)
    assert st.centre([noisy(rng, 1.0)]).basis == "samples"
    assert st.centre([noisy(rng, 1.0) for _ in range(3)]).basis == "processes"
    with pytest.raises(ValueError, match="no samples"):
        st.centre([])


steady = np.random.default_rng(0).normal(1.0, 0.005, (5, 60))


def test_a_quiet_measurement_is_stable():
    assert st.verdict(list(steady)) == st.Verdict("stable")


@pytest.mark.parametrize(("processes", "reason"), [
    (list(steady * np.array([1, 1, 1, 1, 1.2])[:, None]), "process medians differ by 20%"),
    ([np.random.default_rng(0).uniform(0.5, 1.5, 60)], "IQR"),
    ([np.concatenate([flat(1.0, 30), flat(1.2, 30)])], "drifts by 20%"),
    ([np.concatenate([steady[0], flat(9.0, 6)])], "9% severe outliers"),
])
def test_an_unstable_measurement_says_why(processes, reason):
    found = st.verdict(processes)
    assert found.word == "unstable"
    assert any(reason in r for r in found.reasons)


@pytest.mark.parametrize(("processes", "options", "reason"), [
    ([], {}, "no samples"),
    ([steady[0], np.array([])], {}, "no samples"),
    ([np.array([1.0, np.nan])], {}, "not a positive finite time"),
    ([np.array([1.0, 0.0])], {}, "not a positive finite time"),
    ([steady[0]], {"timer": 0.02}, "clock's step"),
    ([steady[0]], {"invalid": ["asked for cuda, ran on cpu"]}, "ran on cpu"),
])
def test_an_invalid_measurement_says_why(processes, options, reason):
    found = st.verdict(processes, **options)
    assert found.word == "invalid"
    assert reason in found.reasons[0]


def test_company_on_the_machine_makes_it_unstable():
    assert st.verdict(list(steady), foreign=0.5).reasons == ("others used 0.50 cores meanwhile",)


def test_copies_of_a_timing_support_nothing():
    few = st.percentile(np.repeat([1.0, 2.0, 3.0, 4.0], 50), 0.95, timings=4)
    assert few.interval is None
    assert (few.n, few.needed) == (4, 130)
    many = np.arange(1.0, 201.0)
    alone, copied = (st.percentile(many, 0.9),
                     st.percentile(np.repeat(many, 10), 0.9, timings=200))
    assert (copied.interval.low, copied.interval.high) == (alone.interval.low, alone.interval.high)
    assert copied.n == 200


def test_one_timing_is_not_called_stable():
    found = st.verdict([np.array([1.0])])
    assert found.word == "unstable"
    assert "one timing" in found.reasons[0]
