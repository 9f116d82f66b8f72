from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from modelport import gpu, pipeline, runtimes
from modelport.artifacts import Artifact
from modelport.errors import BackendUnavailable, UsageError
from modelport.runtimes.onnxruntime import OnnxSession

RUNTIME = runtimes.get("onnxruntime")


@pytest.fixture
def artifact(tiny: Callable[..., Path], tmp_path: Path) -> Artifact:
    request = pipeline.ModelRequest(str(tiny("bert")))
    return pipeline.export("onnx", request, tmp_path / "out", validate=False)


def feeds(artifact: Artifact) -> dict[str, np.ndarray]:
    ones = np.ones((3, 5), dtype=np.int64)
    return dict.fromkeys(artifact.spec.input_names, ones)


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
@pytest.mark.parametrize("threads", [1, 2])
def test_levels_and_threads_do_not_change_the_answer(
    artifact: Artifact, level: str, threads: int
) -> None:
    with RUNTIME.open(artifact) as plain:
        expected = plain.run(feeds(artifact))
    with RUNTIME.open(artifact, options={"level": level, "threads": threads}) as session:
        found = session.run(feeds(artifact))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_every_node_is_where_it_was_asked_for(artifact: Artifact) -> None:
    with RUNTIME.open(artifact) as session:
        placement = session.placement()
    assert set(placement.nodes) == {"CPUExecutionProvider"}
    assert sum(placement.nodes.values()) > 10


def test_bound_outputs_are_those_of_run(artifact: Artifact) -> None:
    """What is bound has run once; a launch computes again, from what its inputs hold by then."""
    first = {name: value.copy() for name, value in feeds(artifact).items()}
    second = {**first, "input_ids": first["input_ids"] * 2}
    with RUNTIME.open(artifact, options={"spinning": False}) as session:
        both = session.run(first), session.run(second)
        launch = session.bind(first)
        for resident, value in zip(launch.inputs, second.values(), strict=True):
            resident.update_inplace(value)
        for expected in both:
            found = launch.download()
            assert list(found) == list(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, atol=1e-6)
            launch()
            session.synchronize()


def test_cuda_without_a_provider_is_exit_6_and_names_the_remedy(artifact: Artifact) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has the CUDA provider")
    with pytest.raises(BackendUnavailable, match=r"modelport\[gpu\]") as caught:
        RUNTIME.open(artifact, "cuda")
    assert caught.value.exit_code == 6


def test_the_driver_is_asked_for_a_gpu() -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("this torch sees no GPU, whether there is one or not")
    assert gpu.present() is torch.cuda.is_available()


def test_a_provider_without_a_gpu_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(gpu, "present", lambda: False)
    assert RUNTIME.unavailable("cuda") == "there is no NVIDIA GPU here, or no driver for it"
    monkeypatch.setattr(gpu, "present", lambda: True)
    assert RUNTIME.unavailable("cuda") is None


def test_a_silent_fallback_is_an_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU wheel without all that it needs: the provider is listed, and the session ends up on
    the CPU."""
    import onnxruntime

    monkeypatch.setattr(gpu, "present", lambda: True)
    real = onnxruntime.InferenceSession

    def on_cpu(path: str, settings: Any, providers: Any, **_: Any) -> Any:
        return real(path, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(BackendUnavailable, match="fell back to CPUExecutionProvider"):
        RUNTIME.open(artifact, "cuda")


def test_what_another_provider_gives_is_never_returned(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own session, left to itself, opens itself again on the CPU and says so."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    def failing(*_: Any) -> Any:
        raise EPFail("out of memory\nsomewhere")

    with RUNTIME.open(artifact) as session:
        launch = session.bind(feeds(artifact))
        inner = session._session  # type: ignore[attr-defined]
        monkeypatch.setattr(
            inner, "_sess", SimpleNamespace(
                run=failing, run_with_iobinding=failing,
                is_webgpu_graph_capture_enabled=lambda: False))
        monkeypatch.setattr(launch.binding, "_session", inner._sess)  # type: ignore[attr-defined]
        for call in (lambda: session.run(feeds(artifact)), launch):
            with pytest.raises(BackendUnavailable, match="provider failed: out of memory"):
                call()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("options", [{"level": "ludicrous"}, {"warp": 9}])
def test_wrong_options_list_the_right_ones(artifact: Artifact, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="allowed"):
        RUNTIME.open(artifact, options=options)


@pytest.mark.parametrize("name", ["tf32", "cuda_graph"])
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(artifact: Artifact, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} does nothing on cpu") as caught:
        RUNTIME.open(artifact, options={name: True})
    assert "--device cuda" in caught.value.hint
    RUNTIME.open(artifact, options={name: False}).close()


def test_an_unknown_device_is_refused(artifact: Artifact) -> None:
    with pytest.raises(BackendUnavailable, match="no device 'abacus'"):
        RUNTIME.open(artifact, "abacus")


def test_weights_outside_the_artifact_are_refused_before_the_runtime_sees_them(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnxruntime
    from modelport.errors import UnsafeError

    path = artifact.root / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    outside = next(t for t in proto.graph.initializer if t.external_data)
    next(e for e in outside.external_data if e.key == "location").value = "../elsewhere"
    path.write_bytes(proto.SerializeToString())
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was reached")
    )
    with pytest.raises(UnsafeError):
        RUNTIME.open(artifact)


def test_what_is_left_on_the_cpu_is_named() -> None:
    """A GPU session as ONNX Runtime describes one; there need be no GPU to read the description."""

    def group(provider: str, *operators: str) -> SimpleNamespace:
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    session = OnnxSession.__new__(OnnxSession)
    session._device = "cuda"
    session._session = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=lambda: [
            group("CUDAExecutionProvider", "MatMul", "Softmax", "MatMul"),
            group("CPUExecutionProvider", "Shape", "Gather", "Shape"),
        ],
    )
    placement = session.placement()
    assert placement.nodes == {"CUDAExecutionProvider": 3, "CPUExecutionProvider": 3}
    assert placement.fallback == {"Shape": 2, "Gather": 1}
    session._device = "cpu"
    assert not session.placement().fallback
