"""Masks that are read by ranges: what is the mask itself is read as it is, all else is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
from modelport.transforms import _masks

INT, BOOL = ir.DataType.INT64, ir.DataType.BOOL


def indexed(
    *, flat: str = "Flatten", opset: int = 17, width_of: str = "mask", least: int = 0, step: int = 1
) -> ir.Model:
    """``mask[rows, keys] and position >= 0``, as transformers writes it, over a batch of ``x``.

    Args:
        flat: how the mask becomes a vector.
        width_of: whose last size counts the keys of a row.
        least: what positions are held against.
    """
    mask = graphs.value("mask", ("batch", "keys"), BOOL)
    x = graphs.value("x", ("rows", "queries"))
    y = graphs.value("y", ("rows", 1, "queries", "keys"), BOOL)
    numbers = {"zero": 0, "one": 1, "step": step, "least": least, "all": [-1], "first": [0],
               "down": [1, 2, 3], "along": [0, 1, 3], "across": [0, 1, 2], "alone": [1]}
    weights = {name: np.array(number, np.int64) for name, number in numbers.items()}
    v = {name: graphs.value(name, array.shape, INT) for name, array in weights.items()}
    nodes: list[ir.Node] = []

    def node(operator: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        if operator == "Unsqueeze" and opset < 13:
            attributes["axes"] = weights[str(inputs.pop().name)].tolist()
        nodes.append(ir.node(operator, inputs, attributes))
        nodes[-1].outputs[0].name = f"n{len(nodes)}"
        return nodes[-1].outputs[0]

    def size(of: ir.Value, axis: str) -> ir.Value:
        return node("Gather", [node("Shape", [of]), v[axis]])

    def counted(limit: ir.Value, axes: str) -> ir.Value:
        return node("Unsqueeze", [node("Range", [v["zero"], limit, v["step"]]), v[axes]])

    rows, queries = size(x, "zero"), size(x, "one")
    keys, width = size(mask, "one"), size({"mask": mask, "x": x}[width_of], "one")
    vector = (node("Flatten", [mask], axis=2) if flat == "Flatten"
              else node("Reshape", [mask, v["all"]]))
    index = node("Add", [counted(keys, "across"), node("Mul", [counted(rows, "down"), width])])
    read = node("Gather", [vector, index], axis=0)
    if flat == "Flatten":
        read = node("Reshape", [read, node("Shape", [index])])
    asked = (counted(queries, "along"), v["least"])
    certain = (node("GreaterOrEqual", list(asked)) if opset > 11
               else node("Not", [node("Less", list(asked))]))
    both = node("And", [certain, read])
    target = node("Concat", [node("Unsqueeze", [one, v["first"]]) if one is not v["alone"] else one
                             for one in (rows, v["alone"], queries, keys)], axis=0)
    nodes.append(ir.node("Expand", [both, target], outputs=[y]))
    used = {value for one in nodes for value in one.inputs}
    kept = {name: array for name, array in weights.items() if v[name] in used}
    return graphs.graph(nodes, [mask, x], [y], kept, {n: v[n] for n in kept}, opset)


def ranges(model: ir.Model) -> int:
    return sum(node.op_type == "Range" for node in model.graph)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("flat", ["Flatten", "Reshape"])
@pytest.mark.parametrize("opset", [12, 17])
def test_the_mask_is_read_as_it_is(flat: str, opset: int, rows: int, tmp_path: Path) -> None:
    model = indexed(flat=flat, opset=opset)
    feeds = {"mask": np.random.default_rng(0).random((3, 5)) < 0.5,
             "x": np.zeros((rows, 4), np.float32)}
    (expected,) = graphs.run(model, feeds, tmp_path / "a")
    assert ranges(model) == 3
    assert _masks.simplify(model) == 1
    assert ranges(model) == 0
    (actual,) = graphs.run(model, feeds, tmp_path / "b")
    np.testing.assert_array_equal(actual, expected)
    assert actual.shape == (rows, 1, 4, 5)


@pytest.mark.parametrize(("other", "left"), [
    ({"width_of": "x"}, 3), ({"step": 2}, 3), ({"least": 2}, 1)])
def test_what_reads_something_else_is_left(
    other: dict[str, object], left: int, tmp_path: Path
) -> None:
    model = indexed(**other)  # type: ignore[arg-type]
    feeds = {"mask": np.random.default_rng(0).random((3, 5)) < 0.5,
             "x": np.zeros((3, 5), np.float32)}
    before = graphs.run(model, feeds, tmp_path / "a") if "step" not in other else None
    _masks.simplify(model)
    assert ranges(model) == left
    if before is not None:
        np.testing.assert_array_equal(graphs.run(model, feeds, tmp_path / "b")[0], before[0])
