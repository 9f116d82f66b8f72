"""The judge of every artifact: comparison, shape matrix, acceptance rule, reports.

Receives sessions, never opens one, and imports no framework.

    cases = plan(spec)
    report = judge(candidate, reference, truth, cases, spec=spec)
    if not report.accepted: ...
"""

from __future__ import annotations

from .inputs import Case, draw, file_cases, given_case, text_cases
from .judge import Settings, judge
from .matrix import LeftOut, Plan, plan
from .report import CaseRecord, ParityReport, Result, from_json
from .rule import Rule, Verdict
from .suppliers import ReferenceCache, SessionSource
from .terminal import markdown, table

__all__ = [
    "Case",
    "CaseRecord",
    "LeftOut",
    "ParityReport",
    "Plan",
    "ReferenceCache",
    "Result",
    "Rule",
    "SessionSource",
    "Settings",
    "Verdict",
    "draw",
    "file_cases",
    "from_json",
    "given_case",
    "judge",
    "markdown",
    "plan",
    "table",
    "text_cases",
]
