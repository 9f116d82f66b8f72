"""int8 weights by output channel, with activations rounded at run time or by calibration; or the
weights alone, in int8 or int4 by block.

``int8-dynamic``: DynamicQuantizeLinear and MatMulInteger, standard operators from opset 11.
``int8-static``: QuantizeLinear and DequantizeLinear around each product (QDQ), which ONNX Runtime
and OpenVINO read alike; ranges come from samples.
``int8-symmetric``: the same with activations in int8 around 0, which TensorRT reads too.
``int8-weights``, ``int4-weights``: MatMulNBits, an operator of ONNX Runtime, for products with a
few rows, which wait for memory; the noisiest layers of ``int4-weights`` take 8 bits.

Written here because ONNX Runtime's quantizer loads every weight: this one holds a single matrix.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import OpsetTooLow, UsageError
from . import Transform, TransformResult, _blockwise, _graph
from ._calibration import ranges
from ._layers import Layer, by_channel, layers, noise, quantised, scales

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    import onnx_ir as ir

SYMMETRIC = "int8-symmetric"
WEIGHTS = {"int8-weights": 8, "int4-weights": 4}
"""Bits of the schemes that quantise weights alone."""

SCHEMES = ("int8-dynamic", "int8-static", SYMMETRIC, *WEIGHTS)
MIN_OPSET = {"int8-dynamic": 11, "int8-static": 13, SYMMETRIC: 13}
"""DynamicQuantizeLinear came with opset 11, DequantizeLinear by channel with 13; MatMulNBits is
outside the standard."""

FLOOR_DB = 8.0
"""A layer noisier than this alone, in dB of SQNR, stays in float32 whatever the budget."""


class Quantize(Transform):
    lossy = True
    measures = True
    relaxes = True

    def idle(self, model: ir.Model) -> dict[str, Any] | None:
        """A graph without a product with a constant matrix: a table, or convolutions alone."""
        _graph.lift_constants(model)
        _graph.infer_types(model)
        return None if layers(model) else {"layers": {}, "float_bytes": 0, "matrix_bytes": 0}

    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Options: ``scheme``; ``samples``, feeds; ``keep``, how many of the noisiest layers stay
        in float32 (0); ``calibration`` (minmax, percentile, entropy) of ``int8-static``;
        ``measured``, the ``sqnr_db`` of each layer where an earlier result's notes have it.

        Notes: ``layers``, by weight name: ``sqnr_db`` alone, ``transposed``, ``kept``;
        ``matrix_bytes`` and ``float_bytes`` of the quantised matrices after and before.

        Raises:
            UsageError: quantised already, opset too low, nothing to quantise, no samples.
            BackendUnavailable: onnxruntime, which measures the layers, is not installed.
        """
        scheme, samples = str(options["scheme"]), list(options.get("samples", ()))
        if scheme not in SCHEMES:
            raise UsageError(f"cannot quantise to {scheme}", allowed=", ".join(SCHEMES))
        if not samples:
            raise UsageError("there are no samples to measure layers on",
                             hint="texts to calibrate with, one a line")
        _graph.refuse_quantised(model, "quantize")
        lowest, version = MIN_OPSET.get(scheme, 0), _graph.opset(model)
        if version < lowest:
            raise OpsetTooLow(f"opset {version} cannot express {scheme}", needed=lowest)
        _graph.lift_constants(model)
        _graph.infer_types(model)
        found = layers(model)
        if not found:
            raise UsageError("the graph has no product with a constant matrix to quantise")
        before = _graph.count(model)
        bits = WEIGHTS.get(scheme)
        measured = options.get("measured") or noise(
            model, found, samples, partial(_blocks, bits=bits) if bits else by_channel)
        kept = _kept(measured, int(options.get("keep", 0)))
        finer = kept if bits == 4 else set()
        kept = kept - finer
        chosen = [layer for layer in found if layer.name not in kept]
        if not chosen:
            raise UsageError("every layer is too sensitive to be quantised",
                             hint="--dtype fp16, or a wider --budget")
        limits: dict[str, tuple[float, float]] = {}
        if scheme in ("int8-static", SYMMETRIC):
            values = [layer.activation for layer in chosen]
            method = str(options.get("calibration", "minmax"))
            limits = {v.name or "": r for v, r in ranges(model, values, samples, method).items()}
            if scheme == SYMMETRIC:
                limits = {name: _symmetric(*ends) for name, ends in limits.items()}
        read = {layer.name: layer.activation.name or "" for layer in chosen}
        widths = {layer.name: 8 if layer.name in finer else bits for layer in chosen if bits}
        write = _writer(model, scheme, limits, widths)
        stored = {layer.name: (int(layer.tensor.nbytes), write(layer)) for layer in chosen}
        _drop_unused(model)
        notes = {
            "scheme": scheme,
            "nodes_before": before,
            "nodes_after": _graph.count(model),
            "float_bytes": sum(size for size, _ in stored.values()),
            "matrix_bytes": sum(size for _, size in stored.values()),
            "layers": {
                layer.name: {
                    "sqnr_db": round(min(measured[layer.name], 999.0), 2),
                    "transposed": layer.transposed,
                    "kept": layer.name in kept,
                    **_blocked(widths.get(layer.name)),
                }
                for layer in found
            },
        }
        if limits:
            notes["ranges"] = {name: list(limits[value]) for name, value in read.items()}
        target = {"runtime": "onnxruntime"} if bits else {}
        return TransformResult(model, True, notes, target, precision=scheme)


