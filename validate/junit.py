"""JUnit XML: one test case for each output, shape and padding."""

from __future__ import annotations

import re

from ..errors import BackendUnavailable
from .report import ANY, ParityReport, Result
from .rule import worst

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters XML 1.0 has no way to write (section 2.2, production 2)."""


def to_junit(report: ParityReport, name: str = "parity") -> str:
    """The report as JUnit XML text.

    Seeds of one output, shape and padding are one test case. ``fail`` and ``suspect`` are
    failures; a failure of a whole case is an error named ``*``; what was left out is skipped, so
    that it never counts as passed.

    Args:
        name: of the test suite, such as the artifact's path.

    Raises:
        BackendUnavailable: junitparser is not installed.
    """
    try:
        from junitparser import JUnitXml, Skipped, TestCase, TestSuite
    except ImportError as error:
        raise BackendUnavailable("JUnit reports need junitparser",
                                 hint="pip install 'modelport[report]'") from error
    suite = TestSuite(_clean(name))
    shown: set[str] = set()  # a case's time is counted once, though it tests every output
    for key, found in _groups(report).items():
        cases = [r.case for r in found if r.case not in shown]
        shown.update(cases)
        test = TestCase(_clean(f"{key[0]} {key[1]} {key[2]}".rstrip()),
                        classname=_clean(f"{name}.{key[0]}"),
                        time=sum(c.seconds for c in report.cases if c.label in cases))
        test.result = _outcome(found)
        suite.add_testcase(test)
    for left in report.left_out:
        test = TestCase(_clean(f"{ANY} {left.case}"), classname=_clean(f"{name}.left out"),
                        time=0.0)
        test.result = [Skipped(_clean(left.reason))]
        suite.add_testcase(test)
    if report.verdict != "pass" and not report.failures:
        suite.add_testcase(_verdict(report, name))
    document = JUnitXml()
    document.add_testsuite(suite)
    return str(document.tostring().decode("utf-8"))


def _groups(report: ParityReport) -> dict[tuple[str, str, str], list[Result]]:
    cases = {case.label: case for case in report.cases}
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in report.results:
        case = cases.get(result.case)
        key = (result.output, case.shape if case else result.case, case.padding if case else "")
        groups.setdefault(key, []).append(result)
    return groups


def _outcome(found: list[Result]) -> list[object]:
    from junitparser import Error, Failure

    verdict = worst(r.verdict for r in found)
    if verdict == "pass":
        return []
    bad = [r for r in found if r.verdict != "pass"]
    outcome = (Error if bad[0].output == ANY else Failure)(_clean(bad[0].reason), verdict)
    outcome.text = _clean("\n".join(f"{r.case}: {r.verdict}: {r.reason}" for r in bad))
    return [outcome]


def _verdict(report: ParityReport, name: str) -> object:
    """A test case for a verdict that no single comparison explains (a gate, a broken budget)."""
    from junitparser import Failure, TestCase

    gates = [gate for gate, verdict in report.gates.items() if verdict != "pass"]
    test = TestCase(_clean("gates " + ", ".join(gates)), classname=_clean(f"{name}.gates"),
                    time=0.0)
    test.result = [Failure(_clean("; ".join([*report.notes, *report.unmet])), report.verdict)]
    return test


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
