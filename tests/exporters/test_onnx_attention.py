"""Attention without the test of every score for NaN: same results, zero where nothing is seen."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from modelport.exporters._onnx_attention import unguard
from modelport.exporters._torch_capture import quiet

LAYERS = 3


class Masked(torch.nn.Module):
    """Layers of attention under one mask, or under none."""

    def forward(self, query: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = query
        for _ in range(LAYERS):
            found = torch.nn.functional.scaled_dot_product_attention(
                found, query, query, attn_mask=mask)
        return found


class Overflowing(torch.nn.Module):
    """Scores beyond float32's largest, of finite queries, keys and values."""

    def forward(self, query: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        large = query.exp() * 1e30
        return torch.nn.functional.scaled_dot_product_attention(
            large, large, query, attn_mask=mask)


class OwnTest(torch.nn.Module):
    """A test for NaN that is the model's own."""

    def forward(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = torch.softmax(torch.where(mask, scores, -1.0), -1)
        return torch.where(torch.isnan(found), 0.0, found) @ scores.transpose(-1, -2)


def graph(module: torch.nn.Module, opset: int, mask: torch.Tensor) -> ir.Model:
    buffer: Any = io.BytesIO()
    with quiet():
        torch.onnx.export(
            module, (torch.zeros(2, 2, 5, 4), mask), buffer, input_names=["query", "mask"],
            output_names=["out"], dynamo=False, opset_version=opset, do_constant_folding=False,
            dynamic_axes={"query": {0: "b", 2: "q"}, "mask": {0: "b", 2: "q", 3: "q"}})
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def inputs(batch: int = 3, length: int = 7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    query = generator.normal(size=(batch, 2, length, 4)).astype(np.float32)
    mask = generator.random((batch, 1, length, length)) < 0.5
    mask[0, 0, 2], mask[1, 0, 0], mask[2, 0, :, 0] = False, True, True
    return query, mask


@pytest.mark.parametrize("opset", [14, 17, 18, 20])
def test_equals_pytorch_with_rows_that_see_nothing(opset: int) -> None:
    model = graph(Masked(), opset, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    before = [node.op_type for node in model.graph]
    assert unguard(model, opset) == LAYERS == before.count("IsNaN")
    after = [node.op_type for node in model.graph]
    assert "IsNaN" not in after
    assert after.count("ReduceMax") == 1, "the mask is reduced once for all layers"
    query, mask = inputs()
    found = run(model, query=query, mask=mask)
    expected = Masked()(torch.from_numpy(query), torch.from_numpy(mask)).numpy()
    assert not expected[0, :, 2].any()
    assert not found[0, :, 2].any(), "a query that sees nothing gets exactly 0"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_nan_of_the_model_is_not_hidden() -> None:
    model = graph(Overflowing(), 17, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    query, mask = inputs()
    mask[:] = True
    assert np.isfinite(run(model, query=query, mask=mask)).all(), "as PyTorch translates it"
    assert unguard(model, 17) == 1
    expected = Overflowing()(torch.from_numpy(query), torch.from_numpy(mask)).numpy()
    assert np.isnan(expected).all()
    assert np.isnan(run(model, query=query, mask=mask)).all()


def test_a_test_for_nan_that_is_the_models_own_stays() -> None:
    model = graph(OwnTest(), 17, torch.ones(2, 1, 5, 4, dtype=torch.bool))
    assert unguard(model, 17) == 0
    assert "IsNaN" in [node.op_type for node in model.graph]