def _blocks(
    layer: Layer, flat: np.ndarray, _: tuple[float, float], *, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    return _blockwise.inputs(flat, bits), _blockwise.rounded(layer, bits)


def _blocked(bits: int | None) -> dict[str, int]:
    return {} if bits is None else {"bits": bits, "block": _blockwise.BLOCK[bits]}


def _kept(measured: Mapping[str, float], count: int) -> set[str]:
    """The ``count`` noisiest layers and every one below :data:`FLOOR_DB`, NaN included."""
    ordered = sorted(measured, key=lambda name: measured[name])
    return set(ordered[:count]) | {n for n, value in measured.items() if not value >= FLOOR_DB}


def _writer(
    model: ir.Model,
    scheme: str,
    limits: Mapping[str, tuple[float, float]],
    bits: Mapping[str, int],
) -> Callable[[Layer], int]:
    """What replaces one layer and returns the bytes its matrix takes now."""
    if bits:
        return _Blockwise(model, bits).write
    if scheme == "int8-dynamic":
        return _Dynamic(model).write
    return _Static(model, limits, signed=scheme == SYMMETRIC).write


def _symmetric(low: float, high: float) -> tuple[float, float]:
    """What int8 can hold in the least steps around 0 that reach both ends."""
    step = max(abs(low), abs(high)) / 127 or 1.0
    return -128 * step, 127 * step


class _Dynamic:
    """DynamicQuantizeLinear → MatMulInteger → Cast → Mul, the pattern ONNX Runtime fuses.

    One activation is quantised once for all layers that read it.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._activations: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def write(self, layer: Layer) -> int:
        import onnx_ir as ir

        x = layer.activation
        if x not in self._activations:
            node = insert(layer.node, "DynamicQuantizeLinear", [x], outputs=3, name=f"{x.name}:u8")
            self._activations[x] = tuple(node.outputs)
        x8, step, zero = self._activations[x]
        weight, scale = store(self._model, layer)
        product = insert(layer.node, "MatMulInteger", [x8, weight, zero], name=f"{layer.name}:i32")
        number = insert(layer.node, "Cast", product.outputs, {"to": int(ir.DataType.FLOAT)},
                         name=f"{layer.name}:sum")
        factor = insert(layer.node, "Mul", [step, scale], name=f"{layer.name}:factor")
        last = insert(layer.node, "Mul", [number.outputs[0], factor.outputs[0]],
                       name=f"{layer.name}:product")
        replace(layer, last)
        return _nbytes(weight, scale)


class _Static:
    """QuantizeLinear → DequantizeLinear on both sides of the product, which stays as it is."""

    def __init__(
        self, model: ir.Model, ranges: Mapping[str, tuple[float, float]], *, signed: bool
    ) -> None:
        self._model = model
        self._ranges = ranges
        self._signed = signed
        self._activations: dict[ir.Value, ir.Value] = {}

    def write(self, layer: Layer) -> int:
        x = layer.activation
        if x not in self._activations:
            self._activations[x] = self._rounded(layer.node, x)
        weight, scale = store(self._model, layer)
        zero = constant(self._model, f"{layer.name}:zero", _zeros(layer.outputs))
        real = insert(layer.node, "DequantizeLinear", [weight, scale, zero], {"axis": 1},
                       name=f"{layer.name}:real")
        product = insert(layer.node, "MatMul", [self._activations[x], real.outputs[0]],
                          name=f"{layer.name}:product")
        replace(layer, product)
        return _nbytes(weight, scale)

    def _rounded(self, node: ir.Node, x: ir.Value) -> ir.Value:
        import numpy as np

        low, high = self._ranges[x.name or ""]
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        zero = int(np.clip(round(-low / step), 0, 255))
        name = x.name or ""
        scale = constant(self._model, f"{name}:scale", np.array(step, np.float32))
        # With symmetric limits the zero of uint8 is 128, which is 0 of int8: the same steps.
        exact = np.array(zero - 128, np.int8) if self._signed else np.array(zero, np.uint8)
        point = constant(self._model, f"{name}:zero", exact)
        q = insert(node, "QuantizeLinear", [x, scale, point], name=f"{name}:u8")
        dq = insert(node, "DequantizeLinear", [q.outputs[0], scale, point], name=f"{name}:rounded")
        return dq.outputs[0]


class _Blockwise:
    """MatMulNBits, which reads the weight packed and rounds what it is multiplied with."""

    def __init__(self, model: ir.Model, bits: Mapping[str, int]) -> None:
        self._model = model
        self._bits = bits
        model.graph.opset_imports.setdefault("com.microsoft", 1)

    def write(self, layer: Layer) -> int:
        bits = self._bits[layer.name]
        shape = _blockwise.blob(layer, bits)
        source = detached(layer)
        weight = self._computed(f"{layer.name}:int{bits}", dtype="UINT8", shape=shape,
                                make=lambda: _blockwise.packed(source, bits))
        scale = self._computed(f"{layer.name}:scale", dtype="FLOAT", shape=shape[:2],
                               make=lambda: _blockwise.steps(source, bits))
        product = insert(
            layer.node, "MatMulNBits", [layer.activation, weight, scale],
            {"K": layer.inputs, "N": layer.outputs, "bits": bits,
             "block_size": _blockwise.BLOCK[bits], "accuracy_level": _blockwise.ACCURACY},
            name=f"{layer.name}:product", domain="com.microsoft")
        replace(layer, product)
        return _nbytes(weight, scale)

    def _computed(
        self, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]
    ) -> ir.Value:
        """An initializer that is computed when it is written, or the one of that name."""
        import onnx_ir as ir

        if name in self._model.graph.initializers:
            return self._model.graph.initializers[name]
        kind = ir.DataType[dtype]
        tensor = ir.LazyTensor(lambda: ir.tensor(make(), name=name), dtype=kind,
                               shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape),
                         const_value=tensor)
        self._model.graph.register_initializer(value)
        return value


def store(model: ir.Model, layer: Layer) -> tuple[ir.Value, ir.Value]:
    """Initializers for a layer's int8 matrix, computed when written, and its scales."""
    import onnx_ir as ir

    steps = scales(layer)
    name = f"{layer.name}:int8"
    known = model.graph.initializers.get(name)
    if known is not None:
        return known, model.graph.initializers[f"{layer.name}:scale"]
    source = detached(layer)
    tensor = ir.LazyTensor(
        lambda: ir.tensor(quantised(source, steps), name=name),
        dtype=ir.DataType.INT8, shape=ir.Shape((layer.inputs, layer.outputs)), name=name)
    weight = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT8),
                      shape=ir.Shape((layer.inputs, layer.outputs)), const_value=tensor)
    model.graph.register_initializer(weight)
    return weight, constant(model, f"{layer.name}:scale", steps)


