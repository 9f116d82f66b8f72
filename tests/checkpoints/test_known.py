"""A pair that was measured not to export is refused before any work, with what works instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import page
import pytest
from measure import Record
from modelport import pipeline
from modelport.checkpoints import known
from modelport.errors import ExportError
from modelport.exporters.onnx import OnnxOptions


@pytest.fixture
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "known.json"
    file.write_text(json.dumps({"transformers": "5.23.0", "onnx": {"distilbert": {"fill-mask": {
        "cause": "a dimension came out static", "torchscript": True,
        "tasks": ["feature-extraction"]}}}}))
    monkeypatch.setattr(known, "_FILE", file)


@pytest.mark.usefixtures("_measured")
def test_refused_with_the_cause_and_what_works(tiny: Callable[..., Path], tmp_path: Path) -> None:
    request = pipeline.ModelRequest(str(tiny("distilbert")))
    with pytest.raises(ExportError, match="distilbert with fill-mask is known") as e:
        pipeline.export("onnx", request, tmp_path / "out")
    assert "a dimension came out static" in str(e.value)
    assert "modelport export torchscript" in e.value.allowed
    assert "--task feature-extraction" in e.value.allowed
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_measured")
def test_a_strategy_of_ones_own_choice_is_tried(tiny: Callable[..., Path], tmp_path: Path) -> None:
    request = pipeline.ModelRequest(str(tiny("distilbert")))
    artifact = pipeline.export("onnx", request, tmp_path / "out", OnnxOptions(strategy="trace"),
                               validate=False)
    assert artifact.manifest.facts["strategy"] == "trace"


def test_the_file_that_ships_is_what_the_measurements_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = json.loads(page.RESULTS.read_text("utf-8"))
    monkeypatch.setattr(page, "environment", lambda: measured["environment"])
    found = page.known_failures([Record.of(value) for value in measured["records"]])
    assert page.KNOWN == known._FILE
    assert found == json.loads(known._FILE.read_text("utf-8"))
    assert found["onnx"]
