"""TensorRT: engines for NVIDIA GPUs, with an optimisation profile for each batch bucket.

The checkpoint becomes an ONNX artifact first, cast or quantised there and proven; TensorRT builds
engines from that, and the engines are asked what they compute in.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import gpu, profiles
from ..errors import BackendUnavailable, ClaimError, OpsetTooLow, UsageError
from . import Exporter, Written, onnx

if TYPE_CHECKING:
    from pathlib import Path

    from ..artifacts import Artifact
    from ..checkpoints.model import Attention, LoadedModel
    from ..profiles import Engine
    from ..spec import ModelSpec
    from ._tensorrt_build import Settings

PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
TIMING = "timing.cache"
LOG = "build.log"
LAYERS = "layers.json"
"""What the engine inspector says of each engine and profile, as it said it."""

TIMINGS = ".modelport-timings"
"""Directory beside the artifacts where timing caches are kept for the next build."""

SYMMETRIC = "int8-symmetric"
"""The ONNX exporter's quantisation that TensorRT can read."""

LEVELS = range(6)


@dataclass(frozen=True, slots=True)
class TensorRTOptions:
    """What can be asked of TensorRT engines."""

    batch_profiles: str = field(
        default="auto",
        metadata={"help": "largest batch of each bucket, or min:opt:max; 8:8:8 is a fixed batch; "
                          "auto: 1,2,4,8,16,32,64 as far as the model takes it"},
    )
    seq_lens: str = field(
        default="auto",
        metadata={"help": "sequence lengths min:opt:max, or one for a fixed length; auto: "
                          "1:128:512 as far as the model takes it"},
    )
    dtype: str = field(
        default="fp32",
        metadata={"help": "type the ONNX graph is cast or quantised to, which is what TensorRT "
                          "computes in", "choices": tuple(PRECISION)},
    )
    layout: str = field(
        default="auto",
        metadata={"help": "profiles in one engine or an engine for each; auto: one up to "
                          f"{profiles.MAX_PROFILES}",
                  "choices": ("auto", "multi-profile", "engine-per-profile")},
    )
    opset: int | str = field(
        default=onnx.DEFAULT_OPSET,
        metadata={"help": "operator set of the ONNX graph, 11 to 25; auto: 17 or what --dtype "
                          "needs"},
    )
    workspace: int = field(
        default=0, metadata={"help": "MiB of scratch memory a layer may use; 0: all there is"}
    )
    opt_level: int = field(
        default=3, metadata={"help": "builder optimisation level, 0 (quick) to 5 (thorough)"}
    )
    tf32: bool = field(
        default=False, metadata={"help": "allow TensorFloat-32 for float32 layers"}
    )
    version_compatible: bool = field(
        default=False,
        metadata={"help": "run on later TensorRT of the same major version too; of 10, also on 11"},
    )
    hardware_compatible: str = field(
        default=gpu.EXACT,
        metadata={"help": "other GPUs the engine runs on, at some cost in speed",
                  "choices": (gpu.EXACT, gpu.SAME_CAPABILITY, gpu.AMPERE_PLUS)},
    )
    refit: bool = field(default=False, metadata={"help": "weights can be replaced later"})
    strip_plan: bool = field(
        default=False,
        metadata={"help": "store the weights once, beside the engines, instead of in each"},
    )
    weight_streaming: bool = field(
        default=False, metadata={"help": "weights larger than the GPU's memory stay on the host"}
    )


