"""Zeros around negative numbers are zeros after ONNX Runtime's optimisation, too."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from modelport.exporters._onnx_padding import keep_zeros
from modelport.exporters._torch_capture import quiet


class Pooled(torch.nn.Module):
    def __init__(self, value: float, mode: str = "constant") -> None:
        super().__init__()
        self.value, self.mode = value, mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = {"value": self.value} if self.mode == "constant" else {}
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode=self.mode, **given)
        return torch.nn.functional.max_pool2d(padded, 3, 2)


def exported(module: torch.nn.Module, opset: int, kept: bool = True) -> bytes:
    file = io.BytesIO()
    with quiet():
        torch.onnx.export(module, (torch.zeros(1, 2, 5, 5),), file, input_names=["x"],
                          dynamo=False, opset_version=opset)
    model = ir.from_proto(onnx.load_from_string(file.getvalue()))
    if kept:
        keep_zeros(model)
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(("value", "mode"), [
    (0.0, "constant"), (2.0, "constant"), (0.0, "reflect"),
])
def test_a_padded_pool_is_right(opset: int, value: float, mode: str) -> None:
    x = torch.from_numpy(-1 - np.random.default_rng(0).random((1, 2, 5, 5), np.float32))
    module = Pooled(value, mode)
    session = onnxruntime.InferenceSession(exported(module, opset))
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], module(x).numpy())


def test_what_is_right_already_stays_as_it_is() -> None:
    def nodes(value: float, kept: bool) -> int:
        return len(onnx.load_from_string(exported(Pooled(value), 17, kept)).graph.node)

    assert nodes(2.0, True) == nodes(2.0, False)
    assert nodes(0.0, True) == nodes(0.0, False) + 1
