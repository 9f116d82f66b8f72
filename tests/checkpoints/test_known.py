"""A pair that was measured not to export is refused before any work, with what works instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
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


def test_the_file_that_ships_is_what_the_measurements_write() -> None:
    shipped = json.loads(known._FILE.read_text("utf-8"))
    assert set(shipped) == {"transformers", "onnx"}
