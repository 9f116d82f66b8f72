"""Attention as one operator: MultiHeadAttention of ONNX Runtime, found by its softmax.

Written here because ONNX Runtime's own fusion joins the matrices of query, key and value, so it
must hold all weights, and because it knows no attention of today's traces (of PyTorch's scaled dot
product: the scale on both sides, rows without any key set to 0). This one moves no weight. Over a
cache, see :mod:`._cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _cache
from ._cache import Cache, Lengths, States
from ._values import HEADS, constant_of, length_of, made_by, split

if TYPE_CHECKING:
    import onnx_ir as ir

LOWEST = -1e4
"""What masks -inf: its exponential is 0 beside any score, and float16 holds it. A row without any
key, whose maximum would be -inf, stays finite."""


ROWS = 3
"""Axes of what attention gives: batch, queries, width."""


@dataclass(frozen=True, slots=True)
class _Match:
    """One attention.

    Attributes:
        key, value: the same kind both; a plain value is [batch, heads, keys, size].
        bias: added to the scores; None where nothing is.
        ends: what gives heads back their place, [batch, queries, heads, size] to
            [batch, queries, heads × size] or another shape.
    """

    softmax: ir.Node
    query: States
    key: States | ir.Value | Cache
    value: States | ir.Value | Cache
    bias: ir.Value | None
    scale: float
    ends: list[ir.Node]


def fuse(model: ir.Model) -> int:
    """Replace every attention that is recognised; how many were."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [match for node in list(model.graph) if node.op_type == "Softmax"
             if (match := _match(node)) is not None]
    biases: dict[ir.Value, ir.Value] = {}
    lengths: dict[tuple[ir.Value | None, bool], Lengths] = {}
    for match in found:
        _write(model, match, biases, lengths)
    if found:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        RemoveUnusedNodesPass()(model)
        model.graph.sort()  # what reads a cache may stand before the attention that now writes it
    return len(found)


def _match(softmax: ir.Node) -> _Match | None:
    along = softmax.attributes.get("axis")
    if along is not None and along.value not in (-1, 3):
        return None
    scores, bias = _unbiased(softmax.inputs[0])
    scores, factor = _unscaled(scores)
    product = made_by(scores, "MatMul")
    result = _heads_joined(_weighted(softmax))
    if product is None or result is None:
        return None
    weighted, ends = result
    left, before = _unscaled(product.inputs[0])
    right, behind = _unscaled(product.inputs[1])
    query = _cache.states(left)
    key = _key(right)
    value = weighted.inputs[1]
    if query is None or key is None or value is None:
        return None
    read = _read(key, value, query.heads, bias)
    if read is None:
        return None
    return _Match(softmax, query, *read, bias, factor * before * behind, ends)


def _read(
    key: tuple[ir.Value, tuple[int, ...]], value: ir.Value, heads: int, bias: ir.Value | None
) -> tuple[States | ir.Value | Cache, States | ir.Value | Cache] | None:
    """Keys and values as the operators take them: both kept, both flat, or both by heads."""
    turned, perm = key
    if perm != HEADS:
        cut, flat = split(turned, perm), _cache.states(value, heads)
        return None if cut is None or flat is None else (States(cut[0], heads), flat)
    kept = _cache.cache(turned), _cache.cache(value)
    if kept[0] is not None and kept[1] is not None:
        same = kept[0].new.heads == kept[1].new.heads
        mask_first = not any(_cache.depends(bias, one.present) for one in kept if one is not None)
        if same and mask_first and heads % kept[0].new.heads == 0:
            return kept[0], kept[1]
    both = _cache.states(turned, heads), _cache.states(value, heads)
    if both[0] is not None and both[1] is not None:
        return both[0], both[1]
    return turned, value


