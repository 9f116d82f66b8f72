"""Operators that mean or take different things at different opsets."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from modelport.exporters._onnx_opsets import clip_integers, keep_zeros
from onnx import TensorProto, helper


def clip(bounds: list[str], opset: int = 11, kind: int = TensorProto.INT64) -> ir.Model:
    info = helper.make_tensor_value_info
    constants = [helper.make_tensor(n, kind, [], [v]) for n, v in (("lo", -2), ("hi", 3))
                 if n in bounds]
    graph = helper.make_graph(
        [helper.make_node("Clip", ["x", *bounds], ["y"])], "g", [info("x", kind, ["n"])],
        [info("y", kind, ["n"])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6)
    return ir.from_proto(model)


@pytest.mark.parametrize("bounds", [["lo", "hi"], ["lo"], ["", "hi"]])
def test_integers_are_clipped_at_opset_11(bounds: list[str]) -> None:
    model = clip(bounds)
    clip_integers(model, 11)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = np.array([-9, -2, 0, 3, 2**60], np.int64)
    low, high = -2 if "lo" in bounds else None, 3 if "hi" in bounds else None
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.clip(x, low, high))


@pytest.mark.parametrize(("opset", "kind"), [(12, TensorProto.INT64), (11, TensorProto.FLOAT)])
def test_where_clip_serves_it_stays(opset: int, kind: int) -> None:
    model = clip(["lo", "hi"], opset, kind)
    clip_integers(model, opset)
    assert [n.op_type for n in model.graph] == ["Clip"]


def test_a_type_that_nothing_states_is_found_by_what_made_it() -> None:
    model = clip(["lo", "hi"])
    node = model.graph[0]
    source = ir.node("Cast", [model.graph.inputs[0]], {"to": ir.DataType.INT64})
    doubled = ir.node("Add", [source.outputs[0], source.outputs[0]])
    model.graph.insert_before(node, [source, doubled])
    node.replace_input_with(0, doubled.outputs[0])
    clip_integers(model, 11)
    assert "Clip" not in [n.op_type for n in model.graph]
    onnx.checker.check_model(ir.to_proto(model))


def test_bounds_of_another_type_are_brought_to_that_of_the_values() -> None:
    model = clip(["lo", "hi"])
    node = model.graph[0]
    bound = ir.node("Cast", [node.inputs[2]], {"to": ir.DataType.FLOAT})
    bound.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.insert_before(node, [bound])
    node.replace_input_with(2, bound.outputs[0])
    clip_integers(model, 11)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    assert session.run(None, {"x": np.array([9], np.int64)})[0] == 3


def reshape(sizes: list[int | str], opset: int = 17) -> ir.Model:
    """Reshape of ``x[n, 3]`` to sizes that are numbers or taken from an axis of ``like``."""
    info, node = helper.make_tensor_value_info, helper.make_node
    nodes = [node("Shape", ["like"], ["shape"])]
    constants = []
    for i, size in enumerate(sizes):
        value = int(size)
        constants.append(helper.make_tensor(f"c{i}", TensorProto.INT64, [1], [value]))
        if isinstance(size, str):
            nodes.append(node("Gather", ["shape", f"c{i}"], [f"s{i}"], axis=0))
    parts = [f"s{i}" if isinstance(size, str) else f"c{i}" for i, size in enumerate(sizes)]
    nodes += [node("Concat", parts, ["sizes"], axis=0), node("Reshape", ["x", "sizes"], ["y"])]
    kind = TensorProto.FLOAT
    inputs = [info("x", kind, ["n", 3]), info("like", kind, ["a", "b"])]
    outputs = [info("y", kind, [None] * len(sizes))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return ir.from_proto(helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def allows(model: ir.Model) -> bool:
    return "allowzero" in next(n for n in model.graph if n.op_type == "Reshape").attributes


def test_a_computed_size_of_zero_is_zero() -> None:
    model = reshape(["0", "1", 3])
    keep_zeros(model, 17)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {"x": np.ones((0, 3), np.float32), "like": np.ones((5, 0), np.float32)}
    assert session.run(None, feeds)[0].shape == (5, 0, 3)


@pytest.mark.parametrize(("sizes", "opset"), [
    (["0", -1], 17), (["0", 0, 3], 17), ([1, 3], 17), (["0", 3], 13)])
def test_a_reshape_that_may_mean_something_else_stays(sizes: list[int | str], opset: int) -> None:
    model = reshape(sizes, opset)
    keep_zeros(model, opset)
    assert not allows(model)
