"""Building one TensorRT engine from an ONNX file: network, profiles, configuration, serialisation.

The network is strongly typed: every layer computes in the type its tensors have in the ONNX graph,
and no builder flag can change that. TensorRT 11 knows no other kind of network.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .. import gpu
from ..errors import ClaimError, ExportError

if TYPE_CHECKING:
    from pathlib import Path

    from ..profiles import Engine, Profile
    from ..spec import ModelSpec

Result = TypeVar("Result")
Notify = Callable[[str], None]

WAIT_SECONDS = 0.2
"""How often the waiting thread looks for Ctrl-C while the builder works."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the builder is told.

    Attributes:
        workspace: bytes of scratch memory a layer may use; 0 leaves it to TensorRT (all there is).
        level: builder optimisation level, 0 to 5.
        hardware: a name of ``HardwareCompatibilityLevel`` in lower case with hyphens.
    """

    workspace: int = 0
    level: int = 3
    tf32: bool = False
    version_compatible: bool = False
    hardware: str = gpu.EXACT
    refit: bool = False
    strip_plan: bool = False
    weight_streaming: bool = False


def build(
    trt: Any,
    graph: Path,
    spec: ModelSpec,
    engine: Engine,
    out: Path,
    settings: Settings,
    cache: Path,
    lines: list[str],
    notify: Notify,
) -> None:
    """Build ``engine`` from the ONNX file ``graph`` and write it into ``out``.

    Args:
        spec: inputs and outputs the network must have.
        cache: timing cache, read if it is there and written afterwards.
        lines: receives the builder's log.

    Raises:
        ExportError: the graph cannot be parsed, or no engine came out; with TensorRT's reasons.
        ClaimError: the network's inputs or outputs are not those of ``spec``.
        StorageError: the disk refused the engine.
        KeyboardInterrupt: Ctrl-C while building.
    """
    log = gpu.logger(trt, lines)
    builder = trt.Builder(log)
    net = network(trt, builder, log, graph, lines)
    require_tensors(trt, net, spec)
    config = configured(trt, builder, settings)
    timing = load_cache(config, cache)
    for profile in engine.profiles:
        add_profile(builder, config, net, profile, spec)
    stop = threading.Event()
    # A name of its own: TensorRT does not keep what Python derived alive.
    watch = monitor(trt, stop, lambda text: notify(f"{engine.file}: {text}"))
    config.progress_monitor = watch
    with (out / engine.file).open("wb") as file:
        writer = stream_writer(trt, file)
        done = supervised(
            lambda: builder.build_serialized_network_to_stream(net, config, writer), stop
        )
        if writer.failure is not None:
            from ..artifacts.storage import refusals

            with refusals(out):
                raise writer.failure
    if not done or not writer.written:
        raise ExportError(
            f"TensorRT built no engine {engine.file}: {gpu.complaints(lines)}",
            hint="another --opt-level, a larger --workspace, or fewer --batch-profiles",
        )
    if timing is not None:
        save_cache(config, cache)


def network(trt: Any, builder: Any, log: Any, graph: Path, lines: list[str]) -> Any:
    """A strongly typed network of an ONNX file, whose weights may lie in files beside it.

    Raises:
        ExportError: with every parser error and its node.
    """
    flags = 0  # 11 has strongly typed networks only
    if gpu.major(trt) == 10:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    net = builder.create_network(flags)
    parser = trt.OnnxParser(net, log)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(
            f"TensorRT cannot parse the graph: {gpu.parser_errors(parser)}",
            hint="another --opset, or modelport export onnx and ONNX Runtime",
        )
    if flags and not net.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise ClaimError("the network is not strongly typed", allowed="a strongly typed network")
    return net


def require_tensors(trt: Any, net: Any, spec: ModelSpec) -> None:
    """Names and types of the network's inputs and outputs; int64 must have stayed int64.

    Raises:
        ClaimError: they are not the spec's.
        ExportError: an input is read as a shape, which engines here do not offer.
    """
    inputs = [net.get_input(i) for i in range(net.num_inputs)]
    outputs = [net.get_output(i) for i in range(net.num_outputs)]
    sides = (("inputs", spec.inputs, inputs), ("outputs", spec.outputs, outputs))
    for kind, wanted, found in sides:
        expected = {t.name: getattr(trt.DataType, gpu.DTYPES[t.dtype]) for t in wanted}
        actual = {t.name: t.dtype for t in found}
        if expected != actual:
            raise ClaimError(
                f"the network's {kind} are " + _named(actual), allowed=_named(expected)
            )
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise ExportError(f"the graph reads {tensor.name} as a shape",
                              hint="modelport export onnx and ONNX Runtime")


def _named(tensors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {dtype.name}" for name, dtype in tensors.items()) or "none"


def configured(trt: Any, builder: Any, settings: Settings) -> Any:
    """A builder configuration. Precision is not among what it sets: it lies in the graph."""
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.level
    # Without it the engine names its layers and says nothing of their types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    for wanted, name in (
        (settings.version_compatible, "VERSION_COMPATIBLE"),
        (settings.refit, "REFIT"),
        (settings.strip_plan, "STRIP_PLAN"),
        # The weights that come back are those it was built with, so none stays unfolded for others.
        (settings.strip_plan and not settings.refit, "REFIT_IDENTICAL"),
        (settings.weight_streaming, "WEIGHT_STREAMING"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    if settings.hardware != gpu.EXACT:
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, settings.hardware.upper().replace("-", "_")
        )
    return config


def add_profile(builder: Any, config: Any, net: Any, profile: Profile, spec: ModelSpec) -> None:
    """Add an optimisation profile: smallest, typical and largest shape of every dynamic input.

    Raises:
        ExportError: TensorRT refuses it.
    """
    made = builder.create_optimization_profile()
    dynamic = [t for t in spec.inputs if any(isinstance(d, str) for d in t.shape)]
    if not dynamic:
        return  # fixed shapes: the network's own are the profile
    for tensor in dynamic:
        smallest, typical, largest = profile.shapes(spec, tensor.name)
        made.set_shape(tensor.name, smallest, typical, largest)
    if config.add_optimization_profile(made) < 0:
        ranges = ", ".join(f"{n} {d.min}:{d.opt}:{d.max}" for n, d in profile.dims.items())
        raise ExportError(f"TensorRT refuses the profile {ranges}")


def monitor(trt: Any, stop: threading.Event, notify: Notify) -> Any:
    """A progress monitor that reports the outermost phases and ends the build once ``stop`` is set.

    TensorRT calls it from threads of its own, so nothing it does may raise.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                _quietly(notify, f"{phase_name} (0 of {num_steps})")

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                _quietly(notify, f"{phase_name} ({step + 1} of {self.steps[phase_name]})")
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _quietly(notify: Notify, text: str) -> None:
    with contextlib.suppress(Exception):
        notify(text)


