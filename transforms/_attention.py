"""Attention as one operator: MultiHeadAttention of ONNX Runtime, found by its softmax.

Written here because ONNX Runtime's own fusion joins the matrices of query, key and value, so it
must hold all weights, and because it knows no attention of today's traces (of PyTorch's scaled dot
product: the scale on both sides, rows without any key set to 0). This one moves no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LOWEST = -1e4
"""What masks -inf: its exponential is 0 beside any score, and float16 holds it. A row without any
key, whose maximum would be -inf, stays finite."""

HEADS = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True)
class _Match:
    """One attention.

    Attributes:
        query: [batch, queries, heads × size].
        key, value: the same, or [batch, heads, keys, size]; ``keys_axis`` is that of the keys.
        bias: added to the scores; None where nothing is.
        result: [batch, queries, heads × size].
    """

    softmax: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    keys_axis: int
    bias: ir.Value | None
    heads: int
    scale: float
    result: ir.Value


def fuse(model: ir.Model) -> int:
    """Replace every attention that is recognised; how many were."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [match for node in list(model.graph) if node.op_type == "Softmax"
             if (match := _match(node)) is not None]
    biases: dict[ir.Value, ir.Value] = {}
    for match in found:
        _write(model, match, biases)
    if found:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        RemoveUnusedNodesPass()(model)
    return len(found)


def _match(softmax: ir.Node) -> _Match | None:
    along = softmax.attributes.get("axis")
    if along is not None and along.value not in (-1, 3):
        return None
    scores, bias = _unbiased(softmax.inputs[0])
    scores, factor = _unscaled(scores)
    product = _made_by(scores, "MatMul")
    result = _heads_joined(_weighted(softmax))
    if product is None or result is None:
        return None
    weighted, joined = result
    left, before = _unscaled(product.inputs[0])
    right, behind = _unscaled(product.inputs[1])
    query = _split(left, HEADS)
    key = _key(right)
    value = weighted.inputs[1]
    if query is None or key is None or value is None:
        return None
    flat_key, flat_value = _split(key[0], key[1]), _split(value, HEADS)
    heads = _heads(query[1], query[0])
    if heads is None:
        return None
    if flat_key is not None and flat_value is not None:
        keys, values, axis = flat_key[0], flat_value[0], 1
    elif key[1] == HEADS:
        keys, values, axis = key[0], value, 2
    else:
        return None
    return _Match(softmax, query[0], keys, values, axis, bias, heads, factor * before * behind,
                  joined)


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """A small constant's value."""
    if value is None:
        return None
    tensor = value.const_value
    node = _made_by(value, "Constant")
    if tensor is None and node is not None and "value" in node.attributes:
        tensor = node.attributes["value"].value
    return tensor.numpy() if tensor is not None and tensor.size <= 8 else None


