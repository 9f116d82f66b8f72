"""Attention rows without any key, set to zero by one product instead of a test of every score.

PyTorch's scaled dot-product attention returns 0 for a query whose keys are all masked. Its ONNX
translation lets the softmax of such a row become NaN, then tests every score for NaN: two more
passes over [batch, heads, queries, keys] in every layer, and a NaN that the model really made is
hidden as 0. Here the mask of such a row is opened, so that its softmax is finite, and its result is
multiplied by 0. A mask is reduced once, however many layers use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

AXES_AS_INPUT = 18
"""First opset whose ReduceMax takes its axes as an input (ONNX operator changelog)."""


@dataclass(frozen=True, slots=True)
class _Guarded:
    """One attention with the test for NaN.

    Attributes:
        mask: bool[..., queries, keys], False where a query must not see a key.
        bias: the choice between 0 and -inf that the mask makes, added to the scores.
        guard: the choice between 0 and a probability that the test makes.
        product: of the probabilities with the values.
    """

    mask: ir.Value
    bias: ir.Node
    softmax: ir.Node
    guard: ir.Node
    product: ir.Node


def unguard(model: ir.Model, opset: int) -> int:
    """Take the test for NaN out of every attention that masks by -inf; how many had one."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = [match for node in list(model.graph) if node.op_type == "Softmax"
             if (match := _match(node)) is not None]
    opened: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for match in found:
        if match.mask not in opened:
            opened[match.mask] = _open(match, opset)
        mask, seen = opened[match.mask]
        match.bias.replace_input_with(0, mask)
        match.guard.outputs[0].replace_all_uses_with(match.softmax.outputs[0])
        _keep(match.product, seen)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _keep(product: ir.Node, seen: ir.Value) -> None:
    """Multiply what a node gives by ``seen``, under the name that it had."""
    result = product.outputs[0]
    node = ir.node("Mul", [result, seen])
    kept = node.outputs[0]
    kept.type, kept.shape = result.type, result.shape
    result.replace_all_uses_with(kept, replace_graph_outputs=True)
    node.replace_input_with(0, result)
    result.name, kept.name = f"{result.name}:all", result.name
    assert product.graph is not None
    product.graph.insert_after(product, node)


def _match(softmax: ir.Node) -> _Guarded | None:
    along = softmax.attributes.get("axis")
    guard = _guard(softmax)
    if guard is None or (along is not None and along.as_int() not in (-1, 3)):
        return None
    bias = _bias(softmax.inputs[0])
    uses = [use.node for use in guard.outputs[0].uses()]
    if bias is None or bias.inputs[0] is None or guard.outputs[0].is_graph_output():
        return None
    if len(uses) != 1 or uses[0].op_type != "MatMul":
        return None
    return _Guarded(bias.inputs[0], bias, softmax, guard, uses[0])


def _guard(softmax: ir.Node) -> ir.Node | None:
    """``Where(IsNaN(p), 0, p)`` where that is all that becomes of the probabilities p."""
    uses = {use.node.op_type: use.node for use in softmax.outputs[0].uses()}
    if set(uses) != {"IsNaN", "Where"} or len(softmax.outputs[0].uses()) != 2:
        return None
    test, choice = uses["IsNaN"], uses["Where"]
    whole = choice.inputs[0] is test.outputs[0] and choice.inputs[2] is softmax.outputs[0]
    return choice if whole and _number(choice.inputs[1]) == 0 else None


def _bias(scores: ir.Value | None) -> ir.Node | None:
    """``Where(mask, 0, -inf)`` that is added to the scores, and to no others."""
    added = scores.producer() if scores is not None else None
    if added is None or added.op_type != "Add":
        return None
    for given in added.inputs:
        node = given.producer() if given is not None else None
        if (node is not None and node.op_type == "Where" and len(node.outputs[0].uses()) == 1
                and _number(node.inputs[1]) == 0 and _number(node.inputs[2]) == float("-inf")):
            return node
    return None


def _number(value: ir.Value | None) -> float | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _open(match: _Guarded, opset: int) -> tuple[ir.Value, ir.Value]:
    """The mask that is open in rows without any key, and 1 in every other row, 0 in those."""
    zero = match.guard.inputs[1]
    assert zero is not None
    held = ir.convenience.get_const_tensor(zero)
    assert held is not None
    dtype = held.dtype
    numbers = ir.node("Cast", [match.mask], {"to": ir.DataType.FLOAT})
    made = [numbers]
    if opset < AXES_AS_INPUT:
        largest = ir.node("ReduceMax", numbers.outputs, {"axes": [-1], "keepdims": 1})
    else:
        last = ir.node("Constant", [], {"value": ir.tensor([-1], dtype=ir.DataType.INT64)})
        made.append(last)
        largest = ir.node("ReduceMax", [numbers.outputs[0], last.outputs[0]], {"keepdims": 1})
    sees = ir.node("Cast", largest.outputs, {"to": ir.DataType.BOOL})
    blind = ir.node("Not", sees.outputs)
    mask = ir.node("Or", [match.mask, blind.outputs[0]])
    seen = ir.node("Cast", largest.outputs, {"to": dtype})
    for node, kind in ((numbers, ir.DataType.FLOAT), (largest, ir.DataType.FLOAT),
                       (sees, ir.DataType.BOOL), (blind, ir.DataType.BOOL),
                       (mask, ir.DataType.BOOL), (seen, dtype)):
        node.outputs[0].dtype = kind
    assert match.bias.graph is not None
    match.bias.graph.insert_before(match.bias, [*made, largest, sees, blind, mask, seen])
    return mask.outputs[0], seen.outputs[0]