def _unbiased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and what is added to them."""
    node = made_by(value, "Add")
    if node is None:
        return value, None
    for scores, bias in (node.inputs, reversed(node.inputs)):
        inner, _ = _unscaled(scores)
        if made_by(inner, "MatMul") is not None:
            return scores, bias
    return None, None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value without the constant it is multiplied with, and that constant."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    left, right = node.inputs
    factor = constant_of(right)
    if factor is None and node.op_type == "Mul":
        left, factor = right, constant_of(left)
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


def _heads_joined(product: ir.Node | None) -> tuple[ir.Node, list[ir.Node]] | None:
    """The product, and what puts the heads of its rows side by side."""
    node = product
    while node is not None:
        uses = [use.node for use in node.outputs[0].uses() if use.node.op_type != "Shape"]
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return None
        (after,) = uses
        perm = after.attributes.get("perm")
        if after.op_type == "Transpose" and perm is not None and tuple(perm.value) == HEADS:
            ends = [use.node for use in after.outputs[0].uses() if use.node.op_type != "Shape"]
            known = bool(ends) and all(end.op_type == "Reshape" for end in ends)
            return (product, ends) if known and product is not None else None
        # PyTorch states the shape that the product already has.
        node = after if after.op_type == "Reshape" or _zeroes_blind_rows(after) else None
    return None


def _zeroes_blind_rows(node: ir.Node) -> bool:
    """Whether a product is the exporter's, which makes 0 of the rows that see no key at all."""
    if node.op_type != "Mul":
        return False
    casts = (made_by(value, "Cast") for value in node.inputs)
    factors = [*node.inputs, *(cast.inputs[0] for cast in casts if cast is not None)]
    largest = (made_by(value, "ReduceMax") for value in factors)
    # Of the mask, which is opened in those rows: a largest score, say, is a factor of the model's.
    masks = (made_by(one.inputs[0], "Cast") for one in largest if one is not None)
    return any(use.node.op_type == "Or" for cast in masks
               if cast is not None and cast.inputs[0] is not None
               for use in cast.inputs[0].uses())


def _key(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The key before it was turned for the product, and how heads were moved to the front."""
    node = made_by(value, "Transpose")
    if value is None or node is None:
        return None
    perm = tuple(node.attributes["perm"].value)
    if perm == (0, 1, 3, 2) and node.inputs[0] is not None:
        return node.inputs[0], HEADS
    return (value, perm) if perm == (0, 2, 3, 1) else None


def _write(
    model: ir.Model, match: _Match, biases: dict[ir.Value, ir.Value],
    told: dict[tuple[ir.Value | None, bool], Lengths],
) -> None:
    import onnx_ir as ir

    last = match.ends[0]
    alike = match.bias, isinstance(match.key, Cache)
    if alike not in told:
        told[alike] = _cache.lengths(model, match.softmax, match.query, match.key)
    lengths, bias = told[alike], None
    if match.bias is not None:
        if match.bias not in biases:
            biases[match.bias] = _spread(model, match.softmax, match.bias, lengths)
        bias = biases[match.bias]
    if isinstance(match.key, Cache) and isinstance(match.value, Cache):
        made = _cache.write(model, last, match.query, (match.key, match.value), bias,
                            match.scale, lengths)
    else:
        given = (match.query, match.key, match.value)
        taken = [_cache.turned(last, one) if isinstance(one, States) else one
                 for one in given if not isinstance(one, Cache)]
        node = ir.node("MultiHeadAttention", [*taken, None, None, bias],
                       {"num_heads": match.query.heads, "scale": match.scale},
                       domain="com.microsoft")
        model.graph.insert_before(last, node)
        made = node.outputs[0]
    made.name = f"{last.outputs[0].name}:attention"
    made.type = ir.TensorType(ir.DataType.FLOAT)
    for end in match.ends:
        old = end.outputs[0]
        if length_of(end.inputs[1]) != ROWS:
            end.replace_input_with(0, made)  # any other shape of the same numbers
            continue
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        if made.is_graph_output():
            made.shape = old.shape
            old.name, made.name = made.name, old.name


def _spread(model: ir.Model, before: ir.Node, bias: ir.Value, told: Lengths) -> ir.Value:
    """The bias without -inf and as large as the operator wants it: over every query and key."""
    import numpy as np
    import onnx_ir as ir

    from .quantize import constant, insert

    name = f"{bias.name}:bias"
    lowest = constant(model, "attention:lowest", np.array(LOWEST, np.float32))
    ones = constant(model, "attention:ones", np.ones(2, np.int64))
    finite = insert(before, "Max", [bias, lowest], name=f"{name}.finite")
    target = insert(before, "Concat", [ones, told.queries, told.keys], {"axis": 0},
                    name=f"{name}.target")
    spread = insert(before, "Expand", [finite.outputs[0], target.outputs[0]], name=name)
    spread.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return spread.outputs[0]
