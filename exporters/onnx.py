"""ONNX: a graph with named dynamic axes beside its weights in safetensors.

The graph is captured with placeholder weights; the real ones go from the checkpoint's files into
the artifact's, tensor by tensor or by a file-level copy, and the graph refers to them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import Component
from ..errors import ClaimError, ExportError, OpsetTooLow, UsageError
from ..spec import ModelSpec, TensorSpec
from . import Derivation, Exporter, Written

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..artifacts import Artifact
    from ..checkpoints.model import Attention, LoadedModel

OPSETS = range(11, 26)
DEFAULT_OPSET = 17
DYNAMO_MIN_OPSET = 17
STRATEGIES = ("trace", "dynamo", "transformers")
"""Ways of capture, cheapest first; all but the first need :data:`DYNAMO_MIN_OPSET`."""
SDPA_MIN_OPSET = 14
BF16_MIN_OPSET = 13
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GRAPH = "model.onnx"
AUTO = "auto"
SEARCHED = (
    ("fp32", "none"), ("fp32", "int8-dynamic"), ("fp32", "int8-weights"), ("fp32", "int8-static"),
    ("bf16", "none"), ("fp16", "none"), ("fp32", "int4-weights"),
)
"""``--dtype`` and ``--quantize`` of a search, those that gained most on CPUs first."""



@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """What can be asked of an ONNX artifact."""

    opset: int | str = field(
        default=DEFAULT_OPSET,
        metadata={"help": "ONNX operator set, 11 to 25; auto: 17 or what the rest needs"},
    )
    optimize: str = field(
        default="none",
        metadata={
            "help": "graph transforms; fuse ties the file to ONNX Runtime; auto searches all "
            "combinations, with --dtype and --quantize",
            "choices": ("none", "simplify", "fuse", "auto"),
        },
    )
    strategy: str = field(
        default="auto",
        metadata={
            "help": "how to capture the graph; auto tries the cheapest first",
            "choices": ("auto", "trace", "dynamo", "transformers"),
        },
    )
    dtype: str = field(
        default="fp32",
        metadata={"help": "floating-point type", "choices": ("fp32", "fp16", "bf16")},
    )
    quantize: str = field(
        default="none",
        metadata={
            "help": "int8 weights and activations; or weights alone, for ONNX Runtime",
            "choices": ("none", "int8-dynamic", "int8-static", "int8-symmetric", "int8-weights",
                        "int4-weights"),
        },
    )
    calibration: str = field(
        default="minmax",
        metadata={
            "help": "how int8-static and int8-symmetric choose ranges",
            "choices": ("minmax", "percentile", "entropy"),
        },
    )
    texts: str = field(
        default="", metadata={"help": "file with texts to calibrate on, one a line"}
    )
    budget: str = field(
        default="",
        metadata={"help": "effects accepted of --quantize, such as sqnr_db=15,agreement=0.99"},
    )
    objective: str = field(
        default="latency",
        metadata={
            "help": "what --optimize auto installs the best for",
            "choices": ("latency", "throughput", "size", "memory"),
        },
    )
    search_seconds: int = field(
        default=1800, metadata={"help": "time for --optimize auto; call again to go on"}
    )


class OnnxExporter(Exporter[OnnxOptions]):
    several = True
    options_type = OnnxOptions

    def check(self, options: OnnxOptions) -> None:
        lowest, highest = OPSETS[0], OPSETS[-1]
        if isinstance(options.opset, str) and options.opset != AUTO:
            raise UsageError(f"opset {options.opset!r} is no number",
                             allowed=f"{lowest} to {highest}, or {AUTO}")
        opset = chosen_opset(options)
        if opset not in OPSETS:
            raise UsageError(
                f"opset {opset} is not supported",
                allowed=f"{lowest} to {highest}",
                hint=f"--opset {max(lowest, min(opset, highest))}",
            )
        if options.strategy in STRATEGIES[1:] and opset < DYNAMO_MIN_OPSET:
            raise UsageError(
                f"strategy {options.strategy} cannot write opset {opset}; torch would write 18 "
                "instead",
                allowed=f"{DYNAMO_MIN_OPSET} to {highest} with it, any with trace",
                hint="--strategy trace, or --opset auto",
            )
        if options.dtype == "bf16" and opset < BF16_MIN_OPSET:
            raise OpsetTooLow(
                f"opset {opset} has no bfloat16 arithmetic",
                needed=BF16_MIN_OPSET,
                allowed=f"{BF16_MIN_OPSET} to {highest} with bf16",
                hint=f"--opset {SDPA_MIN_OPSET}, --opset auto, or --dtype fp16",
            )

        lowest_static = 13  # DequantizeLinear by channel
        static = options.quantize in ("int8-static", "int8-symmetric")
        if static and opset < lowest_static:
            raise OpsetTooLow(
                f"opset {opset} cannot express {options.quantize}",
                needed=lowest_static,
                allowed=f"{lowest_static} to {highest}; int8-dynamic at any",
                hint=f"--opset {lowest_static}, --opset auto, or --quantize int8-dynamic",
            )
        if options.search_seconds < 1:
            raise UsageError(f"{options.search_seconds} seconds to search", allowed="at least 1")
        if options.quantize != "none" and options.dtype != "fp32":
            raise UsageError(
                f"--quantize {options.quantize} starts from float32",
                allowed="one of --dtype and --quantize",
            )

    def base(self, options: OnnxOptions) -> OnnxOptions:
        return replace(options, opset=chosen_opset(options), optimize="none", dtype="fp32",
                       quantize="none")

    def candidates(self, options: OnnxOptions) -> tuple[OnnxOptions, ...]:
        if options.optimize != AUTO:
            return ()
        asked = (options.dtype, options.quantize)
        precisions = SEARCHED if asked == ("fp32", "none") else (asked,)
        opset = chosen_opset(options)
        # Every precision first: where the time ends early, that is what differs most.
        return tuple(replace(options, opset=opset, optimize=graph, dtype=dtype, quantize=quantize)
                     for graph in ("none", "simplify", "fuse") for dtype, quantize in precisions)

    def raised(self, options: OnnxOptions, opset: int) -> OnnxOptions | None:
        if options.opset != AUTO or not chosen_opset(options) < opset <= OPSETS[-1]:
            return None
        return replace(options, opset=opset)

    def derivations(self, options: OnnxOptions) -> tuple[Derivation, ...]:
        steps = []
        now = self.base(options)
        if options.optimize != "none":
            # What fusions look for is easier to find in a simplified graph.
            for name in {"fuse": ("simplify", "fuse")}.get(options.optimize, (options.optimize,)):
                now = replace(now, optimize=name)
                steps.append(Derivation(name, {}, now))
        if options.dtype != "fp32":
            now = replace(now, dtype=options.dtype)
            steps.append(Derivation("cast", {"dtype": DTYPES[options.dtype]}, now))
        if options.quantize != "none":
            now = replace(now, quantize=options.quantize)
            settings = {"scheme": options.quantize, "calibration": options.calibration}
            if options.texts:
                settings["texts"] = options.texts
            steps.append(Derivation("quantize", settings, now))
        return tuple(steps)

    def strategies(self, options: OnnxOptions) -> tuple[str, ...]:
        if options.strategy != "auto":
            return (options.strategy,)
        return STRATEGIES if chosen_opset(options) >= DYNAMO_MIN_OPSET else STRATEGIES[:1]

    def attention(self, options: OnnxOptions) -> Attention:
        # Scaled dot-product attention has no translation below opset 14.
        return "sdpa" if chosen_opset(options) >= SDPA_MIN_OPSET else "eager"

    def export(
        self,
        model: LoadedModel,
        parent: Artifact | None,
        out: Path,
        options: OnnxOptions,
        strategy: str,
    ) -> None:
        from ..artifacts import onnx_files
        from . import _onnx_attention, _onnx_capture, _onnx_opsets, _onnx_padding

        capture = {"trace": _onnx_capture.by_trace, "dynamo": _onnx_capture.by_dynamo,
                   "transformers": _onnx_capture.by_transformers}[strategy]
        graphs = {}
        for file, part in _graphs(model).items():
            graph = capture(part, chosen_opset(options))
            _require_dynamic(graph, part.spec)
            _bind_weights(graph, part)
            _onnx_opsets.clip_integers(graph, chosen_opset(options))
            _onnx_opsets.keep_zeros(graph, chosen_opset(options))
            _onnx_padding.keep_zeros(graph)
            _onnx_attention.unguard(graph, chosen_opset(options))
            _tidy(graph, part.spec)
            graphs[file] = graph
        onnx_files.save_all(graphs, out, metadata=_metadata(model, options))

    def read_back(self, model: LoadedModel, out: Path, options: OnnxOptions) -> Written:
        if not model.parts:
            found = self._read_back(model, out / GRAPH, options)
            _require_precision([found.facts], options)
            return found
        components = {}
        for name, part in model.parts.items():
            file = component_file(name)
            written = self._read_back(part, out / file, options)
            components[name] = Component(file, written.spec, written.facts)
        _require_precision([component.facts for component in components.values()], options)
        return Written(model.spec, components=components)

    def _read_back(self, model: LoadedModel, file: Path, options: OnnxOptions) -> Written:
        from ..artifacts import onnx_files

        found = onnx_files.describe(file)
        opset = found.opsets.get("")
        if opset != chosen_opset(options):
            raise ClaimError(f"the file has opset {opset}", allowed=str(options.opset))
        facts = {}
        if options.quantize != "none":
            facts["quantised_products"] = _quantised_products(file)
        spec = ModelSpec(
            _claimed("input", model.spec.inputs, found.inputs),
            _claimed("output", model.spec.outputs, found.outputs),
            model.spec.dims,
        )
        return Written(
            spec,
            {
                "opset": opset,
                "ir_version": found.ir_version,
                "nodes": found.nodes,
                "weight_bytes": dict(found.weight_bytes),
                **facts,
            },
        )


def chosen_opset(options: OnnxOptions) -> int:
    """The opset to write; ``auto`` is the default until something needs a higher one."""
    return DEFAULT_OPSET if options.opset == AUTO else int(options.opset)


def component_file(name: str) -> str:
    """Where a component's graph lies in an artifact of several."""
    return f"{name}.onnx"