class TensorRTExporter(Exporter[TensorRTOptions]):
    parent = "onnx"
    options_type = TensorRTOptions

    def check(self, options: TensorRTOptions) -> None:
        if options.batch_profiles != profiles.AUTO:
            profiles.buckets(options.batch_profiles)
        if options.seq_lens != profiles.AUTO:
            profiles.parse_range(options.seq_lens, "--seq-lens")
        if options.opt_level not in LEVELS:
            raise UsageError(f"optimisation level {options.opt_level} does not exist",
                             allowed=f"{LEVELS[0]} to {LEVELS[-1]}", hint="--opt-level 3")
        if options.workspace < 0:
            raise UsageError(f"a workspace of {options.workspace} MiB", allowed="0 or more")
        if options.version_compatible and (options.refit or options.strip_plan):
            raise UsageError(
                "a version-compatible engine brings a lean runtime, which cannot refit weights",
                allowed="one of --version-compatible and --refit or --strip-plan",
            )
        try:
            onnx.EXPORTER.check(self.parent_options(options))
        except OpsetTooLow as error:  # its hints are options of the ONNX format
            raise OpsetTooLow(f"{error.found}, which --dtype {options.dtype} needs",
                              needed=error.needed) from error
        if reason := gpu.unavailable():
            raise BackendUnavailable(reason)

    def parent_options(self, options: TensorRTOptions) -> onnx.OnnxOptions:
        """The ONNX artifact to build from; TensorRT does its own fusion."""
        chosen: dict[str, Any] = {"opset": options.opset}
        if options.dtype != "int8":
            return onnx.OnnxOptions(**chosen, dtype=options.dtype)
        # TensorRT wants scales in the graph and a zero point of 0: neither MatMulInteger nor
        # activations in uint8 have a translation.
        return onnx.OnnxOptions(**chosen, quantize=SYMMETRIC)

    def strategies(self, options: TensorRTOptions) -> tuple[str, ...]:
        return ("build",)

    def attention(self, options: TensorRTOptions) -> Attention:
        return onnx.EXPORTER.attention(self.parent_options(options))

    def export(
        self,
        model: LoadedModel,
        parent: Artifact | None,
        out: Path,
        options: TensorRTOptions,
        strategy: str,
    ) -> None:
        from . import NOTIFY
        from . import _tensorrt_build as building

        assert parent is not None, "an engine is built from an ONNX artifact"
        trt, here = gpu.tensorrt(), gpu.machine()
        cache = out.parent / TIMINGS / building.cache_name(here)
        lines = [f"modelport: TensorRT {here.tensorrt} on {here.gpu}, driver {here.driver}"]
        notify, graph = NOTIFY.get(), parent.root / onnx.GRAPH
        engines = planned(model.spec, options)
        for engine in engines:
            notify(f"building {engine.file}")
            building.build(trt, graph, model.spec, engine, out, settings(options), cache, lines,
                           notify)
        if options.strip_plan:
            for name in (onnx.GRAPH, *_weights(parent)):
                shutil.copyfile(parent.root / name, out / name)
        if cache.exists():
            shutil.copyfile(cache, out / TIMING)
        (out / LOG).write_text(building.log_text(lines, parent.root), "utf-8")
        reports = {e.file: _reports(trt, out, e, model.spec, options) for e in engines}
        (out / LAYERS).write_text(json.dumps(reports, indent=1) + "\n", "utf-8")

    def read_back(self, model: LoadedModel, out: Path, options: TensorRTOptions) -> Written:
        from . import _tensorrt_precision as precision

        trt, here = gpu.tensorrt(), gpu.machine()
        engines = planned(model.spec, options)
        reports = json.loads((out / LAYERS).read_text("utf-8"))
        layers: dict[str, dict[str, int]] = {}
        for engine in engines:
            _claimed(trt, out, engine, model.spec, options)
            for index, report in enumerate(reports[engine.file]):
                where = f"{engine.file} profile {index}"
                layers[where] = precision.require(
                    precision.parse(report), PRECISION[options.dtype], where
                )
        every = [profile for engine in engines for profile in engine.profiles]
        facts: dict[str, Any] = {
            "engines": profiles.record(engines),
            "layers": layers,
            "bytes": sum((out / engine.file).stat().st_size for engine in engines),
            "weights": "beside the engines" if options.strip_plan else "in the engines",
        }
        if options.dtype in ("fp16", "bf16"):  # what int8 means, the parent says
            facts["precision"] = PRECISION[options.dtype]
        target = here.target(
            version_compatible=options.version_compatible, hardware=options.hardware_compatible
        )
        return Written(profiles.narrowed(model.spec, every), facts, target)


def planned(spec: ModelSpec, options: TensorRTOptions) -> tuple[Engine, ...]:
    """The engines that options ask for."""
    found = profiles.plan(spec, options.batch_profiles, options.seq_lens)
    return profiles.arrange(found, options.layout)  # type: ignore[arg-type]


