"""The products with constant matrices in a graph, and their weights as int8 by output channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _graph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir


Ends = tuple[float, float]
Rounded = Callable[["Layer", "np.ndarray", Ends], tuple["np.ndarray", "np.ndarray"]]
"""From a layer, rows of its input and the ends of their range: input and weight as quantised."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One MatMul or Gemm whose right side is a weight.

    Attributes:
        node: the product.
        weight: the initializer, in float32.
        transposed: whether it is stored as [outputs, inputs], as torch's Linear does.
        bias: Gemm's third input.
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None = None

    @property
    def name(self) -> str:
        """The weight's name: that of the parameter in the module."""
        return self.weight.name or ""

    @property
    def tensor(self) -> ir.TensorProtocol:
        assert self.weight.const_value is not None
        return self.weight.const_value

    @property
    def inputs(self) -> int:
        return int(self.tensor.shape.numpy()[1 if self.transposed else 0])

    @property
    def outputs(self) -> int:
        return int(self.tensor.shape.numpy()[0 if self.transposed else 1])

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def layers(model: ir.Model) -> list[Layer]:
    """The layers of the main graph, in order; products of two activations are none.

    A weight that is multiplied both ways round is left out: with steps by output channel or by
    block of inputs it would be two matrices, and the module has one.
    """
    found = []
    for node in model.graph:
        layer = _matmul(node) if node.op_type == "MatMul" else (
            _gemm(node) if node.op_type == "Gemm" else None)
        if layer is not None:
            found.append(layer)
    ways = {(layer.weight, layer.transposed) for layer in found}
    return [layer for layer in found if (layer.weight, not layer.transposed) not in ways]


def _matmul(node: ir.Node) -> Layer | None:
    left, right = node.inputs
    if left is None or right is None or left.is_initializer():
        return None
    source, transposed = right, False
    producer = right.producer()
    if producer is not None and producer.op_type == "Transpose":
        perm = producer.attributes.get("perm")
        if perm is not None and list(perm.value) == [1, 0] and producer.inputs[0] is not None:
            source, transposed = producer.inputs[0], True
    return Layer(node, source, transposed) if _is_matrix(source) else None


def _gemm(node: ir.Node) -> Layer | None:
    def number(name: str, default: float) -> float:
        attribute = node.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    left, right = node.inputs[:2]
    plain = number("alpha", 1) == 1 and number("beta", 1) == 1 and not number("transA", 0)
    if not plain or left is None or left.is_initializer() or not _is_matrix(right):
        return None
    assert right is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Layer(node, right, bool(number("transB", 0)), bias)


def _is_matrix(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return value.const_value.dtype == ir.DataType.FLOAT and len(value.const_value.shape) == 2


def scales(layer: Layer, levels: int = 127) -> np.ndarray:
    """Step of each output channel: its largest magnitude over ``levels``; 1 for a channel of 0.

    Symmetric, so that the zero point is 0 and the product needs no correction for it.
    """
    import numpy as np

    width = math.prod(layer.tensor.shape.numpy()[1:])
    largest = np.zeros(layer.outputs, np.float32)
    done = 0
    for block in _graph.blocks(layer.tensor):
        rows = np.abs(block.reshape(-1, width))
        if layer.transposed:
            largest[done : done + len(rows)] = rows.max(axis=1)
            done += len(rows)
        else:
            np.maximum(largest, rows.max(axis=0), out=largest)
    return np.where(largest > 0, largest / levels, 1).astype(np.float32)


def quantised(layer: Layer, steps: np.ndarray, levels: int = 127) -> np.ndarray:
    """The weight as int8 [inputs, outputs], rounded to nearest even."""
    import numpy as np

    width = math.prod(layer.tensor.shape.numpy()[1:])
    out = np.empty(tuple(layer.tensor.shape.numpy()), np.int8)
    done = 0
    for block in _graph.blocks(layer.tensor, 1 << 20):
        rows = block.reshape(-1, width)
        step = steps[done : done + len(rows), None] if layer.transposed else steps
        out[done : done + len(rows)] = np.clip(np.rint(rows / step), -levels, levels)
        done += len(rows)
    return np.ascontiguousarray(out.T) if layer.transposed else out


def noise(
    model: ir.Model,
    found: Sequence[Layer],
    samples: Sequence[Mapping[str, np.ndarray]],
    rounded: Rounded,
    *,
    rows: int = 256,
    group: int = 8,
) -> dict[str, float]:
    """Signal-to-quantisation-noise ratio in dB of each layer alone, by weight name.

    On ``rows`` rows of each sample; a few layers' inputs at a time, so that memory stays bounded.

    Args:
        rounded: the layer's input and weight once both are quantised.
    """
    import numpy as np

    result: dict[str, float] = {}
    values = list(dict.fromkeys(layer.activation for layer in found))
    probe = _graph.Probe(model, values)
    for start in range(0, len(values), group):
        part = values[start : start + group]
        wanted = [layer for layer in found if layer.activation in part]
        signal, error = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
        for arrays in probe.run(part, samples):
            by_value = dict(zip(part, arrays, strict=True))
            for layer in wanted:
                x = by_value[layer.activation]
                flat = x.reshape(-1, x.shape[-1])
                flat = flat[:: max(1, len(flat) // rows)]
                ends = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
                exact = _product(flat, layer.tensor, layer.transposed)
                grid, weight = rounded(layer, flat, ends)
                signal[layer] += float(np.sum(np.square(exact, dtype=np.float64)))
                error[layer] += float(np.sum(np.square(exact - grid @ weight, dtype=np.float64)))
        for layer in wanted:
            ratio = signal[layer] / error[layer] if error[layer] > 0 else float("inf")
            decibels = 10 * math.log10(ratio) if ratio > 0 else float("-inf")
            result[layer.name] = min(decibels, result.get(layer.name, float("inf")))
    return result


def by_channel(
    layer: Layer, flat: np.ndarray, ends: Ends
) -> tuple[np.ndarray, np.ndarray]:
    """Activations in uint8 as DynamicQuantizeLinear has them, weights in int8 by channel."""
    import numpy as np

    steps = scales(layer)
    low, high = ends
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    grid = (np.clip(np.rint(flat / step) + zero, 0, 255) - zero) * np.float32(step)
    return grid, quantised(layer, steps) * steps


def _product(flat: np.ndarray, tensor: ir.TensorProtocol, transposed: bool) -> np.ndarray:
    """Rows times a stored weight, read in pieces; mapped, its pages would stay resident."""
    import numpy as np

    first, width = map(int, tensor.shape.numpy())
    out = np.zeros((len(flat), first if transposed else width), np.float32)
    done = 0
    for block in _graph.blocks(tensor):
        rows = block.reshape(-1, width)
        here = slice(done, done + len(rows))
        if transposed:
            out[:, here] = flat @ rows.T
        else:
            out += flat[:, here] @ rows
        done = here.stop
    return out
