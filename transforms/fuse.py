"""Attention, layer-norm and GELU as the fused operators of ONNX Runtime; ties the graph to it.

Attention by :mod:`._attention`, rotary positions by :mod:`._rotary`, masks by :mod:`._masks`; the
rest by ``onnxruntime.transformers.optimizer``, on the graph with its matrices set aside: none of
those fusions reads one.

Chosen by ``benchmarks/fusions.py``, which holds these against that optimizer alone and against
transformers' own fusions (``OnnxConfig(ort_fusions="cpu")``). Those look for what dynamo captures
and, on a CPU, take attention without a cache apart again; over a cache they found none in the
decoders there. The optimizer knows no attention of today's traces, and reshapes that share a shape
make it break GPT-2's graph. Both hold the weights.
"""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable
from . import Transform, TransformResult, _attention, _graph, _masks, _rotary
from .quantize import insert

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    import onnx_ir as ir


class Fuse(Transform):
    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Takes no options. Notes: ``fused``, number of each fused operator; node counts;
        ``optimizer_failed``, why only attention was fused.

        Raises:
            UsageError: quantised already.
            BackendUnavailable: onnxruntime is not installed.
        """
        _graph.refuse_quantised(model, "fuse")
        before = _graph.operators(model)
        _masks.simplify(model)
        _rotary.fuse(model)
        _attention.fuse(model)
        _own_shapes(model)
        for number, node in enumerate(model.graph.all_nodes()):
            node.name = node.name or f"{node.op_type}.{number}"  # the optimizer tells them by name
        optimised, problem = _optimised_without_matrices(model)
        _shared_shapes(optimised)
        _copied_sizes(optimised)
        for tensor, original in (*zip(optimised.graph.inputs, model.graph.inputs, strict=True),
                                 *zip(optimised.graph.outputs, model.graph.outputs, strict=True)):
            tensor.shape, tensor.type = original.shape, original.type
        optimised.metadata_props.update(model.metadata_props)
        after = _graph.operators(optimised)
        fused = {name: count for name, count in after.items() if count > before.get(name, 0)
                 and (name.startswith("com.microsoft") or name not in before)}
        own = [name for name in after if name.startswith("com.microsoft")]
        if own:
            optimised.opset_imports.setdefault("com.microsoft", 1)
        tied = bool(own) or any(_unknown(name, _graph.opset(optimised)) for name in after)
        return TransformResult(
            optimised,
            after != before,
            {"nodes_before": sum(before.values()), "nodes_after": sum(after.values()),
             "fused": fused, **({"optimizer_failed": problem} if problem else {})},
            {"runtime": "onnxruntime"} if tied else {},
        )


def _unknown(name: str, opset: int) -> bool:
    """Whether the standard domain of this opset lacks an operator of it. ONNX Runtime runs layer
    norms at any opset, and the optimizer writes them there: LayerNormalization came with 17, and
    SimplifiedLayerNormalization is no standard's."""
    import onnx

    if "::" in name:
        return False
    try:
        onnx.defs.get_schema(name, opset, "")
    except onnx.defs.SchemaError:
        return True
    return False


def _own_shapes(model: ir.Model) -> None:
    """Give each Reshape a shape of its own: the optimizer's fusion of one removes the Concat that
    made it, though others read it, and the graph falls to pieces."""
    for node in list(model.graph):
        readers = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Reshape"]
        if node.op_type != "Concat" or len(readers) < 2:
            continue
        for number, reader in enumerate(readers[1:]):
            copied = insert(node, "Concat", node.inputs, {"axis": 0},
                                      name=f"{node.outputs[0].name}:{number}")
            reader.replace_input_with(1, copied.outputs[0])


def _shared_shapes(model: ir.Model) -> None:
    """Let one Concat be read again by all that read its copies."""
    first: dict[tuple[ir.Value | None, ...], ir.Node] = {}
    for node in [n for n in model.graph if n.op_type == "Concat"]:
        readers = [use.node for use in node.outputs[0].uses()]
        if not readers or any(reader.op_type != "Reshape" for reader in readers):
            continue
        kept = first.setdefault(tuple(node.inputs), node)
        if kept is not node and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(kept.outputs[0])
            model.graph.remove(node)


def _copied_sizes(model: ir.Model) -> None:
    """In shapes that the optimizer writes a 0 means "as it was", whatever the node said before."""
    for node in model.graph:
        if node.op_type == "Reshape" and (node.name or "").startswith("Reshape_Fuse"):
            node.attributes.pop("allowzero", None)


def _optimised_without_matrices(model: ir.Model) -> tuple[ir.Model, str]:
    """The graph after ONNX Runtime's fusions, its stored matrices where they were; or the graph as
    it was and what the optimizer failed with.

    Biases and norm weights are read into the graph, where the fusions look for them.
    """
    import onnx_ir as ir

    vectors = {v: tensor for v in model.graph.initializers.values()
               if (tensor := v.const_value) is not None and _graph.is_stored(tensor)
               and len(tensor.shape) < 2}
    for value, tensor in vectors.items():
        value.const_value = ir.tensor(tensor.numpy(), name=value.name)
    try:
        with _graph.weights_aside(model) as stored:
            optimised = ir.from_proto(_optimised(ir.to_proto(model)))
    except RuntimeError as error:  # a graph in pieces: a bug of the optimizer, not of the graph
        for value, tensor in vectors.items():
            value.const_value = tensor
        return model, str(error).splitlines()[0]
    stored |= {value.name or "": tensor for value, tensor in vectors.items()}
    for value in [v for v in optimised.graph.inputs if v.name in stored]:
        optimised.graph.inputs.remove(value)
        if value.uses():
            optimised.graph.register_initializer(_holding(value, stored))
    for value in optimised.graph.initializers.values():
        if value.name in stored:
            _holding(value, stored)
    return optimised, ""


def _holding(value: ir.Value, stored: Mapping[str, ir.TensorProtocol]) -> ir.Value:
    value.const_value = stored[value.name or ""]
    return value


def _optimised(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        from onnxruntime.transformers.optimizer import optimize_by_fusion
    except ImportError as error:
        raise BackendUnavailable("fusing needs onnxruntime, which is not installed",
                                 hint='pip install "modelport[cpu]"') from error
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):  # where it prints what it cannot infer
            fused: onnx.ModelProto = optimize_by_fusion(proto, "bert").model
    finally:
        logging.disable(logging.NOTSET)
    return fused


TRANSFORM = Fuse()
