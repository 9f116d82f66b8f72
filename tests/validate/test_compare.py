"""Errors between arrays: NaN fails, order does not matter, masked positions do not count."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from modelport.errors import UsageError
from modelport.spec import TensorSpec
from modelport.validate.compare import (
    CHUNK,
    UNIT_ROUNDOFF,
    error_stats,
    kept,
    mismatches,
    nonfinite,
    nonfinite_differences,
    unit_roundoff,
)
from modelport.validate.rule import Rule, decide, worst

FLOATS = st.floats(-1e6, 1e6, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS)
ANY_FLOAT = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32))


def pair(draw_from=ARRAYS):
    return draw_from.flatmap(lambda a: st.tuples(
        st.just(a), hnp.arrays(np.float64, a.shape, elements=FLOATS)))


@given(pair(), st.randoms(use_true_random=False))
def test_the_order_of_elements_does_not_matter(both, random):
    left, right = (array.reshape(-1) for array in both)
    order = list(range(left.size))
    random.shuffle(order)
    direct, shuffled = error_stats(left, right), error_stats(left[order], right[order])
    assert direct.rmse == pytest.approx(shuffled.rmse, rel=1e-9)
    assert direct.largest == shuffled.largest
    assert direct.elements == shuffled.elements == left.size


@given(pair(), st.sampled_from([2.0**k for k in range(-20, 20)]))
def test_errors_scale_with_the_values(both, factor):
    left, right = both
    direct, scaled = error_stats(left, right), error_stats(left * factor, right * factor)
    assert scaled.rmse == pytest.approx(direct.rmse * factor, rel=1e-12)
    assert scaled.largest == direct.largest * factor
    assert scaled.scale == pytest.approx(direct.scale * factor, rel=1e-12)


@given(pair())
def test_the_error_of_either_side_against_the_other_is_the_same(both):
    left, right = both
    assert error_stats(left, right).rmse == error_stats(right, left).rmse
    assert error_stats(left, left).rmse == 0


@given(pair(), st.data())
def test_masked_positions_take_no_part(both, data):
    left, right = both
    keep = data.draw(hnp.arrays(bool, left.shape))
    spoilt = np.where(keep, left, np.nan)
    found = error_stats(spoilt, right, keep)
    assert found == error_stats(left[keep], right[keep])
    assert found.elements == np.count_nonzero(keep)


@given(ANY_FLOAT, st.data())
def test_nonfinite_values_are_counted_alike_from_both_sides(left, data):
    right = data.draw(hnp.arrays(np.float32, left.shape, elements=st.floats(width=32)))
    assert nonfinite_differences(left, right) == nonfinite_differences(right, left)
    assert nonfinite_differences(left, left) == 0
    if nonfinite(left) and not nonfinite(right):
        assert nonfinite_differences(left, right) == nonfinite(left)


def test_nan_is_not_infinity_and_infinity_has_a_sign():
    values = np.array([np.nan, np.inf, -np.inf, 1.0])
    for i in range(4):
        for j in range(4):
            found = nonfinite_differences(values[i : i + 1], values[j : j + 1])
            assert found == (i != j), (values[i], values[j])


@given(pair(), st.integers(0, 10**6))
def test_one_nan_makes_every_verdict_fail(both, place):
    left, right = both
    left = left.copy()
    left.reshape(-1)[place % left.size] = np.nan
    noise = error_stats(right * 1.5, right)
    for floor in (noise, None):
        decision = decide(Rule(), error_stats(left, right), floor, 2.0**-24)
        assert decision.verdict == "fail"
        assert decision.excess is None


def test_an_infinite_noise_floor_admits_nothing():
    truth = np.ones(10)
    broken = np.full(10, np.inf)
    found = decide(Rule(), error_stats(broken, truth), error_stats(broken, truth), 2.0**-24)
    assert found.verdict == "fail"


def test_large_arrays_are_summed_in_chunks_without_losing_digits():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(3 * CHUNK + 17).astype(np.float32)
    value = truth + np.float32(1e-3)
    expected = np.sqrt(np.mean((value.astype(np.float64) - truth.astype(np.float64)) ** 2))
    assert error_stats(value, truth).rmse == pytest.approx(expected, rel=1e-12)


def test_bfloat16_and_integers():
    value = np.array([1.0, 2.0, np.inf], ml_dtypes.bfloat16)
    assert error_stats(value[:2], np.array([1.0, 2.5])).largest == 0.5
    assert nonfinite(value) == 1
    assert mismatches(np.array([1, 2, 3]), np.array([1, 5, 3])) == 1
    assert mismatches(np.array([1, 2, 3]), np.array([1, 5, 3]), np.array([True, False, True])) == 0


@pytest.mark.parametrize("name", UNIT_ROUNDOFF)
def test_one_plus_the_roundoff_is_a_tie(name):
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    half = unit_roundoff(name)
    assert dtype.type(1) + dtype.type(half) == dtype.type(1)
    assert dtype.type(1) + dtype.type(2 * half) != dtype.type(1)


def test_a_dtype_without_roundoff_is_named():
    with pytest.raises(UsageError, match="int64"):
        unit_roundoff("int64")


class TestKept:
    mask = np.array([[1, 1, 0], [0, 0, 0]])

    def of(self, *shape, names=("batch", "sequence"), mask=None):
        return kept(TensorSpec("x", "float32", shape), {names: self.mask if mask is None else mask})

    def test_hidden_states_keep_their_positions(self):
        found = self.of("batch", "sequence", 8)
        assert found.shape == (2, 3, 1)
        assert found[:, :, 0].tolist() == [[True, True, False], [False] * 3]

    def test_attention_maps_are_restricted_on_both_axes(self):
        found = np.broadcast_to(self.of("batch", 4, "sequence", "sequence"), (2, 4, 3, 3))
        assert found[0, 0].tolist() == [[True, True, False], [True, True, False], [False] * 3]

    def test_axes_may_come_in_another_order(self):
        assert self.of("sequence", "batch")[:, 0].tolist() == [True, True, False]

    def test_a_pooled_row_is_left_out_only_if_it_has_no_content(self):
        assert self.of("batch", 8)[:, 0].tolist() == [True, False]

    def test_choices_are_rows_of_their_own(self):
        names = ("batch", "choices", "sequence")
        mask = np.array([[[1, 1], [0, 0]]])
        assert self.of("batch", "choices", names=names, mask=mask).tolist() == [[True, False]]
        # The vector of the whole batch member still has a choice with content, or does not count.
        assert self.of("batch", 4, names=names, mask=mask).tolist() == [[False]]

    def test_nothing_masked_is_no_restriction(self):
        assert self.of("batch", "sequence", mask=np.ones((2, 3))) is None
        assert self.of(7, 5) is None


class TestRule:
    truth = np.random.default_rng(0).standard_normal(4000)

    def decided(self, ratio, *, count=4000, **options):
        truth = self.truth[:count]
        noise = np.random.default_rng(1).standard_normal(count) * 1e-3
        return decide(Rule(), error_stats(truth + ratio * noise, truth),
                      error_stats(truth + noise, truth), 2.0**-24, **options)

    def test_bands(self):
        assert self.decided(1.9).verdict == "pass"
        assert self.decided(2.2).verdict == "suspect"
        assert self.decided(9.0).verdict == "suspect"
        assert self.decided(11.0).verdict == "fail"
        assert self.decided(3.0).rho == pytest.approx(3.0)

    def test_small_samples_and_reduced_precision_have_a_wider_bound(self):
        assert self.decided(2.5, count=500).verdict == "pass"
        assert self.decided(2.5, precision=True).verdict == "pass"
        assert self.decided(3.5, precision=True).verdict == "suspect"

    def test_one_wrong_element_fails_by_the_maximum_norm(self):
        noise = np.random.default_rng(1).standard_normal(4000) * 1e-3
        value = self.truth + noise
        value[7] += 0.06  # ρ is 1.4
        found = decide(Rule(), error_stats(value, self.truth),
                       error_stats(self.truth + noise, self.truth), 2.0**-24)
        assert found.rho < 2
        assert found.verdict != "pass"

    def test_an_exact_reference_leaves_room_for_rounding_only(self):
        truth = self.truth
        rounded = truth.astype(np.float32)
        exact = error_stats(truth, truth)
        assert decide(Rule(), error_stats(rounded, truth), exact, 2.0**-24).verdict == "pass"
        off = error_stats(truth * (1 + 1e-5), truth)
        assert decide(Rule(), off, exact, 2.0**-24).verdict == "fail"

    def test_zero_where_the_truth_is_zero(self):
        zeros = np.zeros(10)
        same = error_stats(zeros, zeros)
        assert decide(Rule(), same, same, 2.0**-24).verdict == "pass"
        other = decide(Rule(), error_stats(zeros + 1e-9, zeros), same, 2.0**-24)
        assert other.verdict == "fail"
        assert other.excess is None

    def test_the_worst_of_nothing_is_a_failure(self):
        assert worst([]) == "fail"
        assert worst(["pass", "suspect", "pass"]) == "suspect"
