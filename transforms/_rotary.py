"""Rotary positions as one operator: RotaryEmbedding of ONNX Runtime.

x · cos + rotated(x) · sin, where rotated swaps the halves of a head and negates the second. The
angles are computed by the graph as before; the operator reads them as its table, one line for each
token, so nothing limits the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse(model: ir.Model) -> int:
    """Replace every rotation that is recognised; how many were."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = 0
    tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    for node in list(model.graph):
        parts = _match(node) if node.op_type == "Add" else None
        if parts is not None:
            x, angles = parts[0], parts[1:]
            if angles not in tables:
                tables[angles] = _tables(model, node, x, *angles)
            _write(node, x, tables[angles])
            found += 1
    if found:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        RemoveUnusedNodesPass()(model)
    return found


def _match(added: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """What is rotated, [batch, heads, tokens, size], and cosine and sine, [batch, tokens, size]."""
    products = [_made_by(value, "Mul") for value in added.inputs]
    for plain, other in (products, reversed(products)):
        if plain is None or other is None:
            continue
        for rotated, sine in (other.inputs, reversed(other.inputs)):
            x = _rotated(rotated)
            if x is None or x not in plain.inputs:
                continue
            cosine = plain.inputs[1 if plain.inputs[0] is x else 0]
            tables = _table(cosine, "Cos"), _table(sine, "Sin")
            if tables[0] is not None and tables[1] is not None:
                return x, tables[0], tables[1]
    return None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _rotated(value: ir.Value | None) -> ir.Value | None:
    """What [-second half, first half] along the last axis was made from."""
    joined = _made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].value != -1:
        return None
    negated = _made_by(joined.inputs[0], "Neg")
    second = _made_by(negated.inputs[0], "Slice") if negated is not None else None
    first = _made_by(joined.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    # The first half ends where the second begins.
    return first.inputs[0] if _same(first.inputs[2], second.inputs[1]) else None


def _same(left: ir.Value | None, right: ir.Value | None) -> bool:
    import numpy as np

    if left is None or right is None:
        return False
    if left is right:
        return True
    both = left.const_value, right.const_value
    return both[0] is not None and both[1] is not None and np.array_equal(
        both[0].numpy(), both[1].numpy())


def _table(value: ir.Value | None, operator: str) -> ir.Value | None:
    """Cosine or sine of angles that are the same in both halves, before the heads' axis."""
    spread = _made_by(value, "Unsqueeze")
    if spread is None or spread.inputs[0] is None:
        return None
    table = spread.inputs[0]
    node = table.producer()
    while node is not None and node.op_type in ("Mul", "Cast"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != operator:
        return None
    halves = _made_by(node.inputs[0], "Concat")
    twice = halves is not None and len(halves.inputs) == 2 and halves.inputs[0] is halves.inputs[1]
    return table if twice else None


def _tables(
    model: ir.Model, added: ir.Node, x: ir.Value, cosine: ir.Value, sine: ir.Value
) -> list[ir.Value]:
    """Positions, [batch, tokens], and the tables that they are looked up in."""
    import numpy as np

    from .quantize import constant, insert

    name = added.outputs[0].name

    def const(label: str, value: object) -> ir.Value:
        return constant(model, f"rotary:{label}", np.array(value, np.int64))

    def node(operator: str, inputs: list[ir.Value], label: str, **attributes: int) -> ir.Value:
        return insert(added, operator, inputs, attributes, name=f"{name}:{label}").outputs[0]

    lengths = node("Shape", [cosine], "lengths")  # batch or 1, tokens, size
    rows = node("Slice", [lengths, const("0", [0]), const("2", [2])], "rows")
    size = node("Slice", [lengths, const("2", [2]), const("3", [3])], "size")
    half = node("Div", [size, const("2", [2])], "half")
    line = node("Concat", [const("-1", [-1]), half], "line", axis=0)
    tables = [
        node("Reshape", [node("Slice", [t, const("0", [0]), half, const("-1", [-1])], f"{n}.half"),
                         line], n)
        for t, n in ((cosine, "cos"), (sine, "sin"))]
    count = node("ReduceProd", [rows], "count", keepdims=0)
    numbers = node("Range", [const("zero", 0), count, const("one", 1)], "numbers")
    numbered = node("Reshape", [numbers, rows], "numbered")
    batch = node("Slice", [node("Shape", [x], "shape"), const("0", [0]), const("1", [1])], "batch")
    target = node("Concat", [batch, const("1", [1])], "target", axis=0)
    return [node("Expand", [numbered, target], "positions"), *tables]


def _write(added: ir.Node, x: ir.Value, tables: list[ir.Value]) -> None:
    from .quantize import insert

    old = added.outputs[0]
    fused = insert(added, "RotaryEmbedding", [x, *tables], name=f"{old.name}:rotary",
                   domain="com.microsoft")
    made = fused.outputs[0]
    made.type, made.shape = old.type, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    old.name, made.name = made.name, old.name