def _unbiased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and what is added to them."""
    node = _made_by(value, "Add")
    if node is None:
        return value, None
    for scores, bias in (node.inputs, reversed(node.inputs)):
        inner, _ = _unscaled(scores)
        if _made_by(inner, "MatMul") is not None:
            return scores, bias
    return None, None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value without the constant it is multiplied with, and that constant."""
    node = _made_by(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    left, right = node.inputs
    factor = _constant(right)
    if factor is None and node.op_type == "Mul":
        left, factor = right, _constant(left)
    if factor is None or factor.size != 1:
        return value, 1.0
    number = float(factor.reshape(()))
    return left, number if node.op_type == "Mul" else 1 / number


def _weighted(softmax: ir.Node) -> ir.Node | None:
    """The product of the probabilities with the values; NaN may have been made 0 in between."""
    uses = [use.node for use in softmax.outputs[0].uses()]
    operators = sorted(node.op_type for node in uses)
    if operators == ["IsNaN", "Where"]:
        uses = [use.node for node in uses if node.op_type == "Where"
                for use in node.outputs[0].uses()]
    alone = len(uses) == 1 and uses[0].op_type == "MatMul"
    return uses[0] if alone else None


def _heads_joined(product: ir.Node | None) -> tuple[ir.Node, ir.Value] | None:
    """The product, and its rows with all heads side by side."""
    node = product
    while node is not None:
        uses = [use.node for use in node.outputs[0].uses() if use.node.op_type != "Shape"]
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return None
        (after,) = uses
        perm = after.attributes.get("perm")
        if after.op_type == "Transpose" and perm is not None and tuple(perm.value) == HEADS:
            last = [use.node for use in after.outputs[0].uses() if use.node.op_type != "Shape"]
            ended = len(last) == 1 and last[0].op_type == "Reshape"
            return (product, last[0].outputs[0]) if ended and product is not None else None
        # PyTorch states the shape that the product already has.
        node = after if after.op_type == "Reshape" or _zeroes_blind_rows(after) else None
    return None


def _zeroes_blind_rows(node: ir.Node) -> bool:
    """Whether a product is the exporter's, which makes 0 of the rows that see no key at all."""
    if node.op_type != "Mul":
        return False
    casts = (_made_by(value, "Cast") for value in node.inputs)
    factors = [*node.inputs, *(cast.inputs[0] for cast in casts if cast is not None)]
    return any(_made_by(value, "ReduceMax") is not None for value in factors)


def _split(value: ir.Value | None, perm: tuple[int, ...]) -> tuple[ir.Value, ir.Value] | None:
    """What was cut into heads and transposed so, and the shape it was cut into."""
    turned = _made_by(value, "Transpose")
    if turned is None or tuple(turned.attributes["perm"].value) != perm:
        return None
    cut = _made_by(turned.inputs[0], "Reshape")
    if cut is None or cut.inputs[0] is None or cut.inputs[1] is None:
        return None
    return cut.inputs[0], cut.inputs[1]


def _key(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The key before it was turned for the product, and how heads were moved to the front."""
    node = _made_by(value, "Transpose")
    if value is None or node is None:
        return None
    perm = tuple(node.attributes["perm"].value)
    if perm == (0, 1, 3, 2) and node.inputs[0] is not None:
        return node.inputs[0], HEADS
    return (value, perm) if perm == (0, 2, 3, 1) else None


def _heads(shape: ir.Value, flat: ir.Value) -> int | None:
    """How many heads a reshape makes: stated, or the width over a head's size."""
    sizes = _last_two(shape)
    if sizes is None:
        return None
    heads, size = sizes
    if heads > 0:
        return heads
    width = _width(flat)
    return width // size if width and size > 0 and not width % size else None


def _last_two(shape: ir.Value) -> tuple[int, int] | None:
    stated = _constant(shape)
    if stated is not None and stated.size == 4:
        return int(stated[2]), int(stated[3])
    node = _made_by(shape, "Concat")
    if node is None or len(node.inputs) != 4:
        return None
    heads, size = (_constant(v) for v in node.inputs[2:])
    return None if heads is None or size is None else (int(heads[0]), int(size[0]))


def _width(value: ir.Value) -> int | None:
    """Length of the last axis, from a bias or a matrix."""
    node = value.producer()
    if node is None or node.op_type not in ("Add", "MatMul"):
        return None
    for given in node.inputs:
        if given is None:
            continue
        turned = _made_by(given, "Transpose")
        source = turned.inputs[0] if turned is not None else given
        stored = source is not None and source.producer() is None and source.shape is not None
        if stored and source is not None and source.shape is not None:
            length = source.shape[0 if turned is not None else -1]
            return length if isinstance(length, int) else None
    return next((w for given in node.inputs if given is not None and (w := _width(given))), None)


def _write(model: ir.Model, match: _Match, biases: dict[ir.Value, ir.Value]) -> None:
    import onnx_ir as ir

    bias = None
    if match.bias is not None:
        if match.bias not in biases:
            biases[match.bias] = _spread(model, match)
        bias = biases[match.bias]
    node = ir.node(
        "MultiHeadAttention", [match.query, match.key, match.value, None, None, bias],
        {"num_heads": match.heads, "scale": match.scale}, domain="com.microsoft")
    made = node.outputs[0]
    old = match.result
    last = old.producer()
    assert last is not None
    model.graph.insert_before(last, node)
    made.name, made.type, made.shape = f"{old.name}:attention", old.type, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    old.name, made.name = made.name, old.name


def _spread(model: ir.Model, match: _Match) -> ir.Value:
    """The bias without -inf and as large as the operator wants it: over every query and key."""
    import numpy as np
    import onnx_ir as ir

    from .quantize import constant, insert

    assert match.bias is not None
    name, before = f"{match.bias.name}:bias", match.softmax
    lowest = constant(model, "attention:lowest", np.array(LOWEST, np.float32))
    finite = insert(before, "Max", [match.bias, lowest], name=f"{name}.finite")
    lengths = [constant(model, "attention:ones", np.ones(2, np.int64))]
    for given, axis in ((match.query, 1), (match.key, match.keys_axis)):
        shape = insert(before, "Shape", [given], name=f"{name}.{given.name}.shape")
        place = constant(model, f"attention:axis{axis}", np.array([axis], np.int64))
        lengths.append(insert(before, "Gather", [shape.outputs[0], place], {"axis": 0},
                              name=f"{name}.{given.name}.length").outputs[0])
    target = insert(before, "Concat", lengths, {"axis": 0}, name=f"{name}.target")
    spread = insert(before, "Expand", [finite.outputs[0], target.outputs[0]], name=name)
    spread.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return spread.outputs[0]
