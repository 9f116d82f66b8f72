"""ONNX graphs built by hand, and ways to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from modelport.artifacts import Artifact, onnx_files


def graph(
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    weights: Mapping[str, np.ndarray],
    values: Mapping[str, ir.Value],
    opset: int = 17,
) -> ir.Model:
    """A model of these nodes; ``values`` are the initializers' values by name."""
    for name, array in weights.items():
        values[name].const_value = ir.tensor(array, name=name)
    made = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name="g",
                    initializers=[values[name] for name in weights])
    return ir.Model(made, ir_version=8)


def value(
    name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def product(
    weight: np.ndarray, *, kind: str = "matmul", opset: int = 17, scale: float = 1.0
) -> ir.Model:
    """x · weight, times ``scale``; ``kind``: matmul, or transposed or gemm ([outputs, inputs])."""
    width = weight.shape[1 if kind != "matmul" else 0]
    x, w = value("x", ("batch", width)), value("w", weight.shape)
    y = value("y", ("batch", weight.shape[0 if kind != "matmul" else 1]))
    c = value("c", ())
    weights = {"w": weight, "c": np.float32(scale).reshape(())}
    values = {"w": w, "c": c}
    if kind == "gemm":
        b = value("b", (weight.shape[0],))
        weights["b"], values["b"] = np.arange(weight.shape[0], dtype=np.float32), b
        first = [ir.node("Gemm", [x, w, b], {"transB": 1})]
    elif kind == "transposed":
        turned = ir.node("Transpose", [w], {"perm": [1, 0]})
        turned.outputs[0].name = "turned"
        first = [turned, ir.node("MatMul", [x, turned.outputs[0]])]
    else:
        first = [ir.node("MatMul", [x, w])]
    first[-1].outputs[0].name = "p"
    last = ir.node("Mul", [first[-1].outputs[0], c], outputs=[y])
    return graph([*first, last], [x], [y], weights, values, opset)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], root: Path, **options: Any) -> list[Any]:
    """Save a model and run it with ONNX Runtime, without its optimisations if ``plain``."""
    import onnxruntime as ort

    root.mkdir(exist_ok=True)
    onnx_files.save(model, root)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    if options.get("plain"):
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(root / "model.onnx"), settings)
    return list(session.run(None, dict(feeds)))


def feeds_of(artifact: Artifact, batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Feeds of a shape, right-padded where there is a mask."""
    from modelport import validate

    sizes = {n: {"batch": batch, "sequence": sequence}.get(n, d.opt)
             for n, d in artifact.spec.dims.items()}
    padding = "right" if validate.admits(artifact.spec, sizes, "right") else "none"
    return dict(validate.draw(artifact.spec, validate.Case(tuple(sizes.items()), padding, seed)))
