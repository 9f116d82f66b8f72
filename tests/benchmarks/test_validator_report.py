"""The published page is a view of the recorded counts, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import modelport

HERE = Path(modelport.__file__).parent / "benchmarks"


def test_the_page_is_made_from_the_records() -> None:
    specification = importlib.util.spec_from_file_location(
        "_validator_report", HERE / "_validator_report.py"
    )
    assert specification is not None
    assert specification.loader is not None
    report = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(report)
    records = json.loads((HERE / "results" / "validator.json").read_text(encoding="utf-8"))
    page = (HERE / "results" / "validator.md").read_text(encoding="utf-8")
    assert report.markdown(records) == page


def test_every_fault_in_float32_was_rejected_and_no_correct_run_was() -> None:
    """What the README says; a run that finds otherwise has to change the README too."""
    records = json.loads((HERE / "results" / "validator.json").read_text(encoding="utf-8"))
    found = records["faults"]["result"]
    for place in ("onnx", "torch"):
        outcomes = [o for kinds in found[place].values() for o in kinds.values()]
        assert len(outcomes) > 100
        assert not any(o["accepted"] for o in outcomes)
    runs = [r for r in records["alarms"]["result"] if "Load model from" not in r["by"]]
    assert len(runs) >= 200
    assert all(r["accepted"] for r in runs)