def stream_writer(trt: Any, file: Any) -> Any:
    """A writer that passes the engine on to a file, so that it is never whole in Python's memory.

    Its attribute ``failure`` is the error of the disk, if there was one: an exception cannot cross
    the builder.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                count = int(file.write(data))
            except OSError as error:
                self.failure = error
                return 0
            self.written += count
            return count

    return Writer()


def supervised(work: Callable[[], Result], stop: threading.Event) -> Result:
    """Run ``work`` in a thread of its own; an interruption here sets ``stop`` and waits for it.

    Python handles Ctrl-C in the main thread, and only between its own instructions. Were the
    builder to run there, the signal would wait for the end of the build.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    # Not Thread.join: interrupted, it takes a running thread for a finished one (Python 3.11).
    finished = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="tensorrt-builder", daemon=True).start()
    try:
        while not finished.wait(WAIT_SECONDS):
            pass
    except BaseException:
        stop.set()
        finished.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]


def cache_name(machine: gpu.Machine) -> str:
    """File name of the timing cache for this GPU and TensorRT: timings hold for nothing else."""
    key = f"{machine.gpu}-{machine.compute_capability}-tensorrt-{machine.tensorrt}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", key).strip("-").lower() + ".timing"


def load_cache(config: Any, path: Path) -> Any:
    """Give the configuration the timing cache at ``path``, or an empty one; None if it takes none.

    The cache is returned because it must live as long as the configuration.
    """
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    for data in (stored, b""):
        cache = config.create_timing_cache(data)
        # A cache of another GPU or version is refused, and an empty one takes its place.
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def save_cache(config: Any, path: Path) -> None:
    """Write the timings that the build added; failing to is no failure of the build."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    data = memoryview(cache.serialize())
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(path)


def log_text(lines: Sequence[str], hidden: Path) -> str:
    """The builder's log without the directory it worked in, which is nobody's business."""
    return "".join(line.replace(str(hidden), "…") + "\n" for line in lines)
