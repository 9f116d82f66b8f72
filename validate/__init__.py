"""The judge of every artifact: comparison, shape matrix, acceptance rule, reports.

Receives sessions, never opens one, and imports no framework.

    cases = plan(spec)
    report = judge(candidate, reference, truth, cases, spec=spec)
    if not report.accepted: ...
"""

from __future__ import annotations

from .bisect import Culprit, Point, Probe, Reproduction, Tap, find_first, write_reproduction
from .effects import Effect, EffectBudget, read_budget
from .generation import compare_tokens, diversity
from .html import to_html
from .inputs import Case, draw, file_cases, given_case, text_cases
from .isolate import IsolatedSession
from .judge import Progress, Settings, judge, measure_effects, run_ahead
from .junit import to_junit
from .matrix import MAX_MEMORY, PADDINGS, LeftOut, Plan, admits, plan
from .report import CaseRecord, ParityReport, Result, from_json, joined
from .rule import Rule, Verdict
from .suppliers import ReferenceCache, SessionSource
from .terminal import markdown, table

__all__ = [
    "MAX_MEMORY",
    "PADDINGS",
    "Case",
    "CaseRecord",
    "Culprit",
    "Effect",
    "EffectBudget",
    "IsolatedSession",
    "LeftOut",
    "ParityReport",
    "Plan",
    "Point",
    "Probe",
    "Progress",
    "ReferenceCache",
    "Reproduction",
    "Result",
    "Rule",
    "SessionSource",
    "Settings",
    "Tap",
    "Verdict",
    "admits",
    "compare_tokens",
    "diversity",
    "draw",
    "file_cases",
    "find_first",
    "from_json",
    "given_case",
    "joined",
    "judge",
    "markdown",
    "measure_effects",
    "plan",
    "read_budget",
    "run_ahead",
    "table",
    "text_cases",
    "to_html",
    "to_junit",
    "write_reproduction",
]
