"""The same checkpoint, options and versions give the same bytes, in any directory and process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from modelport import artifacts

EXPORT = """
import sys
from pathlib import Path
from modelport import pipeline
pipeline.export("onnx", pipeline.ModelRequest(sys.argv[1]), Path(sys.argv[2]), validate=False)
"""


def test_two_exports_are_byte_identical(tiny, tmp_path, monkeypatch):
    source = tiny("bert", "feature-extraction")
    for place in ("a", "b/deeper/still"):
        monkeypatch.setenv("PYTHONHASHSEED", "1" if place == "a" else "2")
        monkeypatch.setenv("MODELPORT_CACHE", str(tmp_path / f"cache-{place[0]}"))
        subprocess.run(
            [sys.executable, "-c", EXPORT, str(source), str(tmp_path / place)],
            check=True, capture_output=True, cwd=tmp_path,
        )
    first, second = (
        artifacts.verify(tmp_path / place).manifest for place in ("a", "b/deeper/still")
    )
    assert first.identity == second.identity
    assert first.files == second.files
    left, right = (
        Path(tmp_path, place, "model.onnx").read_bytes() for place in ("a", "b/deeper/still")
    )
    assert left == right
    assert str(tmp_path).encode() not in left
    assert str(source).encode() not in left