def detached(layer: Layer) -> Layer:
    """The layer with a weight that the graph cannot drop: its bytes are still where they were."""
    import onnx_ir as ir

    return Layer(layer.node, ir.Value(name=layer.name, const_value=layer.tensor), layer.transposed)


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer, or the one of that name."""
    import onnx_ir as ir

    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape),
                     const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace(layer: Layer, product: ir.Node) -> None:
    """Let what read the layer read ``product``, with Gemm's bias added; the layer goes."""
    node = product
    if layer.bias is not None:
        node = insert(layer.node, "Add", [product.outputs[0], layer.bias],
                       name=f"{layer.name}:biased")
    old, new = layer.node.outputs[0], node.outputs[0]
    graph = layer.node.graph
    assert graph is not None
    new.type, new.shape, name = old.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}:float", name
    graph.remove(layer.node, safe=True)


def insert(
    before: ir.Node,
    operator: str,
    inputs: Iterable[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str,
    outputs: int = 1,
    domain: str = "",
) -> ir.Node:
    import onnx_ir as ir

    node = ir.node(operator, list(inputs), attributes, domain=domain, num_outputs=outputs)
    graph = before.graph
    assert graph is not None
    taken = {v.name for n in graph for v in n.outputs}
    number, base = 2, name
    while name in taken:
        name, number = f"{base}#{number}", number + 1
    for index, value in enumerate(node.outputs):
        value.name = name if not index else f"{name}.{index}"
    graph.insert_before(before, node)
    return node


def _zeros(count: int) -> np.ndarray:
    import numpy as np

    return np.zeros(count, np.int8)


def _nbytes(*values: ir.Value) -> int:
    return sum(int(v.const_value.nbytes) for v in values if v.const_value is not None)


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


TRANSFORM = Quantize()