def _graphs(model: LoadedModel) -> dict[str, LoadedModel]:
    """What is captured, by the file it goes to."""
    if not model.parts:
        return {GRAPH: model}
    return {component_file(name): part for name, part in model.parts.items()}


def _require_dynamic(graph: ir.Model, spec: ModelSpec) -> None:
    """A dimension asked to be dynamic that came out static fails the attempt."""
    inputs = {value.name: value for value in graph.graph.inputs}
    for tensor in spec.inputs:
        value = inputs.get(tensor.name)
        if value is None:
            raise ExportError(
                f"the captured graph does not read {tensor.name}",
                hint="another --strategy",
            )
        if value.shape is None or len(value.shape) != len(tensor.shape):
            raise ExportError(f"{tensor.name} came out with shape {value.shape}")
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str) and isinstance(value.shape[axis], int):
                raise ExportError(f"dimension {dim} of {tensor.name} came out static")
    _require_dynamic_outputs(graph, spec)


def _require_dynamic_outputs(graph: ir.Model, spec: ModelSpec) -> None:
    """The same of outputs, before they get the spec's shapes.

    What capture left open says nothing. A trace leaves every named dimension open, so there only
    the number of dimensions can tell.
    """
    outputs = {value.name: value.shape for value in graph.graph.outputs}
    given = {dim for tensor in spec.inputs for dim in tensor.shape}
    moving = {name for name, dim in spec.dims.items() if name in given and dim.min < dim.max}
    for tensor in spec.outputs:
        shape = outputs.get(tensor.name)
        if shape is None:
            continue
        if len(shape) != len(tensor.shape):
            raise ExportError(f"{tensor.name} came out with shape {shape}")
        for axis, dim in enumerate(tensor.shape):
            if dim in moving and isinstance(shape[axis], int):
                raise ExportError(f"dimension {dim} of {tensor.name} came out static")


