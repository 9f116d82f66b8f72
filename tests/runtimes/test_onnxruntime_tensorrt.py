"""ONNX Runtime's TensorRT provider: what it is told, what it may read, and CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tensorrt_world
from modelport import artifacts, gpu, pipeline
from modelport.errors import BackendUnavailable, UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.runtimes import _onnxruntime_tensorrt as route
from modelport.runtimes.onnxruntime import RUNTIME, TENSORRT
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

REAL = onnxruntime.InferenceSession
ON = {"tensorrt": True}


@pytest.fixture(scope="module")
def artifact(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Artifact:
    out = tmp_path_factory.mktemp("onnx") / "out"
    return pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), out, validate=False)


class Provider:
    """ONNX Runtime with a TensorRT provider, played by the CPU; writes an engine when opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.graphs: list[str | None] = []
        self.engines: list[list[str]] = []
        self.falls_back = False
        self.fails: Exception | None = None
        patch.setattr(gpu, "present", lambda: True)
        patch.setattr(onnxruntime, "InferenceSession", self.open)
        patch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        names = [TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]
        patch.setattr(onnxruntime, "get_available_providers", lambda: names)

    def open(self, path: str, settings: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert not enable_fallback
        self.asked.append(providers)
        if self.fails:
            raise self.fails
        first = "CUDAExecutionProvider" if self.falls_back else providers[0][0]
        if providers[0][0] == TENSORRT:
            cache = Path(providers[0][1]["trt_engine_cache_path"])
            self.engines.append(sorted(p.name for p in cache.iterdir()))
            (cache / "TensorrtExecutionProvider_sm90.engine").write_bytes(b"engine")
        return Played(REAL(path, settings, providers=["CPUExecutionProvider"]), first, self)


class Played:
    def __init__(self, session: Any, first: str, provider: Provider) -> None:
        self._session, self._first, self._provider = session, first, provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [self._first, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return []

    def run(self, names: Any, feeds: Any, options: Any = None) -> Any:
        self._provider.graphs.append(options and options.get_run_config_entry("gpu_graph_id"))
        return self._session.run(names, feeds)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self._provider.graphs.append(options and options.get_run_config_entry("gpu_graph_id"))
        self._session.run_with_iobinding(binding)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    tensorrt_world.install(monkeypatch, "10")
    return Provider(monkeypatch)


@pytest.fixture(autouse=True)
def _fresh(artifact: artifacts.Artifact) -> None:
    import shutil

    shutil.rmtree(artifact.root.parent / f".{artifact.root.name}.tensorrt", ignore_errors=True)


def test_the_provider_comes_first_with_its_cache_and_shapes(
    provider: Provider, artifact: artifacts.Artifact
) -> None:
    with RUNTIME.open(artifact, "cuda", ON) as session:
        assert session.placement().providers[0] == TENSORRT
    [[(name, options), (second, _)]] = provider.asked
    assert (name, second) == (TENSORRT, "CUDAExecutionProvider")
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_profile_min_shapes"].startswith("input_ids:1x1,")
    assert options["trt_profile_max_shapes"].startswith("input_ids:64x40,")
    assert "trt_fp16_enable" not in options


def test_a_graph_in_half_precision_is_given_leave(artifact: artifacts.Artifact) -> None:
    for precision, name in (("float16", "trt_fp16_enable"), ("bfloat16", "trt_bf16_enable")):
        assert route.provider_options(artifact.spec, Path(), precision)[name] == "1"


def test_the_artifact_stays_what_its_manifest_says(
    provider: Provider, artifact: artifacts.Artifact
) -> None:
    RUNTIME.open(artifact, "cuda", ON).close()
    assert artifacts.verify(artifact.root) == artifact


def test_engines_are_used_again_where_they_are_the_ones_that_were_noted(
    provider: Provider, artifact: artifacts.Artifact
) -> None:
    for _ in range(2):
        RUNTIME.open(artifact, "cuda", ON).close()
    engine = "TensorrtExecutionProvider_sm90.engine"
    assert provider.engines == [[], [engine, route.DIGESTS]]
    cache = route.cache_directory(artifact, gpu.machine())
    assert set(json.loads((cache / route.DIGESTS).read_text())) == {engine}


@pytest.mark.parametrize("change", ["other bytes", "another file", "no digests", "a link"])
def test_engines_that_were_changed_are_never_read(
    provider: Provider, artifact: artifacts.Artifact, change: str, tmp_path: Path
) -> None:
    RUNTIME.open(artifact, "cuda", ON).close()
    cache = route.cache_directory(artifact, gpu.machine())
    engine = cache / "TensorrtExecutionProvider_sm90.engine"
    if change == "other bytes":
        engine.write_bytes(b"evil")
    elif change == "another file":
        (cache / "more.engine").write_bytes(b"evil")
    elif change == "no digests":
        (cache / route.DIGESTS).unlink()
    else:
        target = tmp_path / "engine"
        target.write_bytes(engine.read_bytes())
        engine.unlink()
        engine.symlink_to(target)
    RUNTIME.open(artifact, "cuda", ON).close()
    assert provider.engines[1] == []


def test_another_gpu_has_a_cache_of_its_own(
    provider: Provider, artifact: artifacts.Artifact
) -> None:
    here = gpu.machine()
    import dataclasses

    other = dataclasses.replace(here, gpu="Other")
    assert route.cache_directory(artifact, here) != route.cache_directory(artifact, other)


def test_a_fall_back_is_an_error(provider: Provider, artifact: artifacts.Artifact) -> None:
    provider.falls_back = True
    with pytest.raises(BackendUnavailable, match="fell back to CUDAExecutionProvider"):
        RUNTIME.open(artifact, "cuda", ON)


@pytest.mark.parametrize(
    ("kind", "hint"), [(EPFail, "without --optimize fuse"), (RuntimeError, "modelport doctor")])
def test_a_graph_that_tensorrt_takes_in_part_is_refused_with_what_to_do(
    provider: Provider, artifact: artifacts.Artifact, kind: type[Exception], hint: str
) -> None:
    provider.fails = kind("User needs to provide all the dynamic shape inputs\nmore")
    with pytest.raises(BackendUnavailable, match="all the dynamic shape inputs\n") as refused:
        RUNTIME.open(artifact, "cuda", ON)
    assert hint in refused.value.hint


def test_one_recording_for_every_run_is_refused(
    provider: Provider, artifact: artifacts.Artifact
) -> None:
    with pytest.raises(UsageError, match="replays its first run") as refused:
        RUNTIME.open(artifact, "cuda", {**ON, "cuda_graph": True})
    assert refused.value.allowed == "one of tensorrt and cuda_graph"
    assert not provider.asked


def test_tensorrt_11_is_refused_with_what_to_do(
    provider: Provider, artifact: artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_world.install(monkeypatch, "11")
    with pytest.raises(BackendUnavailable, match="links TensorRT 10, and here is 11"):
        RUNTIME.open(artifact, "cuda", ON)
    assert not provider.asked


def test_it_needs_a_gpu_and_an_artifact(artifact: artifacts.Artifact) -> None:
    with pytest.raises(BackendUnavailable, match="cuda only"):
        RUNTIME.open(artifact, "cpu", ON)
    with pytest.raises(UsageError, match="needs an artifact"):
        RUNTIME.open_file(artifact.root / "model.onnx", artifact.spec, "cpu", ON)


def test_a_cuda_graph_is_recorded_for_fixed_buffers_and_no_others(
    artifact: artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that finds the shapes is not recorded, and every binding has a graph of its own."""
    provider = Provider(monkeypatch)
    real = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda v, *_: real(v))
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        session._device = "cpu"  # type: ignore[attr-defined]
        feeds = {t.name: np.ones((2, 3), t.dtype) for t in artifact.spec.inputs}
        first = session.bind(feeds)
        first()
        second = session.bind(feeds)
        second()
        first()
        session.run(feeds)
    assert provider.graphs == ["-1", "1", "-1", "2", "1", "-1"]


def test_without_graphs_nothing_is_said_of_them(
    artifact: artifacts.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Provider(monkeypatch)
    with RUNTIME.open(artifact) as session:
        session.run({t.name: np.ones((2, 3), t.dtype) for t in artifact.spec.inputs})
    assert provider.graphs == [None]


@pytest.mark.gpu
def test_a_real_provider_equals_the_cpu(artifact: artifacts.Artifact) -> None:
    if reason := route.unavailable("cuda"):
        pytest.skip(reason)
    feeds = {t.name: np.ones((3, 7), t.dtype) for t in artifact.spec.inputs}
    with RUNTIME.open(artifact, "cuda", ON) as session, RUNTIME.open(artifact) as reference:
        found, wanted = session.run(feeds), reference.run(feeds)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_graph_with_operators_on_the_cpu_is_not_recorded(artifact: artifacts.Artifact) -> None:
    if reason := RUNTIME.unavailable("cuda"):
        pytest.skip(reason)
    with pytest.raises(BackendUnavailable, match="CUDA graph") as refused:
        RUNTIME.open(artifact, "cuda", {"cuda_graph": True})
    assert "--optimize fuse" in str(refused.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_replaying_cuda_graphs_equals_plain_runs(
    tiny: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    if reason := RUNTIME.unavailable("cuda"):
        pytest.skip(reason)
    artifact = pipeline.export(
        "onnx", pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out",
        OnnxOptions(optimize="fuse", dtype=dtype), validate=False)
    feeds = {t.name: np.ones((3, 7), t.dtype) for t in artifact.spec.inputs}
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        launch = session.bind(feeds)
        for _ in range(3):
            launch()
        found, wanted = launch.download(), session.run(feeds)  # type: ignore[attr-defined]
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_what_a_launch_left_can_be_had(artifact: artifacts.Artifact) -> None:
    feeds = {t.name: np.ones((3, 7), t.dtype) for t in artifact.spec.inputs}
    with RUNTIME.open(artifact) as session:
        launch = session.bind(feeds)
        for value in launch.download().values():  # type: ignore[attr-defined]
            value[...] = np.nan  # on a CPU these are the outputs themselves
        launch()
        found, wanted = launch.download(), session.run(feeds)  # type: ignore[attr-defined]
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
