"""What several transforms need from a graph: types of values, weights set aside, probe runs."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.model import TensorRef
from ..errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir

QUANTISED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "QLinearMatMul", "QLinearConv", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
    "QGemm", "QAttention", "GatherBlockQuantized",
})
"""Operators that only a quantised graph has."""

_FOLDER = "session.model_external_initializers_file_folder_path"


def refuse_quantised(model: ir.Model, transform: str) -> None:
    """Refuse a graph that is quantised already.

    Raises:
        UsageError: naming the operators that show it.
    """
    found = sorted({n.op_type for n in model.graph.all_nodes()} & QUANTISED)
    if found:
        raise UsageError(
            f"{transform} cannot be applied: the graph is quantised already ({', '.join(found)})",
            allowed="a graph in float32",
            hint="export the original again, with one of --dtype and --quantize",
        )


def opset(model: ir.Model) -> int:
    """Version of the standard operators."""
    version: int = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    return version


def count(model: ir.Model) -> int:
    """Nodes in the main graph and its subgraphs."""
    return sum(1 for _ in model.graph.all_nodes())


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator, those of other domains with their domain."""
    found = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type
                    for n in model.graph.all_nodes())
    return dict(sorted(found.items()))


def is_stored(tensor: Any) -> bool:
    """Whether a tensor lies on disk or is computed when written."""
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)


@contextmanager
def weights_aside(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Stored initializers become graph inputs inside the block, and what they were after it."""
    stored = {n: v.const_value for n, v in model.graph.initializers.items()
              if is_stored(v.const_value)}
    values = [model.graph.initializers.pop(n) for n in stored]
    for value in values:
        value.const_value = None
        model.graph.inputs.append(value)
    try:
        yield {n: t for n, t in stored.items() if t is not None}
    finally:
        for value in values:
            model.graph.inputs.remove(value)
            value.const_value = stored[value.name or ""]
            model.graph.register_initializer(value)


def infer_types(model: ir.Model) -> None:
    """Give every value of the main graph its element type; shapes are left alone.

    Raises:
        UsageError: the graph contradicts itself.
    """
    import onnx
    import onnx_ir as ir

    with weights_aside(model):
        proto = ir.to_proto(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False)
    except onnx.shape_inference.InferenceError as error:
        raise UsageError(f"the graph contradicts itself: {str(error).splitlines()[0]}") from error
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    for value in (*model.graph.initializers.values(),
                  *(v for node in model.graph for v in node.outputs)):
        if value.dtype is None:
            element = types.get(value.name or "", 0)
            if value.const_value is not None:
                value.type = ir.TensorType(value.const_value.dtype)
            elif element:
                value.type = ir.TensorType(ir.DataType(element))


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers, so that there is one kind of constant."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def reference(tensor: ir.TensorProtocol) -> TensorRef | None:
    """Where an external tensor's bytes lie; None for what is in memory or computed."""
    import onnx_ir as ir

    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return TensorRef(Path(tensor.path), tensor.offset or 0, tensor.nbytes,
                     str(tensor.dtype.numpy()), tuple(tensor.shape.numpy()))


def blocks(tensor: ir.TensorProtocol, elements: int = 1 << 22) -> Iterator[np.ndarray]:
    """A float tensor's values in order, as float32 pieces of whole rows where a row fits.

    Pieces are valid until the next is asked for.
    """
    import numpy as np

    ref = reference(tensor)
    if ref is None:
        yield np.asarray(tensor.numpy(), np.float32).reshape(-1)
        return
    from ..artifacts.weights import numpy_dtype, read_chunks

    dtype = numpy_dtype(ref.dtype)
    row = max(1, math.prod(ref.shape[1:]))
    for chunk in read_chunks(ref, max(1, elements // row) * row * dtype.itemsize):
        yield np.frombuffer(chunk, dtype).astype(np.float32, copy=False)


class Probe:
    """A graph opened on the CPU, without optimisations, to read values inside it.

    Weights are read by the runtime from where they lie.

    Args:
        outputs: values that :meth:`run` may be asked for, besides the graph's own outputs.

    Raises:
        BackendUnavailable: onnxruntime is not installed.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[ir.Value]) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise BackendUnavailable(
                "measuring a graph's values needs onnxruntime, which is not installed",
                hint='pip install "modelport[cpu]"',
            ) from error
        import onnx_ir as ir

        before = list(model.graph.outputs)
        known = {v.name for v in (*before, *model.graph.inputs)}
        model.graph.outputs.extend(v for v in outputs if v.name not in known)
        try:
            proto = ir.to_proto(model)
        finally:
            model.graph.outputs[:] = before
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Packed for speed, each matrix would be held once more, beside the mapped file.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False  # these never shrink
        folder = _folder(model)
        if folder is not None:
            settings.add_session_config_entry(_FOLDER, str(folder))
        self._session = ort.InferenceSession(
            proto.SerializeToString(), settings, providers=["CPUExecutionProvider"],
            enable_fallback=0)
        self._inputs = {v.name for v in model.graph.inputs}

    def run(
        self, values: Sequence[ir.Value], feeds: Iterable[Mapping[str, np.ndarray]]
    ) -> Iterator[list[np.ndarray]]:
        """These values for each of the feeds; the others are dropped as soon as they are used."""
        names = [v.name for v in values if v.name not in self._inputs]
        for sample in feeds:
            found = dict(zip(names, self._session.run(names, dict(sample)) if names else (),
                             strict=True))
            yield [found[v.name] if v.name in found else sample[v.name or ""] for v in values]


def _folder(model: ir.Model) -> Path | None:
    """The directory that the graph's external weights lie in."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return Path(value.const_value.base_dir or ".").absolute()
    return None


def clone(model: ir.Model) -> ir.Model:
    """A copy that shares the weights with the original."""
    import onnx_ir as ir

    with weights_aside(model) as stored:
        copied = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    for value in [v for v in copied.graph.inputs if v.name in stored]:
        copied.graph.inputs.remove(value)
        value.const_value = stored[value.name or ""]
        copied.graph.register_initializer(value)
    return copied
