"""Exported tiny models to transform; graphs built by hand are in support."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from modelport import pipeline
from modelport.artifacts import Artifact
from modelport.exporters.onnx import OnnxOptions


@pytest.fixture(scope="session")
def exported(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Artifact]:
    """``exported(kind, opset)`` → an artifact in float32, made once a session."""
    made: dict[tuple[str, int], Artifact] = {}

    def get(kind: str, opset: int = 17) -> Artifact:
        key = (kind, opset)
        if key not in made:
            out = tmp_path_factory.mktemp(f"{kind}-{opset}") / "out"
            request = pipeline.ModelRequest(str(tiny(kind)))
            made[key] = pipeline.export(
                "onnx", request, out, OnnxOptions(opset=opset), validate=False)
        return made[key]

    return get
