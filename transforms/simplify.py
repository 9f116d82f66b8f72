"""Constant folding and redundancy removal by onnxsim, on the graph without its weights.

The weights travel as graph inputs while onnxsim works, so it neither loads nor folds them: the
file stays small and the weights stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Transform, TransformResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir


class Simplify(Transform):
    def apply(self, model: ir.Model, options: Mapping[str, Any]) -> TransformResult:
        """Takes no options. Notes: ``nodes_before`` and ``nodes_after``."""
        import onnx_ir as ir
        import onnxsim

        weights = _external(model)
        for name in weights:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        before = _count(model)
        proto, _ = onnxsim.simplify(ir.to_proto(model), check_n=0)
        simplified = ir.from_proto(proto)
        for value in [v for v in simplified.graph.inputs if v.name in weights]:
            simplified.graph.inputs.remove(value)
            value.const_value = weights[value.name or ""]
            if value.uses():
                simplified.graph.register_initializer(value)
        simplified.metadata_props.update(model.metadata_props)
        after = _count(simplified)
        return TransformResult(
            simplified, after != before, {"nodes_before": before, "nodes_after": after}
        )


def _external(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Initializers that lie on disk or are computed when written."""
    import onnx_ir as ir

    found: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor | ir.LazyTensor):
            found[name] = value.const_value
    return found


def _count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


TRANSFORM = Simplify()