def settings(options: TensorRTOptions) -> Settings:
    """What the builder is told."""
    from ._tensorrt_build import Settings

    return Settings(
        workspace=options.workspace << 20,
        level=options.opt_level,
        tf32=options.tf32,
        version_compatible=options.version_compatible,
        hardware=options.hardware_compatible,
        refit=options.refit,
        strip_plan=options.strip_plan,
        weight_streaming=options.weight_streaming,
    )


def _weights(parent: Artifact) -> list[str]:
    return [name for name in parent.manifest.files if name.endswith((".safetensors", ".data"))]


@dataclass(frozen=True, slots=True)
class _Opened:
    """An engine with what must outlive it."""

    engine: Any
    runtime: Any
    log: Any


def _opened(trt: Any, out: Path, engine: Engine, options: TensorRTOptions, log: Any) -> _Opened:
    """The engine that was just written, opened as a runtime would."""
    runtime = trt.Runtime(log)
    # A version-compatible engine carries a runtime of its own, which is code.
    runtime.engine_host_code_allowed = options.version_compatible
    found = runtime.deserialize_cuda_engine((out / engine.file).read_bytes())
    if found is None:
        raise ClaimError(f"{engine.file} cannot be opened again")
    if options.strip_plan:
        gpu.refit(trt, found, log, out / onnx.GRAPH)
    gpu.stream_weights(found)
    return _Opened(found, runtime, log)


def _reports(
    trt: Any, out: Path, engine: Engine, spec: ModelSpec, options: TensorRTOptions
) -> list[str]:
    """The engine inspector's report for each profile.

    With dynamic shapes an engine by itself says "N/A due to dynamic shapes" instead of types: the
    inspector needs a context whose profile and shapes are chosen.
    """
    lines: list[str] = []
    held = _opened(trt, out, engine, options, gpu.logger(trt, lines))
    opened = held.engine
    stream = gpu.new_stream()
    reports = []
    for index, profile in enumerate(engine.profiles):
        # Inspecting runs nothing, so the context needs no memory for activations.
        context = opened.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise ClaimError(f"{engine.file} gives no context: {gpu.complaints(lines)}")
        if not context.set_optimization_profile_async(index, stream.cuda_stream):
            raise ClaimError(f"{engine.file} has no profile {index}")
        for tensor in spec.inputs:
            if not context.set_input_shape(tensor.name, profile.shapes(spec, tensor.name)[1]):
                raise ClaimError(f"{engine.file} refuses its own typical shape of {tensor.name}")
        inspector = opened.create_engine_inspector()
        inspector.execution_context = context
        reports.append(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return reports


def _claimed(
    trt: Any, out: Path, engine: Engine, spec: ModelSpec, options: TensorRTOptions
) -> None:
    """Compare names, types and profiles of a written engine with what was asked for.

    Raises:
        ClaimError: they differ.
    """
    held = _opened(trt, out, engine, options, gpu.logger(trt, []))
    opened = held.engine
    modes = {"inputs": trt.TensorIOMode.INPUT, "outputs": trt.TensorIOMode.OUTPUT}
    names = [opened.get_tensor_name(i) for i in range(opened.num_io_tensors)]
    for kind, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        wanted = {t.name: gpu.DTYPES[t.dtype] for t in tensors}
        found = {n: opened.get_tensor_dtype(n).name for n in names
                 if opened.get_tensor_mode(n) == modes[kind]}
        if wanted != found:
            raise ClaimError(f"{kind} of {engine.file} are {found}", allowed=str(wanted))
    if opened.num_optimization_profiles != len(engine.profiles):
        raise ClaimError(f"{engine.file} has {opened.num_optimization_profiles} profiles",
                         allowed=str(len(engine.profiles)))
    for index, profile in enumerate(engine.profiles):
        for tensor in spec.inputs:
            wanted_shapes = profile.shapes(spec, tensor.name)
            shapes = tuple(
                tuple(shape) for shape in opened.get_tensor_profile_shape(tensor.name, index)
            )
            if shapes != wanted_shapes:
                raise ClaimError(
                    f"profile {index} of {engine.file} has {tensor.name} at {shapes}",
                    allowed=str(wanted_shapes),
                )


EXPORTER = TensorRTExporter()
