"""Failing cases do not stop the rest, nothing is left out in silence, and doubt is not a pass."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from modelport.artifacts.manifest import ParitySummary
from modelport.errors import UsageError
from modelport.spec import ModelSpec, TensorSpec
from modelport.validate import (
    Case,
    EffectBudget,
    Plan,
    ReferenceCache,
    Rule,
    Settings,
    draw,
    judge,
    measure_effects,
    plan,
    run_ahead,
)
from modelport.validate.inputs import digest
from modelport.validate.pace import Pace
from toy_transformer import Toy, ToySession, Variant, toy_spec, varied, weights

SPEC = toy_spec()
PLAN = plan(SPEC, sizes={"batch": (1, 3), "sequence": (2, 7)})


def reference() -> ToySession:
    return varied(Variant())


def truth() -> ToySession:
    return varied(Variant(), dtype="float64")


def good() -> ToySession:
    return varied(Variant(reverse=True, fuse=True))


class Opener:
    """Counts how often a session is opened, and how many are open at once."""

    live = 0
    most = 0

    def __init__(self, make) -> None:
        self.make = make
        self.opened = 0

    def __call__(self):
        self.opened += 1
        session = self.make()
        Opener.live += 1
        Opener.most = max(Opener.most, Opener.live)
        close = session.close

        def closed():
            if not session._closed:
                Opener.live -= 1
            close()

        session.close = closed
        return session


def test_sessions_that_were_given_open_stay_open():
    sides = (good(), reference(), truth())
    assert judge(*sides, PLAN).accepted
    assert all(side.runs for side in sides)
    assert not any(side._closed for side in sides)


def test_truth_and_the_rest_are_never_open_together():
    Opener.live = Opener.most = 0
    openers = [Opener(make) for make in (good, reference, truth)]
    assert judge(*openers, PLAN, spec=SPEC).accepted
    assert [o.opened for o in openers] == [1, 1, 1]
    assert Opener.most == 2
    assert Opener.live == 0


def test_ten_artifacts_cost_one_reference(tmp_path):
    cache = ReferenceCache(tmp_path / "cache", "digest")
    first, second = Opener(reference), Opener(truth)
    for _ in range(3):
        report = judge(good(), first, second, PLAN, spec=SPEC, cache=cache)
        assert report.accepted
        assert len(report.cases) == len(PLAN.cases)
    assert (first.opened, second.opened) == (1, 1)
    other = replace(cache, source="another digest")
    judge(good(), first, second, PLAN, spec=SPEC, cache=other)
    assert (first.opened, second.opened) == (2, 2)


def test_what_ran_ahead_is_not_run_again(tmp_path):
    cache = ReferenceCache(tmp_path, "digest")
    Opener.live = Opener.most = 0
    sides = Opener(reference), Opener(truth)
    run_ahead(*sides, PLAN, spec=SPEC, cache=cache)
    assert Opener.most == 1
    report = judge(good(), *sides, PLAN, spec=SPEC, cache=cache)
    assert report.accepted
    assert len(report.cases) == len(PLAN.cases)
    assert [side.opened for side in sides] == [1, 1]
    assert Opener.live == 0
    assert {report.sides[side] for side in ("reference", "truth")} == {"stored runs"}


def test_ahead_as_in_turn_what_nothing_rests_on_has_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("modelport.validate.pace.FILL_SECONDS", 0.0)
    monkeypatch.setattr("modelport.validate.pace.FILL_RATIO", 0.0)
    essential = sum(case.essential for case in PLAN.cases)
    assert 0 < essential < len(PLAN.cases)
    cache = ReferenceCache(tmp_path, "digest")
    run_ahead(reference, truth, PLAN, spec=SPEC, cache=cache)
    assert len(list(tmp_path.glob("*.npz"))) == 2 * essential


def test_a_stored_run_cannot_hide_a_bad_candidate_and_damage_is_recomputed(tmp_path):
    cache = ReferenceCache(tmp_path, "digest")
    assert judge(good(), reference, truth, PLAN, spec=SPEC, cache=cache).accepted
    bad = ToySession(Toy(weights(1)))
    assert not judge(bad, reference, truth, PLAN, spec=SPEC, cache=cache).accepted
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    assert judge(good(), reference, truth, PLAN, spec=SPEC, cache=cache).accepted


def test_a_full_cache_leaves_cases_out_by_name(tmp_path):
    cache = ReferenceCache(tmp_path, "digest", max_bytes=40_000)
    report = judge(good(), reference, truth, PLAN, spec=SPEC, cache=cache)
    assert 0 < len(report.cases) < len(PLAN.cases)
    assert len(report.cases) + len(report.left_out) == len(PLAN.cases)
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*.npz")) <= 40_000
    assert not cache.save("truth", "0", {"a": np.zeros(5_000)})
    assert "limit on disk" in report.left_out[0].reason


def test_new_cases_take_the_place_of_the_oldest_runs_in_a_full_cache(tmp_path):
    for age in range(4):
        old = ReferenceCache(tmp_path, f"of {age} days ago", max_bytes=40_000)
        assert old.save("truth", "0", {"a": np.zeros(1_200)})
        os.utime(old.path("truth", "0"), (1_000_000 - age, 1_000_000 - age))
    assert ReferenceCache(tmp_path, "of 3 days ago").load("truth", "0"), "asked for just now"
    cache = ReferenceCache(tmp_path, "digest", max_bytes=40_000)
    report = judge(good(), reference, truth, PLAN.cases[:1], spec=SPEC, cache=cache)
    assert (len(report.cases), report.left_out) == (1, ())
    left = [age for age in range(4)
            if ReferenceCache(tmp_path, f"of {age} days ago").holds("truth", "0")]
    assert 2 not in left, "the oldest"
    assert left[-1] == 3
    assert cache.holds("truth", digest(draw(SPEC, PLAN.cases[0])))


def test_outputs_survive_the_cache(tmp_path):
    cache = ReferenceCache(tmp_path, "digest")
    outputs = {"a/b": np.arange(3, dtype=ml_dtypes.bfloat16), "file": np.array([[True]]),
               "c": np.zeros((0, 2), np.int64)}
    assert cache.save("truth", "0", outputs)
    found = cache.load("truth", "0")
    assert list(found) == list(outputs)
    assert all(found[n].dtype == v.dtype and np.array_equal(found[n], v)
               for n, v in outputs.items())
    assert cache.load("reference", "0") is None


def test_without_truth_or_reference_the_report_says_so():
    for sides in ((reference(), None), (None, truth())):
        report = judge(good(), *sides, PLAN, spec=SPEC)
        assert report.accepted
        assert not report.noise_floor
        assert report.worst_rho is None
        assert any("no noise floor" in note for note in report.notes)
        assert not judge(ToySession(Toy(weights(1))), *sides, PLAN, spec=SPEC).accepted
    with pytest.raises(UsageError):
        judge(good(), None, None, PLAN)
    with pytest.raises(UsageError, match="spec"):
        judge(good, reference, truth, PLAN)


def test_zero_comparisons_fail():
    report = judge(good(), reference(), truth(), ())
    assert report.verdict == "fail"
    assert report.comparisons == 0
    empty = ModelSpec(SPEC.inputs, (), SPEC.dims)
    nothing = [ToySession(Toy(weights()), tamper=lambda o: {}, spec=empty) for _ in range(3)]
    assert judge(*nothing, PLAN).verdict == "fail"


def test_an_output_that_is_always_empty_fails():
    spec = replace(SPEC, outputs=(*SPEC.outputs, TensorSpec("none", "float32", ("batch", 0))))

    def session(dtype="float32"):
        return ToySession(Toy(weights(), dtype), spec=spec,
                          tamper=lambda o: o | {"none": np.zeros((len(o["key"]), 0), dtype)})

    report = judge(session(), session(), session("float64"), PLAN)
    assert [r.output for r in report.failures] == ["none"]
    assert "never compared" in report.failures[0].reason


def hanging(*shapes, seconds=3):
    def before(feeds):
        if feeds["input_ids"].shape in shapes:
            time.sleep(seconds)
        return feeds
    return Opener(lambda: ToySession(Toy(weights()), before=before))


def test_a_hang_costs_its_own_shape_only():
    opener = hanging((3, 7), seconds=30)
    report = judge(opener, reference(), truth(), PLAN, settings=Settings(case_seconds=2))
    hung = [r for r in report.failures if "no result within 2 s" in r.reason]
    assert len(hung) == 1
    assert opener.opened == 2
    shapes = {case.label: case.shape for case in PLAN.cases}
    assert {shapes[r.case] for r in report.failures} == {"batch=3 sequence=7"}
    assert all("an earlier case of this shape" in r.reason for r in report.failures
               if r not in hung)
    assert {c.shape for c in report.cases} == {c.shape for c in PLAN.cases}
    assert report.comparisons > 20


def test_a_model_that_hangs_everywhere_is_given_up():
    shapes = {(dict(c.sizes)["batch"], dict(c.sizes)["sequence"]) for c in PLAN.cases}
    opener = hanging(*shapes)
    report = judge(opener, reference(), truth(), PLAN, settings=Settings(case_seconds=0.2))
    assert len([r for r in report.failures if "no result within" in r.reason]) == 3
    assert opener.opened == 3
    assert any("never returned" in r.reason for r in report.failures)
    assert not report.comparisons


def test_a_crash_is_recorded_with_its_message_and_the_rest_goes_on():
    def before(feeds):
        if feeds["input_ids"].shape[1] == 7:
            raise MemoryError("could not allocate 7 GiB\nsecond line")
        return feeds

    report = judge(ToySession(Toy(weights()), before=before), reference(), truth(), PLAN)
    assert {r.reason for r in report.failures} == {"MemoryError: could not allocate 7 GiB"}
    assert report.comparisons
    assert len(report.cases) == len(PLAN.cases)


def test_a_candidate_that_cannot_be_opened_fails_every_case():
    def refuse():
        raise OSError("no such file")

    report = judge(refuse, reference(), truth(), PLAN)
    assert report.verdict == "fail"
    assert len(report.failures) >= len(PLAN.cases)


@pytest.mark.parametrize("side", ["reference", "truth"])
def test_a_source_that_fails_itself_is_a_failure_not_a_pass(side):
    def before(feeds):
        raise ValueError("position 514 is out of range")

    sides = {"reference": reference(), "truth": truth()}
    sides[side] = ToySession(Toy(weights()), before=before)
    report = judge(good(), sides["reference"], sides["truth"], PLAN)
    assert report.verdict == "fail"
    assert f"the {side} itself fails" in report.failures[0].reason
    lazily = judge(good(), lambda: sides["reference"], lambda: sides["truth"], PLAN, spec=SPEC)
    assert lazily.verdict == "fail"
    assert f"the {side} itself fails" in lazily.failures[0].reason


def test_a_truth_that_is_not_finite_is_refused():
    broken = ToySession(Toy(weights(), "float64"),
                        tamper=lambda o: o | {"pooler_output": o["pooler_output"] * np.nan})
    report = judge(good(), reference(), broken, PLAN)
    assert "the truth itself is not finite" in report.failures[0].reason


def test_an_original_that_draws_random_numbers_is_told_apart_from_a_bad_artifact():
    drawn = np.random.default_rng(0)

    def noisy(outputs):
        return {**outputs, "logits": outputs["logits"] + drawn.standard_normal((1, 2)).astype("f4")}

    note = "the original gives other numbers each time"
    random = ToySession(Toy(weights()), tamper=noisy)
    report = judge(good(), random, truth(), PLAN)  # its chance would pass for a noise floor
    assert not report.accepted
    assert any(note in line for line in report.notes)
    assert any(note in failure.reason for failure in report.failures)
    report = judge(ToySession(Toy(weights(1))), random, truth(), PLAN)
    assert any(note in line for line in report.notes)
    report = judge(ToySession(Toy(weights(1))), reference(), truth(), PLAN)
    assert not report.accepted
    assert not any(note in line for line in report.notes)


class TestFullyMaskedRows:
    cases = (Case((("batch", 3), ("sequence", 7)), "masked"),)

    def judged(self, value, reference_value=0.0):
        def tamper(fill):
            def edit(outputs):
                hidden = outputs["last_hidden_state"].copy()
                hidden[1] = fill  # the masked row
                return outputs | {"last_hidden_state": hidden}
            return edit

        return judge(ToySession(Toy(weights()), tamper=tamper(value)),
                     ToySession(Toy(weights()), tamper=tamper(reference_value)), truth(),
                     self.cases)

    def test_their_values_do_not_count(self):
        assert self.judged(5.0).accepted

    def test_a_nan_of_the_reference_is_no_obstacle(self):
        assert self.judged(np.nan, np.nan).accepted
        assert self.judged(0.0, np.nan).accepted

    def test_a_nan_of_the_candidate_alone_is(self):
        assert "masked positions" in self.judged(np.nan).failures[0].reason

    def test_other_rows_do_count(self):
        def edit(outputs):
            hidden = outputs["last_hidden_state"].copy()
            hidden[2] += 1e-3
            return outputs | {"last_hidden_state": hidden}

        report = judge(ToySession(Toy(weights()), tamper=edit), reference(), truth(), self.cases)
        assert report.failures[0].sample == 2


class TestPrecision:
    """Gate B never passes alone."""

    def half(self, variant=None, seed=0):
        toy = Toy({k: v.astype("float16") for k, v in weights(seed).items()}, "float16",
                  variant=variant or Variant())
        return ToySession(toy)

    def exact(self):
        return ToySession(Toy({k: v.astype("float16") for k, v in weights().items()}, "float64"))

    def judged(self, candidate, parent):
        return judge(candidate, self.half(), self.exact(), PLAN,
                     settings=Settings(gate="precision", parent=parent))

    passed = ParitySummary("pass", "id", {"hygiene": "pass", "translation": "pass"}, 1.1, 9)

    def test_with_a_parent_that_passed(self):
        report = self.judged(self.half(Variant(blocks=4)), self.passed)
        assert report.accepted
        assert report.gates == {"hygiene": "pass", "precision": "pass", "translation": "pass"}

    @pytest.mark.parametrize("parent", [
        None, replace(passed, verdict="suspect"),
        replace(passed, gates={"hygiene": "pass"}),
        replace(passed, gates={"hygiene": "pass", "translation": "suspect"})])
    def test_not_without_one(self, parent):
        report = self.judged(self.half(Variant(blocks=4)), parent)
        assert report.verdict == "fail"
        assert any("has not passed" in note for note in report.notes)

    def test_other_weights_fail(self):
        assert self.judged(self.half(seed=1), self.passed).verdict == "fail"


class TestTime:
    def slow(self, seconds):
        def before(feeds):
            time.sleep(seconds * feeds["input_ids"].size / 21)
            return feeds
        return lambda: ToySession(Toy(weights(), "float64"), before=before)

    def test_a_limit_is_kept_and_what_it_excludes_is_listed(self):
        planned = replace(PLAN, max_seconds=1.0)
        started = time.perf_counter()
        report = judge(good(), reference(), self.slow(0.4), planned, spec=SPEC)
        assert time.perf_counter() - started < 2
        assert report.left_out
        assert all("budget remain" in left.reason for left in report.left_out)
        assert len(report.cases) + len(report.left_out) == len(planned.cases)
        assert any("coverage is incomplete" in note for note in report.notes) == (
            "sequence=7" not in {size for c in report.cases for size in c.shape.split()})

    def test_a_limit_of_nothing_leaves_the_first_case(self):
        for precise in (truth(), truth):  # open, and run ahead
            report = judge(good(), reference(), precise, replace(PLAN, max_seconds=0.0), spec=SPEC)
            assert report.verdict == "pass"
            assert [case.label for case in report.cases] == [PLAN.cases[0].label]
            assert len(report.left_out) == len(PLAN.cases) - 1
            assert any("coverage is incomplete" in note for note in report.notes)

    def test_a_truth_that_fails_is_not_tried_in_every_case_for_want_of_time(self):
        def broken(feeds):
            raise ValueError("no such layer")

        failing = lambda: ToySession(Toy(weights(), "float64"), before=broken)  # noqa: E731
        report = judge(good(), reference(), failing, replace(PLAN, max_seconds=0.0), spec=SPEC)
        assert report.verdict == "fail"
        assert len(report.cases) == 1

    def test_cases_that_are_not_essential_get_a_share(self):
        pace = Pace(None, share=1.0, started=time.perf_counter(), fill=True)
        pace.took(100, 4.0, essential=True)
        assert pace.refuse(100, essential=True) == ""
        assert "not essential" in pace.refuse(100, essential=False)
        assert pace.refuse(25, essential=False) != ""  # time does not shrink with the size


def test_progress_counts_up():
    seen = []
    judge(good(), reference(), truth, PLAN, spec=SPEC,
          on_progress=lambda *step: seen.append(step))
    assert [s for s in seen if s[0] == "truth"][-1] == ("truth", len(PLAN.cases), len(PLAN.cases))
    assert seen[-1] == ("compare", len(PLAN.cases), len(PLAN.cases))


def test_suspect_is_not_accepted():
    noisy = Rule(m=0.5, m_small=0.5, k=0.0, suspect=100.0, m_max=100.0)
    report = judge(good(), reference(), truth(), PLAN, settings=Settings(rule=noisy))
    assert report.verdict == "suspect"
    assert not report.accepted
    assert report.summary("id").verdict == "suspect"


def test_effects_are_added_and_can_only_reject():
    report = judge(good(), reference(), truth(), PLAN)
    effects = measure_effects(good, truth, plan(SPEC), spec=SPEC, budget=EffectBudget())
    assert {e.output for e in effects} == {"last_hidden_state", "pooler_output", "logits"}
    assert all(e.sqnr_db > 120 for e in effects)
    both = report.with_effects(effects, EffectBudget(set_by="flag"))
    assert both.accepted
    assert both.gates["effect"] == "pass"
    strict = EffectBudget(sqnr_db=300)
    broken = measure_effects(good, truth, PLAN, spec=SPEC, budget=strict)
    assert report.with_effects(broken, strict).verdict == "fail"
    assert report.with_effects((), strict).verdict == "fail"
    failed = judge(ToySession(Toy(weights(1))), reference(), truth(), PLAN)
    assert failed.with_effects(effects, EffectBudget()).verdict == "fail"


def test_a_plan_can_be_plain_cases():
    assert judge(good(), reference(), truth(), PLAN.cases).accepted
    assert judge(good(), reference(), truth(), Plan(PLAN.cases)).accepted
