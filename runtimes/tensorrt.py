"""TensorRT engines: requests are routed to a profile by batch and length, each with a context."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import gpu, profiles
from ..errors import BackendUnavailable, ClaimError, DigestMismatch, ModelportError, SpecError
from ..session import Placement, Session
from . import Runtime, _tensorrt_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..profiles import Engine, Profile

GRAPH = "model.onnx"
"""The weights of engines that were stored without any."""


class TensorRT(Runtime):
    formats = ("tensorrt",)
    package = "tensorrt"
    options: ClassVar[Mapping[str, Any]] = {"cuda_graph": False, "weight_budget": -1}

    def unavailable(self, device: str = "cpu") -> str | None:
        if device != "cuda":
            return "TensorRT engines run on cuda only; add --device cuda"
        return gpu.unavailable()

    def require(self, artifact: Artifact, device: str = "cpu") -> None:
        super().require(artifact, device)
        if reason := gpu.refusal(artifact.manifest.target, gpu.machine()):
            raise BackendUnavailable(
                reason, hint="modelport export tensorrt on this machine, or with "
                "--hardware-compatible or --version-compatible"
            )

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``cuda_graph`` (bound launches are captured and replayed, one graph for the
        shape last bound to a profile); ``weight_budget`` (bytes of streamable weights to keep on
        the GPU; -1: TensorRT decides; only for engines built with weight streaming).

        An engine is executable code. Before any of it is deserialised, the GPU and the versions
        are compared with those it was made for, and its bytes with their digest.

        Raises:
            BackendUnavailable: TensorRT or a GPU is absent, or not those the engine was made for.
            DigestMismatch: an engine's bytes are not those the manifest names.
        """
        chosen = self.resolve_options(options)
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        self.require(artifact, device)
        return TensorRTSession(artifact, chosen)


@dataclass(slots=True)
class _Slot:
    """An execution context, whose profile was chosen once, and what it is set up for.

    Attributes:
        binding: whose shapes and addresses the context holds.
        memory: number of the scratch block it was given; the block itself is not held.
        replay: launches the captured graph of ``binding``.
    """

    context: Any
    engine: Any
    profile: int
    binding: Binding | None = None
    memory: int = 0
    replay: Callable[[], None] | None = None


