"""Half precision (float16 or bfloat16) for weights and arithmetic, float32 where it is needed.

Which nodes stay in float32 is learnt, not listed: the float32 graph is run on samples, and a node
that reads or writes a value too large for the target, or not finite, keeps float32. So do the
cores of normalisations and softmax, nodes that read a constant the target cannot hold, and
operators that have no such type at this opset. Inputs and outputs of the model stay float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import OpsetTooLow, UsageError
from . import Transform, TransformResult, _graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx_ir as ir

DTYPES = ("float16", "bfloat16")

HEADROOM = 4.0
"""Inputs that were not among the samples may be this much larger."""

CORE = frozenset({
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "Pow", "Sqrt",
    "Reciprocal", "Exp", "Log", "CumSum", "Softmax", "LogSoftmax", "LayerNormalization",
    "InstanceNormalization", "BatchNormalization", "GroupNormalization", "RMSNormalization",
    "LpNormalization", "MeanVarianceNormalization", "SkipLayerNormalization",
    "EmbedLayerNormalization", "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
})
"""Operators that sum many terms or take powers: what half precision loses there does not average
out (Micikevicius et al., Mixed Precision Training, 2018, section 3.3)."""

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Clip"})

COMPUTE = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
"""Operators that a lower precision is asked for."""


@dataclass(slots=True)
class _Kept:
    """Nodes that stay in float32, each with the first reason found."""

    reasons: dict[ir.Node, str] = field(default_factory=dict)

    def add(self, node: ir.Node, reason: str) -> None:
        self.reasons.setdefault(node, reason)

    def __contains__(self, node: object) -> bool:
        return node in self.reasons


class Cast(Transform):
    lossy = True
    measures = True

    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Options: ``dtype`` (float16, bfloat16); ``samples``, feeds that ranges are measured on.

        Notes: ``precision``; ``kept``, number of nodes in float32 by reason; ``kept_nodes``;
        ``casts``, nodes inserted; ``half_share``, share of the float weight bytes.

        Raises:
            UsageError: quantised already, no float32 graph, or an opset without the type.
            BackendUnavailable: onnxruntime, which measures the ranges, is not installed.
        """
        import onnx_ir as ir

        dtype, samples = str(options["dtype"]), list(options.get("samples", ()))
        if dtype not in DTYPES:
            raise UsageError(f"cannot cast to {dtype}", allowed=", ".join(DTYPES))
        if not samples:
            raise UsageError("there are no samples to measure ranges on")
        _graph.refuse_quantised(model, "cast")
        _graph.lift_constants(model)
        _graph.infer_types(model)
        half = ir.DataType[dtype.upper()]
        _require_float32(model)
        _require_opset(model, dtype)
        kept = _Kept()
        for node in model.graph:
            if not _typed(node, dtype, _graph.opset(model)):
                kept.add(node, f"no {dtype}")
            elif node.op_type in CORE:
                kept.add(node, "normalisation or softmax")
        _keep_ranges(model, kept, samples, dtype)
        _keep_constants(model, kept, dtype)
        _keep_between(model, kept)
        casts = _Rewrite(model, half, kept).run()
        return TransformResult(model, True, _notes(model, kept, casts, dtype), precision=dtype)


def _require_float32(model: ir.Model) -> None:
    import onnx_ir as ir

    floats = Counter[str]()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype is not None:
            floats[value.dtype.name] += value.const_value.nbytes
    reduced = {n for n in ("FLOAT16", "BFLOAT16") if floats[n] > floats[ir.DataType.FLOAT.name]}
    if reduced:
        raise UsageError(
            f"the graph is {', '.join(sorted(reduced)).lower()} already", allowed="float32")


def _require_opset(model: ir.Model, dtype: str) -> None:
    """The operators that matter must know the type at this opset."""
    import onnx

    version = _graph.opset(model)
    needed = version
    lacking = set()
    for node in model.graph:
        if node.domain or node.op_type not in COMPUTE or _typed(node, dtype, version):
            continue
        lacking.add(node.op_type)
        latest = onnx.defs.onnx_opset_version()
        needed = max(needed, next(
            (v for v in range(version + 1, latest + 1) if _typed(node, dtype, v)), latest + 1))
    if lacking:
        raise OpsetTooLow(
            f"{', '.join(sorted(lacking))} of opset {version} have no {dtype}",
            needed=needed,
            allowed=f"opset {needed} or higher for {dtype}; float16 at any",
        )


def _typed(node: ir.Node, dtype: str, version: int) -> bool:
    """Whether every float32 input and output of a node may be ``dtype`` instead.

    The types are those of the operator's schema; of operators outside the standard domain ONNX
    Runtime's own are known to take float16 only.
    """
    import onnx
    import onnx_ir as ir

    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for a in node.attributes.values()):
        return False
    if node.domain not in ("", "ai.onnx"):
        return dtype == "float16"
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    wanted = f"tensor({dtype})"
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is None or value.dtype != ir.DataType.FLOAT:
                continue
            if wanted not in formals[min(index, len(formals) - 1)].types:
                return False
    return True


