"""What an operator means or takes differs by opset; here it is what torch meant."""

from __future__ import annotations

import onnx_ir as ir

CLIP_OF_INTEGERS = 12
"""First opset whose Clip, Min and Max take integers (ONNX operator changelog)."""

ZERO_IS_ZERO = 14
"""First opset whose Reshape can be told that 0 is a size (ONNX operator changelog)."""


def keep_zeros(graph: ir.Model, opset: int) -> None:
    """Let a size that is 0 when the graph runs be 0 in each Reshape to computed sizes.

    To ONNX a 0 there says "as it was", which torch never means. Where -1 is among the sizes, both
    at once are not allowed, and it stays as it is.
    """
    if opset < ZERO_IS_ZERO:
        return
    for node in graph.graph.all_nodes():
        if node.op_type == "Reshape" and node.domain == "" and _computed(node.inputs[1]):
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)


def _computed(shape: ir.Value | None) -> bool:
    """Whether sizes are put together from some that are computed and constants above 0."""
    node = shape.producer() if shape is not None else None
    if node is None or node.op_type != "Concat":
        return False
    known = [ir.convenience.get_const_tensor(part) for part in node.inputs if part is not None]
    return None in known and all((part.numpy() > 0).all() for part in known if part is not None)


def clip_integers(graph: ir.Model, opset: int) -> None:
    """Write each Clip of integers as comparisons and choices, which opset 9 has for them."""
    if opset >= CLIP_OF_INTEGERS:
        return
    clips = [node for node in graph.graph.all_nodes()
             if node.op_type == "Clip" and node.domain == ""]
    for node in clips:
        assert node.inputs[0] is not None
        kind = _type(node.inputs[0])
        if kind in (ir.DataType.INT64, ir.DataType.INT32):
            _as_choices(node, kind)


def _type(value: ir.Value) -> ir.DataType | None:
    """The type of a value; a capture leaves some unnamed, and those have their first input's."""
    if value.dtype is not None:
        return value.dtype
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Shape", "Size", "NonZero", "ArgMax", "ArgMin"):
        return ir.DataType.INT64
    if node.op_type in ("Constant", "ConstantOfShape"):
        held = node.attributes.get("value")
        return held.as_tensor().dtype if held is not None else ir.DataType.FLOAT
    source = node.inputs[1 if node.op_type == "Where" else 0]
    return _type(source) if source is not None else None


def _as_choices(node: ir.Node, kind: ir.DataType) -> None:
    value, *bounds = node.inputs
    made: list[ir.Node] = []
    for bound, beyond in zip(bounds, ("Less", "Greater"), strict=False):
        if bound is not None:
            if _type(bound) is not kind:  # torch brings bounds to float for this Clip
                cast = ir.node("Cast", [bound], {"to": kind})
                made.append(cast)
                bound = cast.outputs[0]
            test = ir.node(beyond, [value, bound])
            choice = ir.node("Where", [test.outputs[0], bound, value])
            made += [test, choice]
            value = choice.outputs[0]
    if not made:
        made = [ir.node("Identity", [value])]
        value = made[0].outputs[0]
    assert node.graph is not None
    assert value is not None
    value.dtype = kind
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, node.outputs, [value])
