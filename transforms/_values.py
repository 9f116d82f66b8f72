"""Reading a graph backwards: what made a value, and how many heads it is cut into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

HEADS = (0, 2, 1, 3)
"""Moves heads before tokens: [batch, tokens, heads, size] to [batch, heads, tokens, size]."""


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that made a value, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """A small constant's value."""
    if value is None:
        return None
    tensor = value.const_value
    node = made_by(value, "Constant")
    if tensor is None and node is not None and "value" in node.attributes:
        tensor = node.attributes["value"].value
    return tensor.numpy() if tensor is not None and tensor.size <= 8 else None


def length_of(shape: ir.Value | None) -> int | None:
    """How many sizes a shape states that is constant or put together from single sizes."""
    stated = constant_of(shape)
    if stated is not None:
        return int(stated.size)
    node = made_by(shape, "Concat")
    if node is None:
        return None
    return sum(1 if (known := constant_of(part)) is None else known.size for part in node.inputs)


def split(value: ir.Value | None, perm: tuple[int, ...]) -> tuple[ir.Value, ir.Value] | None:
    """What was cut into heads and transposed so, and the shape it was cut into."""
    turned = made_by(value, "Transpose")
    if turned is None or tuple(turned.attributes["perm"].value) != perm:
        return None
    cut = made_by(turned.inputs[0], "Reshape")
    if cut is None or cut.inputs[0] is None or cut.inputs[1] is None:
        return None
    return cut.inputs[0], cut.inputs[1]


def heads_of(shape: ir.Value, flat: ir.Value) -> int | None:
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
    stated = constant_of(shape)
    if stated is not None and stated.size == 4:
        return int(stated[2]), int(stated[3])
    node = made_by(shape, "Concat")
    if node is None or len(node.inputs) != 4:
        return None
    heads, size = (constant_of(v) for v in node.inputs[2:])
    return None if heads is None or size is None else (int(heads[0]), int(size[0]))


def _width(value: ir.Value) -> int | None:
    """Length of the last axis, from a bias, a matrix or a cut into parts."""
    node = value.producer()
    if node is None or node.op_type not in ("Add", "MatMul", "Split"):
        return None
    if node.op_type == "Split":
        return _part(node, value)
    for given in node.inputs:
        if given is None:
            continue
        turned = made_by(given, "Transpose")
        source = turned.inputs[0] if turned is not None else given
        stored = source is not None and source.producer() is None and source.shape is not None
        if stored and source is not None and source.shape is not None:
            length = source.shape[0 if turned is not None else -1]
            return length if isinstance(length, int) else None
    return next((w for given in node.inputs if given is not None and (w := _width(given))), None)


def _part(node: ir.Node, part: ir.Value) -> int | None:
    """Length of one part of a tensor [batch, tokens, width] that is cut along its last axis."""
    axis, stated = node.attributes.get("axis"), node.attributes.get("split")
    lengths = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = list(stated.value) if stated is not None else lengths
    along = axis is not None and axis.value in (-1, 2)
    return int(sizes[part.index() or 0]) if along and sizes is not None else None