def _limits(dtype: str) -> tuple[float, float]:
    """Largest finite value and smallest positive one."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    return float(info.max), float(info.smallest_subnormal)


def _keep_ranges(
    model: ir.Model, kept: _Kept, samples: list[Mapping[str, np.ndarray]], dtype: str
) -> None:
    """Keep nodes around values that come close to the type's largest, or are not finite."""
    largest = _limits(dtype)[0] / HEADROOM
    for value, size in peaks(model, samples).items():
        if size <= largest:  # false for NaN
            continue
        reason = f"reaches {size:.3g}" if size < float("inf") else "is not finite"
        around = [value.producer(), *(use.node for use in value.uses())]
        for node in around:
            if node is not None and node.graph is model.graph:
                kept.add(node, "range: a value " + reason)


def peaks(
    model: ir.Model, samples: list[Mapping[str, np.ndarray]]
) -> dict[ir.Value, float]:
    """Largest magnitude of every computed float32 value over the samples; NaN where one is NaN.

    Only one number for each value leaves the run, whatever the shapes.
    """
    import numpy as np
    import onnx_ir as ir

    probed = _graph.clone(model)
    _graph.infer_types(probed)
    by_name = {v.name: v for node in model.graph for v in node.outputs}
    by_name |= {v.name: v for v in model.graph.inputs}
    measured: list[str] = []
    outputs: list[ir.Value] = []
    floats = [v for v in (*probed.graph.inputs, *(v for n in probed.graph for v in n.outputs))
              if v.dtype == ir.DataType.FLOAT]
    for value in floats:
        size = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        for node in (size, largest):
            node.outputs[0].name = f"{value.name}:{node.op_type}"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        probed.graph.extend([size, largest])
        measured.append(value.name or "")
        outputs.append(largest.outputs[0])
    found = np.zeros(len(outputs))
    for result in _graph.Probe(probed, outputs).run(outputs, samples):
        now = np.array([float(r) for r in result])
        found = np.where(np.isnan(now) | np.isnan(found), np.nan, np.maximum(found, now))
    return {by_name[name]: float(size) for name, size in zip(measured, found, strict=True)}


def _keep_constants(model: ir.Model, kept: _Kept, dtype: str) -> None:
    """Keep nodes that read a weight or constant the type cannot hold, or turns into zero."""
    import numpy as np
    import onnx_ir as ir

    largest, smallest = _limits(dtype)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.dtype != ir.DataType.FLOAT:
            continue
        top = 0.0
        for block in _graph.blocks(tensor):
            if block.size:
                top = max(top, float(np.abs(block).max()))
        vanishes = tensor.size == 1 and 0 < top < smallest
        if top > largest or vanishes:
            for use in value.uses():
                if use.node.graph is model.graph:
                    kept.add(use.node, f"constant: {top:.3g}")


def _keep_between(model: ir.Model, kept: _Kept) -> None:
    """Keep what lies inside a normalisation, and what feeds only nodes that are kept."""
    import onnx_ir as ir

    cores = {n for n in kept.reasons if n.op_type in CORE}
    for node in model.graph:
        if node.op_type in ELEMENTWISE and any(
            v is not None and v.producer() in cores and _scalar_per_row(v) for v in node.inputs
        ):
            kept.add(node, "inside a normalisation")
    for node in reversed(list(model.graph)):
        floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
        produced = [v for v in node.outputs if v.dtype == ir.DataType.FLOAT]
        users = [use.node for v in produced for use in v.uses()]
        from_kept = all(v.producer() is None or v.producer() in kept for v in floats)
        stored = any(_graph.is_stored(v.const_value) for v in floats)
        cheap = node.op_type not in COMPUTE and not stored
        if cheap and users and from_kept and all(user in kept for user in users):
            kept.add(node, "feeds only nodes in float32")


def _scalar_per_row(value: ir.Value) -> bool:
    """Whether a core's output is a statistic (a mean, a root), not a normalised tensor."""
    node = value.producer()
    return node is not None and (
        node.op_type.startswith("Reduce") or node.op_type in ("Sqrt", "Pow", "Reciprocal"))