def _bind_weights(graph: ir.Model, model: LoadedModel) -> None:
    """Make every weight an initializer that refers to the checkpoint's bytes.

    After a trace the weights are graph inputs, after dynamo initializers with placeholders; both
    carry the module's names. Buffers that no checkpoint stores keep the module's values.
    """
    import onnx_ir as ir

    names = set(model.spec.input_names)
    g = graph.graph
    for value in [v for v in g.inputs if v.name not in names]:
        g.inputs.remove(value)
        value.const_value = _weight(value, model)
        g.register_initializer(value)
    for name, value in list(g.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor | ir.LazyTensor):
            continue
        if name in model.weights:
            value.const_value = _weight(value, model)


def _weight(value: ir.Value, model: LoadedModel) -> ir.TensorProtocol:
    """The tensor behind a graph value: a reference where the stored dtype fits, else a cast."""
    import onnx_ir as ir

    from ..artifacts import onnx_files

    name = value.name
    assert name is not None
    assert value.dtype is not None
    ref = model.weights.get(name)
    if ref is None:
        held = {**dict(model.module.named_buffers()),  # a parameter without elements is no weight
                **{n: p for n, p in model.module.named_parameters() if not p.numel()}}
        buffer = held.get(name)
        if buffer is None:
            raise ExportError(f"the graph reads {name}, which the checkpoint does not store")
        return ir.tensor(buffer.detach().cpu().numpy(), name=name)
    return onnx_files.tensor(ref, name, value.dtype.numpy().name)


