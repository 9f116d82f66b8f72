"""A mask that is read element by element, in order, is the mask itself.

Transformers' masks index a padding mask with ranges over all rows and keys, and hold queries'
positions against zero. As operators these are ranges that ONNX Runtime computes on the host, whose
copies to a GPU keep the graph from being recorded as a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._values import constant_of, made_by

if TYPE_CHECKING:
    import onnx_ir as ir


def simplify(model: ir.Model) -> int:
    """Read masks as they are; how many were read by ranges."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = 0
    for node in list(model.graph):
        if node.op_type == "Gather":
            found += _read_whole(model, node)
        elif node.op_type == "And":
            _without_certainty(node)
    if found:
        RemoveUnusedNodesPass()(model)
    return found


def _read_whole(model: ir.Model, gather: ir.Node) -> bool:
    """``flat[rows * width + columns]`` over all columns becomes ``matrix[:rows]``."""
    from .quantize import constant, insert

    matrix = _flat(gather.inputs[0])
    total = made_by(gather.inputs[1], "Add")
    axis = gather.attributes.get("axis")
    if matrix is None or total is None or (axis is not None and axis.value != 0):
        return False
    for moved, columns in (total.inputs, tuple(reversed(total.inputs))):
        product = made_by(moved, "Mul")
        if product is None:
            continue
        for rows, width in (product.inputs, tuple(reversed(product.inputs))):
            down, across = _range(rows), _range(columns)
            if down is None or across is None or not (
                _is_size(width, matrix, 1) and _is_size(across[0], matrix, 1)
            ):
                continue
            end = gather.outputs[0]
            if made_by(gather.inputs[0], "Flatten") is not None:
                # Flattened to one column, the gathered has an axis too many, which goes at once.
                found = _reshaped_like(end, gather.inputs[1])
                if found is None:
                    return False
                end = found
            start = constant(model, "mask:start", np.zeros(1, np.int64))
            name = f"{end.name}:whole"
            count = _vector(model, gather, down[0], f"{name}.rows")
            cut = insert(gather, "Slice", [matrix, start, count, start], name=f"{name}.cut")
            others = [a for a in range(down[2]) if a not in (down[1], across[1])]
            made = _unsqueezed(model, gather, cut.outputs[0], others, name)
            made.type = matrix.type
            end.replace_all_uses_with(made)
            return True
    return False


def _reshaped_like(value: ir.Value, like: ir.Value | None) -> ir.Value | None:
    """What reshapes make of a value that nothing else reads, once it has the shape of another."""
    while True:
        readers = [use.node for use in value.uses()]
        if len(readers) != 1 or readers[0].op_type != "Reshape":
            return None
        value = readers[0].outputs[0]
        shape = made_by(readers[0].inputs[1], "Shape")
        if shape is not None and shape.inputs[0] is like:
            return value


def _flat(value: ir.Value | None) -> ir.Value | None:
    """The matrix that a vector, or a single column, holds row by row."""
    node = made_by(value, "Flatten", "Reshape")
    if node is None or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    if len(node.inputs[0].shape) != 2:
        return None
    if node.op_type == "Flatten":
        axis = node.attributes.get("axis")
        return node.inputs[0] if axis is not None and axis.value == 2 else None
    stated = constant_of(node.inputs[1])
    return node.inputs[0] if stated is not None and stated.tolist() == [-1] else None


def _range(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """The limit of ``0, 1, 2, …``, the axis they lie along, and the rank; the others are 1 long."""
    node = made_by(value, "Unsqueeze")
    if node is None:
        return None
    counted = made_by(node.inputs[0], "Range")
    stated = node.attributes.get("axes")
    axes = (list(stated.value) if stated is not None
            else constant_of(node.inputs[1]) if len(node.inputs) > 1 else None)
    if counted is None or axes is None or counted.inputs[1] is None:
        return None
    first, step = constant_of(counted.inputs[0]), constant_of(counted.inputs[2])
    rank = len(axes) + 1
    along = sorted(set(range(rank)) - {int(a) % rank for a in axes})
    if first is None or step is None or first.item() != 0 or step.item() != 1 or len(along) != 1:
        return None
    return counted.inputs[1], along[0], rank


def _is_size(value: ir.Value | None, of: ir.Value, axis: int) -> bool:
    node = made_by(value, "Gather", "Squeeze", "Unsqueeze")
    while node is not None and node.op_type != "Gather":
        node = made_by(node.inputs[0], "Gather", "Squeeze", "Unsqueeze")
    if node is None:
        return False
    shape, index = made_by(node.inputs[0], "Shape"), constant_of(node.inputs[1])
    return (shape is not None and shape.inputs[0] is of and index is not None
            and index.size == 1 and int(index.reshape(())) in (axis, axis - 2))


def _vector(model: ir.Model, before: ir.Node, scalar: ir.Value, name: str) -> ir.Value:
    """A scalar as a vector of one."""
    return _unsqueezed(model, before, scalar, [0], name)


def _unsqueezed(
    model: ir.Model, before: ir.Node, value: ir.Value, axes: list[int], name: str
) -> ir.Value:
    from . import _graph
    from .quantize import constant, insert

    if _graph.opset(model) < 13:
        return insert(before, "Unsqueeze", [value], {"axes": axes}, name=name).outputs[0]
    stated = constant(model, f"mask:axes{axes}", np.array(axes, np.int64))
    return insert(before, "Unsqueeze", [value, stated], name=name).outputs[0]


def _without_certainty(both: ir.Node) -> None:
    """Positions are never negative: what asks says yes, and only where its shape is not needed."""
    readers = [use.node for use in both.outputs[0].uses()]
    if not readers or any(reader.op_type != "Expand" for reader in readers):
        return
    for asked, other in (both.inputs, tuple(reversed(both.inputs))):
        denied = made_by(asked, "Not")
        node = made_by(asked, "GreaterOrEqual") if denied is None else made_by(
            denied.inputs[0], "Less")
        if node is None or other is None or _range(node.inputs[0]) is None:
            continue
        least = constant_of(node.inputs[1])
        if least is not None and least.size == 1 and least.item() <= 0:
            both.outputs[0].replace_all_uses_with(other)
            return
