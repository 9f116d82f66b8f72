"""Effects of a change of precision, against hand-computed values and known identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelport.spec import Dim, ModelSpec, TensorSpec
from modelport.validate import EffectBudget
from modelport.validate.effects import EffectMeter, measurable, wilson_low

DIMS = {"batch": Dim(1, 2, 512), "sequence": Dim(1, 2, 64)}
SCORES = ModelSpec((), (TensorSpec("logits", "float32", ("batch", 5)),), DIMS)
VECTORS = ModelSpec((), (TensorSpec("pooled", "float32", ("batch", 16)),), DIMS)
RNG = np.random.default_rng(0)


def effect(spec, candidate, truth, keep=None, budget=None):
    name = spec.outputs[0].name
    meter = EffectMeter(spec)
    meter.add({name: candidate}, {name: truth}, {name: keep})
    (found,) = meter.effects(budget or EffectBudget())
    return found


def test_equal_outputs_break_nothing():
    truth = RNG.standard_normal((200, 5))
    found = effect(SCORES, truth, truth)
    assert found.decided == found.rows == 200
    assert found.sqnr_db is None
    assert (found.kl_max, found.agreement, found.flips) == (0.0, 1.0, 0)
    assert found.agreement_low > 0.97
    assert found.broken == ()


def test_sqnr_is_in_decibels():
    truth = np.ones((200, 5))
    assert effect(SCORES, truth * 1.01, truth).sqnr_db == pytest.approx(40)
    assert effect(SCORES, truth * 1.1, truth).sqnr_db == pytest.approx(20)


def test_divergence_of_two_coins():
    spec = ModelSpec((), (TensorSpec("logits", "float32", ("batch", 2)),), DIMS)
    truth, candidate = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    found = effect(spec, candidate, truth)
    assert found.kl_mean == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))


def test_adding_a_constant_to_logits_changes_no_distribution():
    truth = RNG.standard_normal((200, 5))
    assert effect(SCORES, truth + 7, truth).kl_max == pytest.approx(0, abs=1e-12)


def test_a_close_call_is_no_flip_but_a_clear_one_is():
    truth = np.array([[1.0, 0.99, -3, -3, -3]] * 100 + [[5.0, 0, 0, 0, 0]] * 100)
    close = truth.copy()
    close[:100, 1] += 0.03
    assert effect(SCORES, close, truth).flips == 0
    clear = truth.copy()
    clear[100:103] = [0.0, 1.0, 0, 0, 0]
    found = effect(SCORES, clear, truth)
    assert found.flips == 3
    assert found.decided == 200
    assert found.agreement == 1 - 3 / 200
    assert any("agreement" in text for text in found.broken)


@given(st.integers(1, 500), st.integers(0, 500))
def test_the_wilson_bound_lies_below_the_share(trials, successes):
    successes = min(successes, trials)
    low = wilson_low(successes, trials)
    assert 0 <= low <= successes / trials
    assert wilson_low(successes, trials * 2) <= wilson_low(successes * 2, trials * 2) + 1e-12


def test_wilson_against_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_low(81, 263) == pytest.approx(0.2553, abs=5e-5)
    assert wilson_low(15, 148) == pytest.approx(0.0624, abs=5e-5)
    assert wilson_low(0, 20) == 0.0
    assert wilson_low(0, 0) == 0.0


def test_too_few_rows_prove_no_agreement():
    truth = RNG.standard_normal((20, 5))
    found = effect(SCORES, truth + 1e-6, truth)
    assert found.agreement == 1.0
    assert any("agreement_low" in text for text in found.broken)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_breaks_every_limit(bad):
    truth = RNG.standard_normal((200, 5))
    candidate = truth.copy()
    candidate[3] = bad
    found = effect(SCORES, candidate, truth, budget=EffectBudget(kl_p99=1.0))
    assert any("sqnr_db" in text for text in found.broken)
    vectors = RNG.standard_normal((20, 16))
    broken = vectors.copy()
    broken[0] = bad
    assert effect(VECTORS, broken, vectors, budget=EffectBudget(cosine=0.9)).broken


def test_embeddings_turned_and_ranked():
    truth = RNG.standard_normal((50, 16))
    same = effect(VECTORS, truth * 3, truth)
    assert same.cosine_mean == pytest.approx(1)
    assert same.rank_correlation == pytest.approx(1)
    noisy = effect(VECTORS, truth + RNG.standard_normal(truth.shape), truth)
    assert noisy.cosine_min < 0.9
    assert 0 < noisy.rank_correlation < 0.95
    opposite = effect(VECTORS, -truth, truth, budget=EffectBudget(cosine=0.5))
    assert opposite.cosine_mean == pytest.approx(-1)
    assert len(opposite.broken) == 2


def test_masked_positions_do_not_count():
    spec = ModelSpec((), (TensorSpec("start_logits", "float32", ("batch", "sequence")),), DIMS)
    truth = RNG.standard_normal((200, 6))
    candidate = truth.copy()
    candidate[:, 4:] = 100
    keep = np.broadcast_to(np.arange(6) < 4, truth.shape)
    found = effect(spec, candidate, truth, keep)
    assert found.flips == 0
    assert found.kl_max == 0
    assert effect(spec, candidate, truth).kl_mean > 10


def test_noise_has_nothing_to_agree_on():
    truth = RNG.standard_normal((500, 5))
    found = effect(SCORES, 100 * RNG.standard_normal((500, 5)), truth)
    assert found.decided == 0
    assert found.agreement is None
    assert sum("agreement" in text for text in found.broken) == 2


@pytest.mark.parametrize("shape", [(4, 1), (4,), ()])
def test_of_single_scores_the_noise_is_measured(shape):
    spec = ModelSpec((), (TensorSpec("logits", "float32", ("batch", *shape[1:])[:len(shape)]),),
                     DIMS)
    truth = np.ones(shape)
    found = effect(spec, truth * 1.01, truth)
    assert (found.kind, found.rows) == ("values", truth.size)
    assert found.sqnr_db == pytest.approx(40)
    assert found.agreement is None
    assert found.broken == ()
    assert effect(spec, truth * 2, truth).broken == ("sqnr_db is 0; at least 20 is allowed",)


def test_masked_values_do_not_count():
    spec = ModelSpec((), (TensorSpec("scores", "float32", ("batch", "sequence", 1)),), DIMS)
    truth = np.ones((2, 6, 1))
    candidate = np.where(np.arange(6)[:, None] < 4, truth * 1.01, 7)
    keep = np.broadcast_to(np.arange(6)[:, None] < 4, truth.shape)
    found = effect(spec, candidate, truth, keep)
    assert (found.rows, found.sqnr_db) == (8, pytest.approx(40))


def test_integers_are_left_alone():
    spec = ModelSpec((), (TensorSpec("ids", "int64", ("batch", 5)),), DIMS)
    meter = EffectMeter(spec)
    meter.add({"ids": np.ones((4, 5), int)}, {"ids": np.ones((4, 5), int)}, {})
    assert meter.effects(EffectBudget()) == ()
    assert not measurable(spec)
    assert measurable(SCORES)
