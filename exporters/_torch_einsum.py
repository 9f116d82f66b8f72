"""Products that follow tensors to sizes without elements; Einstein sums of two are products, too.

ONNX has Einsum from opset 12 only, and ONNX Runtime's dies (SIGFPE) on a tensor without elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_einsum = torch.einsum


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matmul`` of stacks; where a stack is not its tensor's outermost axis, as a stack of one.

    ONNX Runtime otherwise draws the transposition into the product, which then dies (SIGFPE) on
    operands without elements.
    """
    if all(t.dim() < 3 or t.stride(0) == max(t.stride()) for t in (left, right)):
        return torch.matmul(left, right)
    return torch.matmul(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True, slots=True)
class _Product:
    """An equation of two terms as a product of stacks of matrices.

    Attributes:
        left, right: order of the axes of each operand: the stack, then rows and columns.
        left_axis, right_axis: where an operand lacks rows or columns, the axis to add, else None.
        drop: axes of the product that only an added axis brought.
        order: of the remaining axes, to the equation's output.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    left_axis: int | None
    right_axis: int | None
    drop: tuple[int, ...]
    order: tuple[int, ...]


def einsum(equation: str, *operands: Any) -> torch.Tensor:
    """``torch.einsum``, by a matrix product where the equation is one.

    That is: two operands, no letter twice in a term, no ellipsis, one letter summed over, and at
    most one that only the first has and one that only the second has.
    """
    given = operands[0] if len(operands) == 1 and not isinstance(
        operands[0], torch.Tensor) else operands
    found = _product(equation) if isinstance(equation, str) and len(given) == 2 else None
    if found is None:
        return _einsum(equation, *operands)
    left, right = given[0].permute(found.left), given[1].permute(found.right)
    left = left if found.left_axis is None else left.unsqueeze(found.left_axis)
    right = right if found.right_axis is None else right.unsqueeze(found.right_axis)
    result = product(left, right)
    for axis in found.drop:
        result = result.squeeze(axis)
    return result.permute(found.order)


def _product(equation: str) -> _Product | None:
    terms, arrow, out = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if not arrow or len(parts) != 2 or not all(p.isalpha() for p in parts):
        return None
    a, b = parts
    if any(len(set(term)) != len(term) for term in (a, b, out)) or not set(out) <= {*a, *b}:
        return None
    stack = [c for c in a if c in b and c in out]
    summed = [c for c in a if c in b and c not in out]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]
    if len(summed) != 1 or len(rows) > 1 or len(columns) > 1 or not {*rows, *columns} <= {*out}:
        return None
    depth = len(stack)
    drop = (*((-1,) if not columns else ()), *((depth,) if not rows else ()))
    named = [*stack, *rows, *columns]
    return _Product(
        left=tuple(a.index(c) for c in (*stack, *rows, *summed)),
        right=tuple(b.index(c) for c in (*stack, *summed, *columns)),
        left_axis=None if rows else depth,
        right_axis=None if columns else depth + 1,
        drop=drop,
        order=tuple(named.index(c) for c in out),
    )
