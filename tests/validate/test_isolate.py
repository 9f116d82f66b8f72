"""A model that kills its process, or never answers, costs one case."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from modelport.errors import UsageError
from modelport.validate import IsolatedSession, Settings, draw, isolate, judge, plan
from modelport.validate.isolate import ProcessDied, _receive, _send
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
    truth = varied(Variant(), dtype="float64")
    report = judge(partial(open_toy, "deadly"), varied(Variant()), truth, PLAN,
                   settings=Settings(isolated=True, case_seconds=1))
    assert report.verdict == "fail"
    assert report.sides["candidate"].startswith("toy cpu")
    reasons = {}
    for result in report.failures:
        reasons.setdefault(result.case.rsplit(" ", 3)[0], []).append(result.reason)
    assert set(reasons) == {"batch=3 sequence=2", "batch=3 sequence=7", "batch=1 sequence=7"}
    assert all("signal 6" in reason for reason in reasons["batch=3 sequence=2"])
    first, *later = reasons["batch=3 sequence=7"]
    assert "no result within 1 s; the process was ended" in first
    assert later
    assert all("an earlier case of this shape gave no result" in reason for reason in later)
    assert all(reason == "ValueError: no such shape" for reason in reasons["batch=1 sequence=7"])
    assert report.comparisons


def test_an_open_session_cannot_be_isolated():
    with pytest.raises(UsageError, match="process of its own"):
        judge(open_toy("good"), varied(Variant()), None, PLAN, spec=SPEC,
              settings=Settings(isolated=True))


def test_a_process_does_not_outlive_the_one_that_asked(tmp_path):
    """A parent that is killed takes a child with it that would run for ever."""
    code = f"""
import sys
from functools import partial
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_isolate as here
from modelport.validate import IsolatedSession, draw
if __name__ == "__main__":
    session = IsolatedSession(here.SPEC, partial(here.open_toy, "deadly"))
    session.placement()
    print(session._child._process.pid, flush=True)
    case = next(c for c in here.PLAN.cases if c.shape == "batch=3 sequence=7")
    session.run(draw(here.SPEC, case))
"""
    (tmp_path / "parent.py").write_text(code)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        os.kill(child, 0)  # it lives, in its minute of sleep
        parent.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def fail():
    raise OSError("no such library")


def test_a_child_is_started_ahead_and_kept_for_the_next_session():
    with isolate.kept():
        isolate.start(fail)
        (spare,) = isolate._SPARE
        for kind in ("good", "absent", "good"):
            with isolate.kept(), IsolatedSession(SPEC, partial(open_toy, kind)) as candidate:
                if kind == "absent":
                    with pytest.raises(UsageError, match="FileNotFoundError"):
                        candidate.placement()
                else:
                    assert candidate.run(draw(SPEC, PLAN.cases[0]))
                    assert candidate._child is spare
            assert list(isolate._SPARE) == [spare]
        process = spare._process.pid
        os.kill(process, 0)
    assert isolate._SPARE == []
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_child_that_died_is_not_kept():
    case = next(c for c in PLAN.cases if c.shape == "batch=3 sequence=2")
    with isolate.kept(), IsolatedSession(SPEC, partial(open_toy, "deadly")) as candidate:
        with pytest.raises(ProcessDied, match="signal 6"):
            candidate.run(draw(SPEC, case))
        assert candidate._child is None
    assert isolate._SPARE == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_arrays_arrive_as_they_left(dtype):
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    here, there = multiprocessing.Pipe()
    sent = {"a": np.arange(6).reshape(2, 3).astype(kind), "empty": np.zeros((0, 4), kind),
            "scalar": np.ones((), kind), "columns": np.arange(6).reshape(2, 3).astype(kind).T}
    _send(here, "answer", sent)
    _, found = _receive(there)
    assert list(found) == list(sent)
    for name, value in sent.items():
        assert (found[name].dtype, found[name].shape) == (kind, value.shape)
        np.testing.assert_array_equal(found[name], value)
    with pytest.raises(UsageError, match="no array of numbers"):
        _send(here, "answer", {"words": np.array(["a", None], object)})


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
        with pytest.raises(UsageError, match=r"FileNotFoundError: model\.bin"):
            candidate.run(draw(SPEC, PLAN.cases[0]))
    assert issubclass(ProcessDied, Exception)
