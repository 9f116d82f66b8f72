"""onnxsim on the graph without its weights: fewer nodes, same names, same axes, same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
from modelport import transforms
from modelport.artifacts import Artifact, onnx_files


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("opset", [11, 17])
def test_simpler_and_equal(
    kind: str, opset: int, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported(kind, opset)
    result = transforms.get("simplify").apply(onnx_files.load(parent.root), {})
    assert result.changed
    assert result.precision is None
    assert result.notes["nodes_after"] < result.notes["nodes_before"]
    for batch, length in ((1, 1), (3, 17)):
        feeds = graphs.feeds_of(parent, batch, length)
        expected = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
        actual = graphs.run(result.model, feeds, tmp_path / "b")
        for e, a in zip(expected, actual, strict=True):
            assert np.allclose(e, a, rtol=1e-4, atol=1e-5)
    before, after = onnx_files.describe(parent.root), onnx_files.describe(tmp_path / "b")
    assert (after.inputs, after.outputs, after.opsets) == (
        before.inputs, before.outputs, before.opsets)
    assert after.weight_bytes["float32"] <= before.weight_bytes["float32"] * 1.01


def test_weights_are_neither_read_nor_folded(
    exported: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: ir.ExternalTensor) -> np.ndarray:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", refused)
    model = onnx_files.load(exported("bert", 17).root)
    before = {v.name for v in model.graph.initializers.values()
              if isinstance(v.const_value, ir.ExternalTensor)}
    after = {v.name for v in transforms.get("simplify").apply(model, {}).model.graph
             .initializers.values() if isinstance(v.const_value, ir.ExternalTensor)}
    assert after == before
