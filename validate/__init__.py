"""The judge of every artifact: comparison, shape matrix, acceptance rule, reports.

Receives sessions, never opens one, and imports no framework.

    cases = plan(spec)
    report = judge(candidate, reference, truth, cases, spec=spec)
    if not report.accepted: ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bisect import Culprit, Point, Probe, Reproduction, Tap, find_first, write_reproduction
    from .effects import Effect, EffectBudget, is_scores, measurable, read_budget
    from .generation import compare_tokens, diversity
    from .html import to_html
    from .inputs import Case, draw, file_cases, given_case, text_cases
    from .isolate import IsolatedSession
    from .judging import Progress, Settings, judge, measure_effects, run_ahead
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
    "is_scores",
    "joined",
    "judge",
    "markdown",
    "measurable",
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

_NAMES = {
    "bisect": ("Culprit", "Point", "Probe", "Reproduction",
               "Tap", "find_first", "write_reproduction"),
    "effects": ("Effect", "EffectBudget", "is_scores", "measurable", "read_budget"),
    "generation": ("compare_tokens", "diversity"),
    "html": ("to_html",),
    "inputs": ("Case", "draw", "file_cases", "given_case", "text_cases"),
    "isolate": ("IsolatedSession",),
    "judging": ("Progress", "Settings", "judge", "measure_effects", "run_ahead"),
    "junit": ("to_junit",),
    "matrix": ("MAX_MEMORY", "PADDINGS", "LeftOut", "Plan", "admits", "plan"),
    "report": ("CaseRecord", "ParityReport", "Result", "from_json", "joined"),
    "rule": ("Rule", "Verdict"),
    "suppliers": ("ReferenceCache", "SessionSource"),
    "terminal": ("markdown", "table"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # On first use: the process that runs an artifact needs one module of these.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
