"""Fusions of ONNX Runtime: equal results, a target in the manifest, and a limit that is stated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphs as graphs
import pytest
from modelport import artifacts, runtimes, transforms
from modelport.artifacts import Artifact, onnx_files
from modelport.errors import BackendUnavailable, UsageError
from modelport.transforms import fuse


@pytest.mark.parametrize("opset", [11, 17])
def test_fused_and_equal(
    opset: int, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported("bert", opset)
    simple = transforms.get("simplify").apply(onnx_files.load(parent.root), {}).model
    result = transforms.get("fuse").apply(simple, {})
    assert result.target == {"runtime": "onnxruntime"}
    assert result.notes["fused"]["com.microsoft::SkipLayerNormalization"] == 4
    assert result.notes["nodes_after"] < result.notes["nodes_before"]
    for batch, length in ((1, 1), (3, 17)):
        feeds = graphs.feeds_of(parent, batch, length)
        expected = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
        actual = graphs.run(result.model, feeds, tmp_path / "b")
        for e, a in zip(expected, actual, strict=True):
            assert np.allclose(e, a, rtol=1e-4, atol=1e-5)
    before, after = onnx_files.describe(parent.root), onnx_files.describe(tmp_path / "b")
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert after.opsets == {"": opset, "com.microsoft": 1}


def test_only_the_runtime_it_is_tied_to_opens_it(
    exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    import dataclasses

    parent = exported("bert")
    tied = Artifact(parent.root, dataclasses.replace(
        parent.manifest, target={"runtime": "onnxruntime"}))
    with pytest.raises(BackendUnavailable, match="those of onnxruntime"):
        runtimes.get("openvino").open(tied)
    assert artifacts.read(parent.root).manifest.target == {}


def test_what_cannot_be_fused_is_refused(
    monkeypatch: pytest.MonkeyPatch, exported: Callable[..., Artifact]
) -> None:
    monkeypatch.setattr(fuse, "LIMIT", 1000)
    with pytest.raises(UsageError, match="holds all weights"):
        transforms.get("fuse").apply(onnx_files.load(exported("bert").root), {})
