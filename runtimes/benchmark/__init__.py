"""Measures sessions honestly: one fresh process a cell, raw samples kept, every claim bounded.

    from modelport.runtimes.benchmark import Subject, SweepRequest, run_sweep

    report = run_sweep(SweepRequest((Subject("onnx", "out/onnx", identity),), Path("run")))
    report.require_complete()
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported on first use: the measured process loads this package too, and must stay small.
_PUBLIC: dict[str, str] = {
    "Cell": ".records",
    "CellResult": ".records",
    "Sampling": ".records",
    "Traffic": ".records",
    "Ceilings": ".ceilings",
    "Work": ".ceilings",
    "count_flops": ".ceilings",
    "cores": ".environment",
    "CorpusSource": ".corpus",
    "built_in": ".corpus",
    "from_text": ".corpus",
    "ranges": ".feeds",
    "Subject": ".sweep",
    "SweepRequest": ".sweep",
    "plan": ".sweep",
    "REPORT": ".report",
    "Report": ".reading",
    "SOURCE": ".report",
    "RunReport": ".report",
    "Row": ".report",
    "Recommendation": ".report",
    "run_sweep": ".summary",
    "load_report": ".reading",
    "report_file": ".reading",
    "RunComparison": ".against",
    "compare_runs": ".against",
    "summarise": ".summary",
    "renderable": ".views",
    "footnotes": ".views",
    "comparison_renderable": ".views",
    "comparison_table": ".views",
    "markdown": ".views",
    "html": ".page",
    "Contestant": ".generation",
    "GENERATION": ".generation",
    "GenerationReport": ".generation",
    "GenerationRequest": ".generation",
    "Shape": ".generation",
    "run_generation": ".generation",
    "SelfTest": ".selftest",
    "self_test": ".selftest",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