def _tidy(graph: ir.Model, spec: ModelSpec) -> None:
    """Give axes their readable names and drop what only the capture needed.

    Intermediate shapes are those of the sample and mislead a runtime that trusts them.
    """
    import onnx_ir as ir

    outside = {t.name: t for t in (*spec.inputs, *spec.outputs)}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        tensor = outside.get(value.name or "")
        if tensor is not None:
            value.shape = ir.Shape(tensor.shape)
    boundary = {*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()}
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if value not in boundary:
                value.shape = None


def _metadata(model: LoadedModel, options: OnnxOptions) -> Mapping[str, str]:
    from .. import __version__

    return {
        "modelport.version": __version__,
        "modelport.source": model.source.digest,
        "modelport.opset": str(options.opset),
    }


def _claimed(
    kind: str, wanted: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """Compare names, dtypes and axes found in the file with those of the model."""
    names = tuple(t.name for t in found)
    if names != tuple(t.name for t in wanted):
        raise ClaimError(
            f"the file's {kind}s are {', '.join(names) or 'none'}",
            allowed=", ".join(t.name for t in wanted),
        )
    for want, have in zip(wanted, found, strict=True):
        if (want.dtype, want.shape) != (have.dtype, have.shape):
            raise ClaimError(
                f"{kind} {have.name} is {have.dtype}{list(have.shape)} in the file",
                allowed=f"{want.dtype}{list(want.shape)}",
            )
    return wanted


def _require_precision(components: Sequence[Mapping[str, Any]], options: OnnxOptions) -> None:
    """The weights of all graphs together are as was asked for; one alone may have nothing to cast
    or to quantise, which its facts show."""
    if options.quantize == "none":
        _claimed_dtype(_added(c["weight_bytes"] for c in components), DTYPES[options.dtype])
    else:
        _claimed_quantised(_added(c["quantised_products"] for c in components), options.quantize)


def _added(found: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in found:
        total.update(one)
    return total


def _claimed_dtype(found: Mapping[str, int], dtype: str) -> None:
    """Most of the floating-point weights must be of the dtype that was asked for."""
    floats = {name: size for name, size in found.items() if name in DTYPES.values()}
    if floats and max(floats, key=lambda name: floats[name]) != dtype:
        shares = ", ".join(f"{size} bytes {name}" for name, size in floats.items())
        raise ClaimError(f"the file's weights are {shares}", allowed=f"{dtype} for most of them")


def _quantised_products(file: Path) -> dict[str, int]:
    """How many products with a weight a file has, by how the weight is stored."""
    from ..artifacts import onnx_files

    found: Counter[str] = Counter()
    for node in onnx_files.load(file).graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type == "MatMulNBits":
            found[f"int{node.attributes['bits'].value}-weights"] += 1
        elif node.op_type == "MatMulInteger":
            found["int8-dynamic"] += 1
        elif node.op_type == "MatMul" and weight is not None:
            producer = weight.producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                found["int8-static"] += 1
    return dict(sorted(found.items()))


def _claimed_quantised(found: Mapping[str, int], scheme: str) -> None:
    """Some products must be quantised in the way that was asked for."""
    wanted = "int8-static" if scheme == "int8-symmetric" else scheme
    if not found.get(wanted):
        shown = ", ".join(f"{count} {name}" for name, count in found.items()) or "none"
        raise ClaimError(f"the file's quantised products are {shown}", allowed=wanted,
                         hint="a wider --budget, if it was too narrow for any layer")


EXPORTER = OnnxExporter()
