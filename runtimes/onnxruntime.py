"""ONNX Runtime on the CPU or CUDA provider; the provider in use is read back, never assumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import gpu
from ..errors import BackendUnavailable, UsageError
from ..session import Placement, Session
from . import Runtime

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..spec import ModelSpec

TENSORRT = "TensorrtExecutionProvider"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LEVELS = ("disabled", "basic", "extended", "all")


class OnnxRuntime(Runtime):
    formats = ("onnx",)
    package = "onnxruntime"
    suffixes = (".onnx",)
    options: ClassVar[Mapping[str, Any]] = {
        "threads": 0, "spinning": True, "level": "all", "tf32": False, "cuda_graph": False,
        "tensorrt": False,
    }

    def unavailable(self, device: str = "cpu") -> str | None:
        try:
            import onnxruntime
        except ImportError:
            extra = "gpu" if device == "cuda" else "cpu"
            return f'onnxruntime is not installed: pip install "modelport[{extra}]"'
        if device not in PROVIDERS:
            return f"ONNX Runtime has no device {device!r} here; there are {', '.join(PROVIDERS)}"
        if PROVIDERS[device] not in onnxruntime.get_available_providers():
            return (
                f"this build of onnxruntime has no {PROVIDERS[device]}: "
                'pip uninstall onnxruntime && pip install "modelport[gpu]"'
            )
        if device == "cuda" and not gpu.present():
            return "there is no NVIDIA GPU here, or no driver for it"
        return None

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads`` (0: all cores), ``spinning``, ``level`` (graph optimisation:
        disabled, basic, extended, all), ``tf32`` and ``cuda_graph`` (CUDA only), ``tensorrt``
        (CUDA only, without ``cuda_graph``: through ONNX Runtime's TensorRT provider, whose engines
        are cached)."""
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        path = artifact.root / (artifact.graph or "model.onnx")
        if self.resolve_options(options)["tensorrt"]:
            from . import _onnxruntime_tensorrt as route

            chosen = self._checked(device, options)
            return route.opened(artifact, path, device, chosen)
        return self.open_file(path, artifact.spec, device, options)

    def open_file(
        self,
        path: Path,
        spec: ModelSpec,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """See :meth:`open` for the options; ``tensorrt`` wants an artifact, whose digest names the
        cache."""
        chosen = self._checked(device, options)
        if chosen["tensorrt"]:
            raise UsageError("the option tensorrt needs an artifact", allowed="an artifact")
        return OnnxSession(spec, path, device, chosen)

    def _checked(self, device: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
        chosen = self.resolve_options(options)
        if reason := self.unavailable(device):
            raise BackendUnavailable(reason)
        if chosen["level"] not in LEVELS:
            raise UsageError(f"level {chosen['level']!r} is unknown", allowed=", ".join(LEVELS))
        for name in ("tf32", "cuda_graph"):
            if chosen[name] and device != "cuda":
                raise UsageError(f"the option {name} does nothing on {device}",
                                 allowed="on cuda", hint=f"leave {name} out, or --device cuda")
        return chosen


class OnnxSession(Session):
    """A session on a model file.

    Raises:
        BackendUnavailable: the provider was asked for and ONNX Runtime fell back to another, or
            it failed; what another gives instead is never returned.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        device: str,
        options: Mapping[str, Any],
        preferred: tuple[tuple[str, dict[str, str]], ...] = (),
    ) -> None:
        """``preferred``: providers with their options that come before the device's own."""
        import onnxruntime as ort

        from ..artifacts.onnx_files import check_external_data

        check_external_data(path)  # a weight outside the artifact is refused before any loader runs

        super().__init__(spec)
        self._graphs = bool(options["cuda_graph"])
        self._graph = 0
        if device == "cuda":
            _load_cuda()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what it logs as an error it also raises
        settings.intra_op_num_threads = options["threads"]
        settings.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel,
            f"ORT_{'DISABLE' if options['level'] == 'disabled' else 'ENABLE'}_"
            f"{'ALL' if options['level'] == 'disabled' else options['level'].upper()}",
        )
        settings.add_session_config_entry(
            "session.intra_op.allow_spinning", str(int(options["spinning"]))
        )
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = PROVIDERS[device]
        provider_options = (
            {"use_tf32": str(int(options["tf32"])),
             "enable_cuda_graph": str(int(options["cuda_graph"]))}
            if device == "cuda"
            else {}
        )
        self._session = _session(
            path, settings, [*preferred, (provider, provider_options)], recorded=self._graphs)
        self._device = device
        found = self._session.get_providers()
        first = preferred[0][0] if preferred else provider
        if found[0] != first:
            raise BackendUnavailable(
                f"ONNX Runtime fell back to {found[0]} although {first} was asked for",
                hint="modelport doctor",
            )

    def placement(self) -> Placement:
        nodes: Counter[str] = Counter()
        fallback: Counter[str] = Counter()
        for group in self._session.get_provider_graph_assignment_info():
            found = group.get_nodes()
            nodes[group.ep_name] += len(found)
            if group.ep_name == PROVIDERS["cpu"] and self._device != "cpu":
                fallback.update(node.op_type for node in found)
        return Placement(self._device, tuple(self._session.get_providers()), nodes, fallback)

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_session", None)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [o.name for o in self._session.get_outputs()]
        found = _called(self._session.run, names, dict(feeds), self._unrecorded())
        return dict(zip(names, found, strict=True))

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch
        from torch.utils.dlpack import from_dlpack

        self._check_open()
        binding = self._session.io_binding()
        held = {name: value.contiguous() for name, value in feeds.items()}
        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()
        for name, value in held.items():
            binding.bind_input(name, self._device, 0, _element_type(value.dtype),
                               tuple(value.shape), value.data_ptr())
        _called(self._session.run_with_iobinding, self._bind_outputs(binding), self._unrecorded())
        outputs = zip(self._session.get_outputs(), binding.get_outputs(), strict=True)
        return {output.name: from_dlpack(value) for output, value in outputs}

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Launch:
        import onnxruntime as ort

        binding = self._session.io_binding()
        held = []  # the binding refers to these buffers without owning them
        for name, value in feeds.items():
            resident = ort.OrtValue.ortvalue_from_numpy(value, self._device, 0)
            held.append(resident)
            binding.bind_ortvalue_input(name, resident)
        # Recorded now, a CUDA graph would write to the outputs of this run for ever.
        _called(self._session.run_with_iobinding, self._bind_outputs(binding), self._unrecorded())
        outputs = {}
        for output, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
            outputs[output.name] = value  # the shapes are known now: launches reuse these buffers
            binding.bind_ortvalue_output(output.name, value)
        self._graph += 1
        return Launch(self._session, binding, self._run_options(self._graph), held, outputs)

    def _unrecorded(self) -> Any:
        return self._run_options(-1)

    def _run_options(self, graph: int) -> Any:
        """Options that have a run recorded as the CUDA graph of this number, or replay it; -1:
        neither. None where there are no graphs."""
        if not self._graphs:
            return None
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _bind_outputs(self, binding: Any) -> Any:
        for output in self._session.get_outputs():
            binding.bind_output(output.name, self._device)
        return binding


def _session(
    path: Path, settings: Any, providers: Sequence[tuple[str, dict[str, str]]], *, recorded: bool
) -> Any:
    """ONNX Runtime's session.

    Args:
        recorded: as a CUDA graph.

    Raises:
        BackendUnavailable: a provider lacks an operator, can't record the graph, or fails.
    """
    import onnxruntime as ort

    raised, first = _raised(), providers[0][0]
    try:
        # By itself it would print that a provider failed, and go on with the CPU.
        return ort.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    except raised.NotImplemented as error:
        problem = str(error).rpartition("NOT_IMPLEMENTED : ")[2]
        raise BackendUnavailable(
            f"{providers[-1][0]} lacks an operator of this artifact: {problem}",
            hint="--runtime openvino, which computes in bfloat16 on CPUs that have it",
        ) from error
    except (raised.EPFail, RuntimeError, ValueError) as error:
        if first == PROVIDERS["cpu"]:
            raise
        if first == TENSORRT and isinstance(error, raised.EPFail):
            raise BackendUnavailable(
                f"{first} can't open this graph: {_line(error)}",
                allowed="a graph that TensorRT takes as a whole, without operators of ONNX Runtime",
                hint="an artifact made without --optimize fuse, or leave out tensorrt",
            ) from error
        raise BackendUnavailable(f"{first} can't open this graph: {_line(error)}",
                                 hint="modelport doctor") from error
    except raised.Fail as error:
        if not recorded:
            raise
        raise BackendUnavailable(
            "this graph can't be recorded as a CUDA graph, since some of its operators run on "
            "the CPU and are copied from there",
            hint="export it with --optimize fuse, or leave out cuda_graph",
        ) from error


def _called(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call of ONNX Runtime gives.

    Raises:
        BackendUnavailable: the provider failed.
    """
    try:
        return call(*arguments)
    except _raised().EPFail as error:  # looked up when there is one: launches are timed
        raise BackendUnavailable(
            f"ONNX Runtime's provider failed: {_line(error)}",
            hint="modelport doctor, or --device cpu",
        ) from error


def _raised() -> Any:
    """The module of what ONNX Runtime raises; each is an ``Exception`` and no more."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return onnxruntime_pybind11_state


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, slots=True)
class Launch:
    """A run on buffers that stay where they are.

    Attributes:
        options: of the run; they say which CUDA graph it is, where there are graphs.
        inputs, outputs: ``OrtValue``s on the session's device.
    """

    session: Any
    binding: Any
    options: Any
    inputs: Sequence[Any]
    outputs: Mapping[str, Any]

    def __call__(self) -> None:
        _called(self.session.run_with_iobinding, self.binding, self.options)

    def download(self) -> dict[str, np.ndarray]:
        """What the last call left, by name."""
        return {name: value.numpy() for name, value in self.outputs.items()}


def _load_cuda() -> None:
    """Load CUDA's libraries: those that torch came with, then what is missing from other wheels.

    ONNX Runtime looks beside itself only, and prints what it does not find there.
    """
    import contextlib
    import sys

    import onnxruntime
    import torch  # noqa: F401 - a build for CUDA loads its own

    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()


def _element_type(dtype: torch.dtype) -> int:
    """ONNX's number for a torch type."""
    from onnx import TensorProto

    names = {"float32": "FLOAT", "float64": "DOUBLE"}
    name = str(dtype).removeprefix("torch.")
    return int(getattr(TensorProto, names.get(name, name.upper())))


RUNTIME = OnnxRuntime()