class _Rewrite:
    """Gives every node its precision and puts a Cast wherever two precisions meet."""

    def __init__(self, model: ir.Model, half: ir.DataType, kept: _Kept) -> None:
        self.model = model
        self.half = half
        self.kept = kept
        self.casts = 0
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants = set(model.graph.initializers.values())

    def run(self) -> int:
        import onnx_ir as ir

        graph = self.model.graph
        outputs = list(graph.outputs)
        nodes = list(graph)
        floats = {v for n in nodes for v in n.outputs if v.dtype == ir.DataType.FLOAT}
        floats |= {v for v in graph.inputs if v.dtype == ir.DataType.FLOAT}
        halved = {v for v in floats
                  if v.producer() is not None and v.producer() not in self.kept}
        self._outputs(outputs, halved)
        for node in nodes:
            if node in self.kept:
                self._keep(node, halved)
            else:
                self._halve(node, floats, halved)
        for value in halved:
            value.type = ir.TensorType(self.half)
        self._drop_unused()
        return self.casts

    def _halve(self, node: ir.Node, floats: set[ir.Value], halved: set[ir.Value]) -> None:
        import onnx_ir as ir

        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in floats and value not in halved:
                node.replace_input_with(index, self._cast(value, self.half))
            elif value in self._constants and value.dtype == ir.DataType.FLOAT:
                node.replace_input_with(index, self._weight(value))
        if not any(v in halved for v in node.outputs):
            return
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None:
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        for name in ("dtype", "stash_type"):
            attribute = node.attributes.get(name)
            if name == "dtype" and attribute is not None and attribute.value == 1:
                node.attributes[name] = ir.AttrInt64(name, int(self.half))
        filled = node.attributes.get("value")
        if node.op_type == "ConstantOfShape":
            import numpy as np

            old = filled.value.numpy() if filled is not None else np.zeros(1, np.float32)
            new = ir.tensor(old.astype(self.half.numpy()))
            node.attributes["value"] = ir.AttrTensor("value", new)

    def _keep(self, node: ir.Node, halved: set[ir.Value]) -> None:
        import onnx_ir as ir

        for index, value in enumerate(node.inputs):
            if value in halved and value is not None:
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
        for attribute in node.attributes.values():
            graphs = ([attribute.value] if attribute.type == ir.AttributeType.GRAPH else
                      list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else [])
            for graph in graphs:
                self._keep_inside(graph, halved)

    def _keep_inside(self, graph: ir.Graph, halved: set[ir.Value]) -> None:
        """A subgraph stays in float32; what it captures from outside is cast there."""
        import onnx_ir as ir

        for inner in ir.traversal.RecursiveGraphIterator(graph):
            for index, value in enumerate(inner.inputs):
                if value in halved and value is not None:
                    inner.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
        for index, value in enumerate(graph.outputs):
            if value in halved:
                graph.outputs[index] = self._cast(value, ir.DataType.FLOAT)

    def _outputs(self, outputs: list[ir.Value], halved: set[ir.Value]) -> None:
        """Model outputs keep name and dtype: the node writes another value, which is cast."""
        import onnx_ir as ir

        graph = self.model.graph
        for index, value in enumerate(outputs):
            if value not in halved:
                continue
            name, shape = value.name, value.shape
            value.name = f"{name}:{self.half.name.lower()}"
            made = self._cast(value, ir.DataType.FLOAT)
            made.name, made.shape = name, shape
            graph.outputs[index] = made

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """``value`` as ``to``, one Cast for all readers, right after it is made."""
        import onnx_ir as ir

        key = (value, to)
        if key in self._made:
            return self._made[key]
        node = ir.node("Cast", [value], {"to": int(to)})
        made = node.outputs[0]
        made.name = f"{value.name}:{to.name.lower()}"
        made.type = ir.TensorType(to)
        producer = value.producer()
        graph = self.model.graph
        if producer is not None:
            graph.insert_after(producer, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)
        self.casts += 1
        self._made[key] = made
        return made

    def _weight(self, value: ir.Value) -> ir.Value:
        """A constant in half precision; what nodes in float32 read of it as well is kept too."""
        import onnx_ir as ir

        key = (value, self.half)
        if key in self._made:
            return self._made[key]
        name = value.name or ""
        others = [use for use in value.uses() if use.node in self.kept]
        made = ir.Value(name=f"{name}:{self.half.name.lower()}", shape=value.shape,
                        type=ir.TensorType(self.half))
        assert value.const_value is not None
        made.const_value = self._converted(value.const_value, made.name or "")
        if not others:
            # The only copy keeps the checkpoint's name.
            self.model.graph.initializers.pop(name)
            made.name = name
            made.const_value.name = name
        self.model.graph.register_initializer(made)
        self._made[key] = made
        return made

    def _converted(self, tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        import onnx_ir as ir

        from ..artifacts import onnx_files

        ref = _graph.reference(tensor)
        if ref is not None:
            return onnx_files.tensor(ref, name, self.half.name.lower())
        return ir.tensor(tensor.numpy().astype(self.half.numpy()), name=name)

    def _drop_unused(self) -> None:
        graph = self.model.graph
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                graph.initializers.pop(name)


def _notes(model: ir.Model, kept: _Kept, casts: int, dtype: str) -> dict[str, Any]:
    import onnx_ir as ir

    weights = Counter[str]()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype is not None:
            weights[value.dtype.name] += value.const_value.nbytes
    half = weights[dtype.upper()]
    # Compared as if both were stored in float32.
    total = 2 * half + weights[ir.DataType.FLOAT.name]
    reasons = Counter(reason.partition(":")[0] for reason in kept.reasons.values())
    return {
        "nodes_before": _graph.count(model) - casts,
        "nodes_after": _graph.count(model),
        "casts": casts,
        "half_share": round(2 * half / total, 4) if total else 0.0,
        "kept": dict(sorted(reasons.items())),
        "kept_nodes": {n.name or n.outputs[0].name: r for n, r in kept.reasons.items()
                       if any(v.dtype == ir.DataType.FLOAT for v in n.outputs)},
    }


TRANSFORM = Cast()