class TensorRTSession(Session):
    """All engines of an artifact, on one stream.

    Contexts of all profiles share one block of scratch memory, which is right because one stream
    runs one of them at a time. It grows to the largest need met.
    """

    runtime = "tensorrt"

    def __init__(self, artifact: Artifact, options: Mapping[str, Any]) -> None:
        super().__init__(artifact.spec)
        self._trt = gpu.tensorrt()
        self._engines = profiles.from_record(
            artifact.manifest.facts.get("engines"), artifact.spec
        )
        self._graphs = bool(options["cuda_graph"])
        self._device = _tensorrt_device.Device()
        self._lines: list[str] = []
        self._log = gpu.logger(self._trt, self._lines)
        self._scratch: Any = None
        self._scratch_bytes = self._scratch_number = 0
        self._runtime = self._trt.Runtime(self._log)
        # A version-compatible engine carries a runtime of its own, which is code.
        compatible = artifact.manifest.target.get("version_compatible") == "yes"
        self._runtime.engine_host_code_allowed = compatible
        self._slots: list[list[_Slot]] = []
        self._opened: list[Any] = []
        for engine in self._engines:
            opened = self._deserialised(artifact, engine)
            gpu.stream_weights(opened, int(options["weight_budget"]))
            self._require(opened, engine)
            self._opened.append(opened)
            self._slots.append(
                [self._slot(opened, engine, index) for index in range(len(engine.profiles))]
            )
        self._device.synchronize()  # the choice of profiles is on the stream

    def placement(self) -> Placement:
        return Placement("cuda", ("TensorRT",))

    def synchronize(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        super().close()
        for name in ("_slots", "_opened", "_scratch", "_runtime"):  # contexts before engines
            self.__dict__.pop(name, None)

    def device_seconds(self, launch: Callable[[], None]) -> float:
        """Run ``launch`` between two events on the session's stream; seconds between them."""
        return self._device.seconds(launch)

    def device_memory(self) -> tuple[int, int]:
        """Peak bytes torch allocated and reserved: feeds, outputs and scratch, no weights."""
        return self._device.memory()

    def run_tensors(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Run once on torch CUDA tensors where they lie; outputs stay on the device.

        Work that torch's current stream holds is finished first, and that stream waits for the
        outputs; the host waits for neither.

        Raises:
            SpecError: a tensor is on another device, of another type or shape, or not row-major.
        """
        binding = self.bind_tensors(tensors)
        self._device.wait_for_caller(list(tensors.values()))
        self._enqueue(binding)
        outputs = dict(binding.outputs)
        self._device.let_caller_wait(list(outputs.values()))
        return outputs

    def bind_tensors(self, tensors: Mapping[str, Any]) -> Binding:
        """A launch that reads torch CUDA tensors where they lie, whatever they hold by then."""
        self._check_open()
        sizes = self._sizes(tensors)
        for tensor in self.spec.inputs:
            shape = self.spec.shape(tensor, sizes)
            if not self._device.fits(tensors[tensor.name], shape, tensor.dtype):
                raise SpecError(
                    f"{tensor.name} cannot be read in place",
                    allowed=f"a row-major CUDA tensor {tensor.dtype}{list(shape)}",
                )
        return self._bound(sizes, dict(tensors))

    def _sizes(self, tensors: Mapping[str, Any]) -> dict[str, int]:
        import numpy as np

        # The spec checks arrays: stand-ins of stride 0 have the tensors' names, types and shapes.
        stand_ins = {
            name: np.broadcast_to(
                np.zeros((), _numpy_dtype(str(value.dtype).removeprefix("torch."))),
                tuple(value.shape),
            )
            for name, value in tensors.items()
        }
        return self.spec.check(stand_ins)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        binding = self._bind(feeds)
        self._enqueue(binding)
        return binding.download()

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Binding:
        buffers: dict[str, Any] = {}
        for tensor in self.spec.inputs:
            value = feeds[tensor.name]
            buffer = self._device.empty(tuple(value.shape), tensor.dtype)
            self._device.upload(value, buffer)
            buffers[tensor.name] = buffer
        return self._bound(self.spec.check(feeds), buffers)

    def _bound(self, sizes: Mapping[str, int], inputs: dict[str, Any]) -> Binding:
        """Choose the profile, give its context shapes and addresses, and allocate the outputs."""
        where = profiles.route(self._engines, sizes)
        slot = self._slots[where.engine][where.profile]
        shapes = {t.name: self.spec.shape(t, sizes) for t in self.spec.inputs}
        binding = Binding(self, slot, shapes, inputs)
        self._set_shapes(binding)
        for tensor in self.spec.outputs:
            shape = tuple(slot.context.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                raise ModelportError(f"the shape of {tensor.name} depends on the data: {shape}")
            binding.outputs[tensor.name] = self._device.empty(shape, tensor.dtype)
        self._occupy(binding)
        return binding

    def _set_shapes(self, binding: Binding) -> None:
        slot = binding.slot
        slot.binding = slot.replay = None  # a graph holds for the shapes it was captured with
        for name, shape in binding.shapes.items():
            if not slot.context.set_input_shape(name, shape):
                raise self._failed(f"refused {name} at {list(shape)}")
        if missing := slot.context.infer_shapes():
            raise self._failed(f"lacks the shapes of {', '.join(missing)}")

    def _occupy(self, binding: Binding) -> None:
        """Give the slot's context this binding's addresses and enough scratch memory."""
        slot = binding.slot
        for name, buffer in (*binding.inputs.items(), *binding.outputs.items()):
            if not slot.context.set_tensor_address(name, self._device.address(buffer)):
                raise self._failed(f"refused the address of {name}")
        self._give_scratch(slot)
        slot.binding = binding

    def _give_scratch(self, slot: _Slot) -> None:
        # The need at these shapes; 0 means that it cannot tell, or needs none.
        need = slot.context.update_device_memory_size_for_shapes()
        need = need or slot.engine.get_device_memory_size_for_profile_v2(slot.profile)
        if self._scratch is None or need > self._scratch_bytes:
            self._scratch_bytes = max(need, _tensorrt_device.ALIGNMENT)
            self._scratch = None  # the old block is free before the new one is asked for
            self._scratch = self._device.empty((self._scratch_bytes,), "uint8")
            self._scratch_number += 1
        slot.context.set_device_memory(self._device.address(self._scratch), self._scratch_bytes)
        slot.memory = self._scratch_number

    def _enqueue(self, binding: Binding) -> None:
        """Launch on the stream; what another binding changed in the context is set again."""
        slot = binding.slot
        if slot.binding is not binding:
            self._set_shapes(binding)
            self._occupy(binding)
        elif slot.memory != self._scratch_number:  # it grew, and graphs know the old address
            slot.replay = None
            self._give_scratch(slot)
        if not slot.context.execute_async_v3(self._device.stream):
            raise self._failed("did not run")

    def _launch(self, binding: Binding) -> None:
        """A launch that may be repeated: replays the graph, which it captures when there is none.

        The first launch of a shape runs as it is, which lets TensorRT settle what it put off; then
        it is recorded, which waits for the device once. Later ones only replay.
        """
        self._check_open()
        slot = binding.slot
        current = slot.binding is binding and slot.memory == self._scratch_number
        if self._graphs and current and slot.replay is not None:
            slot.replay()
            return
        self._enqueue(binding)
        if self._graphs:
            self._device.synchronize()
            slot.replay = self._device.capture(lambda: self._record(slot))

    def _record(self, slot: _Slot) -> None:
        if not slot.context.execute_async_v3(self._device.stream):
            raise self._failed("could not be captured")

    def _slot(self, opened: Any, engine: Engine, index: int) -> _Slot:
        """A context of a profile; the profile is chosen once, as changing it is slow."""
        context = opened.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise self._failed(f"gave no context for {engine.file}")
        if not context.set_optimization_profile_async(index, self._device.stream):
            raise self._failed(f"has no profile {index} in {engine.file}")
        return _Slot(context, opened, index)

    def _deserialised(self, artifact: Artifact, engine: Engine) -> Any:
        entry = artifact.manifest.files.get(engine.file)
        if entry is None:
            raise DigestMismatch(f"the manifest names no digest of {engine.file}",
                                 hint="export the artifact again")
        path = artifact.root / engine.file
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = hashlib.sha256(data).hexdigest()
            if found != entry.sha256:
                raise DigestMismatch(f"{path} has sha256 {found}", allowed=entry.sha256,
                                     hint="export the artifact again, or fetch it again")
            opened = self._runtime.deserialize_cuda_engine(data)
        if opened is None:
            raise self._failed(f"could not read {engine.file}")
        if artifact.manifest.facts.get("weights") == "beside the engines":
            gpu.refit(self._trt, opened, self._log, _graph(artifact))
        return opened

    def _require(self, opened: Any, engine: Engine) -> None:
        """The engine has the tensors of the spec and the profiles that routing relies on.

        Raises:
            ClaimError: it has others.
        """
        names = {opened.get_tensor_name(i) for i in range(opened.num_io_tensors)}
        tensors = (*self.spec.inputs, *self.spec.outputs)
        if names != {t.name for t in tensors}:
            raise ClaimError(f"{engine.file} has the tensors {', '.join(sorted(names))}",
                             allowed=", ".join(t.name for t in tensors))
        for tensor in tensors:
            dtype = opened.get_tensor_dtype(tensor.name)
            if dtype != getattr(self._trt.DataType, gpu.DTYPES[tensor.dtype]):
                raise ClaimError(f"{tensor.name} of {engine.file} is {dtype.name}",
                                 allowed=tensor.dtype)
        if opened.num_optimization_profiles != len(engine.profiles):
            raise ClaimError(f"{engine.file} has {opened.num_optimization_profiles} profiles",
                             allowed=str(len(engine.profiles)))
        for index, profile in enumerate(engine.profiles):
            self._require_profile(opened, engine, index, profile)

    def _require_profile(self, opened: Any, engine: Engine, index: int, profile: Profile) -> None:
        for tensor in self.spec.inputs:
            found = tuple(tuple(s) for s in opened.get_tensor_profile_shape(tensor.name, index))
            if found != profile.shapes(self.spec, tensor.name):
                raise ClaimError(
                    f"profile {index} of {engine.file} has {tensor.name} at {found}",
                    allowed=str(profile.shapes(self.spec, tensor.name)),
                )

    def _failed(self, what: str) -> ModelportError:
        return ModelportError(f"TensorRT {what}: {gpu.complaints(self._lines)}")


class Binding:
    """A launch bound to feeds. Calling it runs the engine and returns before it is done.

    Attributes:
        inputs, outputs: device buffers by name; outputs are overwritten by every launch.
    """

    def __init__(
        self, session: TensorRTSession, slot: _Slot, shapes: Mapping[str, tuple[int, ...]],
        inputs: dict[str, Any],
    ) -> None:
        self.slot = slot
        self.shapes = shapes
        self.inputs = inputs
        self.outputs: dict[str, Any] = {}
        self._session = session

    def __call__(self) -> None:
        self._session._launch(self)

    def download(self) -> dict[str, np.ndarray]:
        """The outputs of the last launch on the host; waits for it."""
        return {name: self._session._device.download(b) for name, b in self.outputs.items()}


def _graph(artifact: Artifact) -> Path:
    """The ONNX file that holds the weights, after the checks that every ONNX file goes through."""
    from ..artifacts import onnx_files

    onnx_files.check_external_data(artifact.root / GRAPH)
    return artifact.root / GRAPH


def _numpy_dtype(name: str) -> Any:
    import numpy as np

    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


RUNTIME = TensorRT()
