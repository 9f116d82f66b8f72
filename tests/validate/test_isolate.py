"""A model that kills its process, or never answers, costs one case."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
from modelport.errors import UsageError
from modelport.validate import IsolatedSession, judge, plan
from modelport.validate.isolate import ProcessDied
from toy_transformer import Toy, ToySession, Variant, toy_spec, varied, weights

SPEC = toy_spec()
PLAN = plan(SPEC, sizes={"batch": (1, 3), "sequence": (2, 7)})


def deadly(feeds):
    if feeds["input_ids"].shape == (3, 2):
        os.abort()
    if feeds["input_ids"].shape == (3, 7):
        time.sleep(60)
    if feeds["input_ids"].shape == (1, 7):
        raise ValueError("no such shape")
    return feeds


def open_toy(kind: str) -> ToySession:
    if kind == "absent":
        raise FileNotFoundError("model.bin")
    return ToySession(Toy(weights()), before=deadly if kind == "deadly" else None)


def test_aborts_and_hangs_are_recorded_and_the_rest_goes_on():
    with IsolatedSession(SPEC, partial(open_toy, "deadly"), seconds=1) as candidate:
        report = judge(candidate, varied(Variant()), varied(Variant(), dtype="float64"), PLAN)
    assert report.verdict == "fail"
    reasons = {}
    for result in report.failures:
        reasons.setdefault(result.case.rsplit(" ", 3)[0], set()).add(result.reason)
    assert set(reasons) == {"batch=3 sequence=2", "batch=3 sequence=7", "batch=1 sequence=7"}
    assert all("signal 6" in reason for reason in reasons["batch=3 sequence=2"])
    assert all("no result within 1 s" in reason for reason in reasons["batch=3 sequence=7"])
    assert all("no such shape" in reason for reason in reasons["batch=1 sequence=7"])
    assert report.comparisons


def test_a_good_one_gives_what_it_gives_in_this_process():
    with IsolatedSession(SPEC, partial(open_toy, "good")) as candidate:
        assert candidate.placement().device == "cpu"
        report = judge(candidate, varied(Variant()), varied(Variant(), dtype="float64"), PLAN)
        assert report.accepted
        assert report.worst_rho == 1.0
    with pytest.raises(UsageError, match="closed"):
        candidate.run({})


def test_one_that_cannot_be_opened_says_why():
    with IsolatedSession(SPEC, partial(open_toy, "absent")) as candidate:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"FileNotFoundError: model\.bin"):
                candidate.placement()
    assert issubclass(ProcessDied, Exception)
