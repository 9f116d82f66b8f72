"""OpenVINO on the CPU, reading the same ONNX artifacts; runs bfloat16 where the CPU has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BackendUnavailable, UsageError
from ..session import Placement, Session
from . import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

    from ..artifacts import Artifact
    from ..checkpoints import LoadedModel
    from ..spec import ModelSpec

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
CAPABILITIES = {"bf16": "BF16"}
"""What OpenVINO calls the CPU's ability to compute in a precision."""


class OpenVino(Runtime):
    formats = ("onnx",)
    package = "openvino"
    options: ClassVar[Mapping[str, Any]] = {"threads": 0, "precision": "artifact"}

    def unavailable(self, device: str = "cpu") -> str | None:
        from importlib.util import find_spec

        if find_spec("openvino") is None:
            return 'openvino is not installed: pip install "modelport[openvino]"'
        if device != "cpu":
            return f"OpenVINO has no device {device!r} here; there is cpu"
        return None

    def require(self, artifact: Artifact, device: str = "cpu") -> None:
        super().require(artifact, device)
        target = artifact.manifest.target.get("runtime", self.name)
        if target != self.name:
            raise BackendUnavailable(f"this artifact's operators are those of {target}",
                                     hint=f"--runtime {target}")

    def open(
        self,
        artifact: Artifact | LoadedModel,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Session:
        """Options: ``threads`` (0: all cores), ``precision`` of the arithmetic (fp32, bf16;
        artifact: bf16 for an artifact in bfloat16, else fp32)."""
        chosen = self.resolve_options(options)
        from ..artifacts import Artifact

        assert isinstance(artifact, Artifact)
        self.require(artifact, device)
        precision = chosen["precision"]
        if precision == "artifact":
            stated = artifact.manifest.facts.get("precision")
            precision = "bf16" if stated == "bfloat16" else "fp32"
        if precision not in PRECISIONS:
            raise UsageError(f"precision {precision!r} is unknown",
                             allowed=", ".join(("artifact", *PRECISIONS)))
        path = artifact.root / (artifact.graph or "model.onnx")
        return OpenVinoSession(artifact.spec, path, precision, chosen["threads"])


class OpenVinoSession(Session):
    """A session on a model file, compiled for this CPU.

    Raises:
        BackendUnavailable: the CPU lacks the precision, an operator is not supported, or the
            precision read back is not the one asked for.
    """

    runtime = "openvino"

    def __init__(self, spec: ModelSpec, path: Path, precision: str, threads: int) -> None:
        import openvino as ov

        super().__init__(spec)
        core = ov.Core()
        capable = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        needed = CAPABILITIES.get(precision)
        if needed and needed not in capable:
            raise BackendUnavailable(
                f"this CPU has no {precision} arithmetic", allowed=", ".join(sorted(capable)),
                hint="--dtype fp32 or fp16")
        hint = PRECISIONS[precision]
        # Throughput mode would split the cores among requests; one at a time is asked for here.
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(str(path), "CPU", config)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise BackendUnavailable(
                f"OpenVINO cannot compile this graph: {lines[-1] if lines else 'no message'}",
                hint="--runtime onnxruntime") from error
        self._request = self._compiled.create_infer_request()
        found = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != hint:
            raise BackendUnavailable(
                f"OpenVINO computes in {found} although {hint} was asked for")

    def placement(self) -> Placement:
        devices = tuple(self._compiled.get_property("EXECUTION_DEVICES"))
        return Placement("cpu", devices, {"CPU": len(self._compiled.get_runtime_model().get_ops())})

    def precisions(self) -> dict[str, int]:
        """How many operators really run in each precision, read from the compiled graph."""
        found: dict[str, int] = {}
        for operator in self._compiled.get_runtime_model().get_ops():
            kind = operator.get_rt_info()["runtimePrecision"].astype(str)
            found[kind] = found.get(kind, 0) + 1
        return found

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_request", None)
        self.__dict__.pop("_compiled", None)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer(dict(feeds), share_inputs=True)
        # Outputs lie in the request's own buffers, which the next run overwrites.
        return {name: results[name].copy() for name in self.spec.output_names}

    def _bind(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        import openvino as ov

        request = self._compiled.create_infer_request()
        for name, value in feeds.items():
            request.set_tensor(name, ov.Tensor(value, shared_memory=True))
        held = dict(feeds)

        def launch() -> None:
            assert held
            request.infer()

        return launch


RUNTIME = OpenVino()
