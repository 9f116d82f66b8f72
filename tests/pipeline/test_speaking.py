"""What Bark says, where something in it raises: a verdict, and no traceback."""

from __future__ import annotations

from typing import Any

import pytest
from modelport import validate
from modelport.pipeline import speaking


def judged(hygiene: validate.Verdict) -> validate.ParityReport:
    """The report on an artifact of one part, which is as good as this."""
    part = validate.ParityReport(hygiene, {"hygiene": hygiene, "translation": "pass"},
                                 validate.Rule(), True, 1, (), ())
    artifact: Any = None
    checkpoint: Any = None
    return speaking.judged({"codec": part}, artifact, checkpoint, precision=None, runtime=None,
                           device="cpu", notify=lambda _: None)


def raising(*_: object) -> Any:
    raise ValueError("a node raises")


def test_a_case_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("along", "sampled"):
        monkeypatch.setattr(speaking._Sides, name, raising)
    report = judged("pass")
    assert report.gates == {"hygiene": "pass", "translation": "pass", "generation": "fail"}
    assert [case.label for case in report.cases] == [case.label for case in speaking.CASES]
    failed = {result.case: result.reason for result in report.failures}
    assert failed.keys() >= {case.label for case in speaking.CASES}
    assert set(failed.values()) == {"speaking fails: a node raises"}


def test_nothing_is_said_with_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking._Sides, "along", lambda *_: pytest.fail("it was said"))
    report = judged("fail")
    assert report.verdict == "fail"
    assert "Gate 0 does not pass: codec" in report.notes[-1]
