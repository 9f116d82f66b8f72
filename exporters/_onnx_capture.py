"""Three ways from a torch module to an ONNX graph. None ever sees a real weight."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._torch_capture import named, quiet

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ..checkpoints import LoadedModel

TRACE_MAX_OPSET = 20
"""The trace-based exporter of torch 2.13 knows no operator newer than this one."""

_WRAPPED = "source."
"""Before the names of the weights of a module behind :func:`~._torch_capture.named`."""


def by_trace(model: LoadedModel, opset: int) -> ir.Model:
    """Trace the module once and translate the recorded operators.

    Above :data:`TRACE_MAX_OPSET` the graph is traced there and lifted by ONNX's own version
    converter, which costs milliseconds because the graph holds no weights.

    Args:
        model: module with placeholder weights; its samples have every dimension at least 2.
        opset: 11 to 25.

    Returns:
        The graph, its weights still graph inputs under their names in the module's state dict.
    """
    import onnx
    import onnx_ir as ir
    import torch
    from onnx import version_converter

    from . import _torch_idioms, _torch_operators

    buffer: Any = io.BytesIO()  # taken by the trace route, though its annotation names paths only
    with (quiet(), _without_parameter_values(), _skipped_products(), torch.no_grad(),
          _torch_operators.translatable(), _torch_idioms.followed(model.module)):
        torch.onnx.export(
            model.module,
            _sample_tensors(model),
            buffer,
            input_names=list(model.spec.input_names),
            output_names=list(model.spec.output_names),
            dynamic_axes=_dynamic_axes(model),
            opset_version=min(opset, TRACE_MAX_OPSET),
            dynamo=False,
            export_params=False,
            keep_initializers_as_inputs=True,
            do_constant_folding=False,
        )
    proto = onnx.load_from_string(buffer.getvalue())
    if opset > TRACE_MAX_OPSET:
        proto = version_converter.convert_version(proto, opset)
    return ir.from_proto(proto)


def by_dynamo(model: LoadedModel, opset: int) -> ir.Model:
    """Capture with ``torch.export`` and translate the ATen graph.

    Args:
        model: as for :func:`by_trace`.
        opset: 17 to 25; below, torch writes 18 and only logs it.

    Returns:
        The graph; its initializers still hold placeholders, under the module's names.
    """
    import torch

    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(t.shape) if isinstance(dim, str)}
        for t in model.spec.inputs
    )
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model.module,
            _sample_tensors(model),
            input_names=list(model.spec.input_names),
            output_names=list(model.spec.output_names),
            dynamic_shapes=(dynamic,),  # forward(*tensors): one entry, the tuple
            opset_version=opset,
            dynamo=True,
            optimize=False,  # folding would turn placeholder weights into constants
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    return program.model


def by_transformers(model: LoadedModel, opset: int) -> ir.Model:
    """Capture as :func:`by_dynamo` does, under the corrections that transformers keeps for it.

    ``transformers.exporters`` carries replacements for what ``torch.export`` cannot follow in
    particular models, and translations that torch's own exporter gets wrong. They are put round
    our module, so that names, weights and dimensions are handled as in every other way.

    Args:
        model: as for :func:`by_trace`.
        opset: 18 to 25; its translations are written in operators of 18.
    """
    import torch
    from transformers.exporters import exporter_onnx as engine
    from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

    names = model.spec.input_names
    captured = named(model.module, model.spec)
    dynamic = {
        t.name: {axis: torch.export.Dim.DYNAMIC
                 for axis, dim in enumerate(t.shape) if isinstance(dim, str)}
        for t in model.spec.inputs
    }
    with quiet(), torch.no_grad(), apply_patches("onnx"), apply_patches("dynamo"):
        exported = torch.export.export(
            captured, _sample_tensors(model), dynamic_shapes=dynamic, strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        apply_fx_node_fixes("onnx", exported.graph_module)
        program = torch.onnx.export(
            exported,
            input_names=list(names),
            output_names=list(model.spec.output_names),
            custom_translation_table=engine._ONNX_TRANSLATION_TABLE,
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    engine.apply_onnx_ir_fixes(program)
    return _unwrapped(program.model)


def _unwrapped(graph: ir.Model) -> ir.Model:
    """The graph with the weights under the names they have in the model's own module."""
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith(_WRAPPED):
            del graph.graph.initializers[name]
            value.name = name.removeprefix(_WRAPPED)
            graph.graph.initializers[value.name] = value
    return graph


def _sample_tensors(model: LoadedModel) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.from_numpy(model.samples[name]) for name in model.spec.input_names)


def _dynamic_axes(model: LoadedModel) -> dict[str, dict[int, str]]:
    tensors = (*model.spec.inputs, *model.spec.outputs)
    return {
        t.name: {axis: dim for axis, dim in enumerate(t.shape) if isinstance(dim, str)}
        for t in tensors
    }


@contextmanager
def _without_parameter_values() -> Iterator[None]:
    """Keep shape inference from materialising the parameters it is handed.

    That one pass copies every parameter into its own proto; with an empty dictionary the shapes
    come from the graph inputs just the same. 110 M parameters: 0.9 GB become 0.5 GB.
    """
    import torch

    name = "_jit_pass_onnx_graph_shape_type_inference"
    original: Any = getattr(torch._C, name)
    setattr(torch._C, name, lambda graph, _parameters, opset: original(graph, {}, opset))
    try:
        yield
    finally:
        setattr(torch._C, name, original)


@contextmanager
def _skipped_products() -> Iterator[None]:
    """Let matrix products with placeholder weights return zeros at once.

    Tracing records operators, not values, and a product with a placeholder is worth nothing; but
    it costs the arithmetic and a packed copy of each weight (98 MB for one vocabulary projection).
    The override sits below the tracer, so the graph is the same byte for byte.
    """
    import torch

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((x.shape[0], w.shape[1]))

    def product_plus(
        b: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        return product(x, w)

    new_library: Any = torch.library.Library
    library = new_library("aten", "IMPL")
    try:
        library.impl("mm", product, "CPU")
        library.impl("addmm", product_plus, "CPU")
        yield
    finally:
        library._destroy()
