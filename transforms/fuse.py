"""Attention, layer-norm and GELU as the fused operators of ONNX Runtime; ties the graph to it.

By ``onnxruntime.transformers.optimizer``. Attention joins the weights of query, key and value, so
this transform, unlike the others, holds all weights, and a graph above 1 GiB is refused.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, UsageError
from . import Transform, TransformResult, _graph

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    import onnx_ir as ir

LIMIT = 1 << 30
"""Bytes of weights that may be held: three copies exist at the worst moment."""


class Fuse(Transform):
    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Takes no options. Notes: ``fused``, number of each fused operator; node counts.

        Raises:
            UsageError: quantised already, or too large.
            BackendUnavailable: onnxruntime is not installed.
        """
        import onnx_ir as ir

        _graph.refuse_quantised(model, "fuse")
        size = sum(v.const_value.nbytes for v in model.graph.initializers.values()
                   if v.const_value is not None)
        if size > LIMIT:
            raise UsageError(
                f"fusing holds all weights, and these are {size >> 20} MiB",
                allowed=f"at most {LIMIT >> 20} MiB", hint="--optimize simplify")
        before = _graph.operators(model)
        optimised = ir.from_proto(_optimised(_with_weights(model)))
        for tensor, original in (*zip(optimised.graph.inputs, model.graph.inputs, strict=True),
                                 *zip(optimised.graph.outputs, model.graph.outputs, strict=True)):
            tensor.shape, tensor.type = original.shape, original.type
        optimised.metadata_props.update(model.metadata_props)
        after = _graph.operators(optimised)
        fused = {name: count for name, count in after.items() if count > before.get(name, 0)
                 and (name.startswith("com.microsoft") or name not in before)}
        tied = any(name.startswith("com.microsoft") for name in after)
        if tied:
            optimised.opset_imports.setdefault("com.microsoft", 1)
        return TransformResult(
            optimised,
            after != before,
            {"nodes_before": sum(before.values()), "nodes_after": sum(after.values()),
             "fused": fused},
            {"runtime": "onnxruntime"} if tied else {},
        )


def _with_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph as a proto with its weights inside, under their own names."""
    import onnx_ir as ir

    values = {n: v for n, v in model.graph.initializers.items() if _graph.is_stored(v.const_value)}
    stored = {name: value.const_value for name, value in values.items()}
    try:
        for name, value in values.items():
            tensor = stored[name]
            assert tensor is not None
            value.const_value = ir.tensor(tensor.numpy(), name=name)
        return ir.to_proto(model)
    finally:
        for name, value in values.items():
            value.const_value = stored[name]


def _optimised(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        from onnxruntime.transformers.optimizer import optimize_by_fusion
    except ImportError as error:
        raise BackendUnavailable("fusing needs onnxruntime, which is not installed",
                                 hint='pip install "modelport[cpu]"') from error
    logging.disable(logging.WARNING)
    try:
        fused: onnx.ModelProto = optimize_by_fusion(proto, "bert").model
    finally:
        logging.disable(logging.NOTSET)
    return fused


TRANSFORM = Fuse()
