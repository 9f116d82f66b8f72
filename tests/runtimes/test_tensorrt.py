"""Engines run right on both majors of TensorRT, as far as a double on the host can tell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_world
from modelport import artifacts, gpu, pipeline, validate
from modelport.errors import (
    BackendUnavailable,
    ClaimError,
    DigestMismatch,
    SpecError,
    UsageError,
)
from modelport.exporters.tensorrt import TensorRTOptions
from modelport.runtimes import _tensorrt_device
from modelport.runtimes.tensorrt import RUNTIME
from tensorrt_world import HostDevice, World

SMALL: dict[str, Any] = {"batch_profiles": "1,2,4,8", "seq_lens": "1:8:40"}
MAJORS = ("10", "11")
Build = Callable[..., artifacts.Artifact]


@pytest.fixture(scope="module")
def onnx(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    out = tmp_path_factory.mktemp("onnx") / "onnx"
    return pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), out, validate=False)


@pytest.fixture(scope="module")
def build(
    onnx: artifacts.Artifact, tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., Path],
) -> Build:  # fmt: skip
    """An artifact built by a double; the same arguments, the same artifact."""
    from modelport import checkpoints
    from modelport.exporters.tensorrt import EXPORTER
    from modelport.pipeline import exporting

    made: dict[Any, artifacts.Artifact] = {}
    model = checkpoints.load(checkpoints.resolve(str(tiny("bert"))))

    def get(major: str, **options: Any) -> artifacts.Artifact:
        key = (major, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("engines") / "out"
            out.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                tensorrt_world.install(patch, major)
                chosen = TensorRTOptions(**{**SMALL, **options})
                made[key] = exporting._first(EXPORTER, model, out, chosen, "build", onnx)
        return made[key]

    return get


@pytest.fixture(params=MAJORS)
def major(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(major: str, monkeypatch: pytest.MonkeyPatch) -> World:
    return tensorrt_world.install(monkeypatch, major)


@pytest.fixture
def device(world: World, monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    made = HostDevice(world)
    monkeypatch.setattr(_tensorrt_device, "Device", lambda: made)
    return made


@pytest.fixture
def reference(onnx: artifacts.Artifact) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    session = pipeline.open_session(onnx, runtime="onnxruntime")
    return session.run


def feeds(artifact: artifacts.Artifact, batch: int, sequence: int, seed: int = 0) -> Any:
    case = validate.Case((("batch", batch), ("sequence", sequence)), "right", seed)
    return validate.draw(artifact.spec, case)


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


SHAPES = [(1, 1), (8, 40), (2, 7), (3, 8), (1, 40), (5, 3), (4, 40), (8, 1), (2, 8), (3, 1)]


@pytest.mark.parametrize("layout", ["multi-profile", "engine-per-profile"])
def test_every_profile_interleaved_equals_the_graph(
    world: World, major: str, build: Build, reference: Callable[..., Any], layout: str
) -> None:
    artifact = build(major, layout=layout)
    with RUNTIME.open(artifact, "cuda") as session:
        for batch, sequence in SHAPES:
            given = feeds(artifact, batch, sequence)
            close(session.run(given), reference(given))


def test_one_context_for_each_profile_chosen_once(
    world: World, major: str, build: Build
) -> None:
    artifact = build(major)
    with RUNTIME.open(artifact, "cuda") as session:
        for batch, sequence in SHAPES:
            session.run(feeds(artifact, batch, sequence))
    chosen = world.trt.called("IExecutionContext.set_optimization_profile_async")
    assert [call["profile_index"] for call in chosen] == [0, 1, 2, 3]
    made = world.trt.called("ICudaEngine.create_execution_context")
    assert [call["strategy"].name for call in made] == ["USER_MANAGED"] * 4


def test_shapes_addresses_and_memory_are_set_before_the_launch(
    world: World, major: str, build: Build
) -> None:
    artifact = build(major)
    with RUNTIME.open(artifact, "cuda") as session:
        before = len(world.trt.calls)
        session.run(feeds(artifact, 3, 5))
    steps = [method for kind, method, _ in world.trt.calls[before:] if kind == "IExecutionContext"]
    order = ["set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address",
             "update_device_memory_size_for_shapes", "set_device_memory", "execute_async_v3"]
    assert list(dict.fromkeys(steps)) == order
    assert steps[-1] == "execute_async_v3"
    assert steps.count("set_tensor_address") == len(artifact.spec.inputs + artifact.spec.outputs)


def test_contexts_share_one_block_of_memory_that_grows(
    world: World, major: str, build: Build
) -> None:
    artifact = build(major)
    with RUNTIME.open(artifact, "cuda") as session:
        for batch, sequence in ((8, 40), (1, 1), (3, 8)):
            session.run(feeds(artifact, batch, sequence))
        given = world.trt.called("IExecutionContext.set_device_memory")
        assert len({call["memory"] for call in given}) == 1
        assert {call["size"] for call in given} == {8 * 40 * world.memory_per_position}


def test_growing_memory_reaches_contexts_that_were_bound_before(
    world: World, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    with RUNTIME.open(artifact, "cuda") as session:
        small = feeds(artifact, 1, 2)
        launch = session.bind(small)
        launch()
        session.run(feeds(artifact, 8, 40))
        launch()  # the double raises if the context still has the memory that was given up
        close(launch.download(), reference(small))


def test_binding_neither_waits_nor_runs(
    world: World, device: HostDevice, major: str, build: Build
) -> None:
    artifact = build(major)
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        before = world.synchronized
        session.bind(feeds(artifact, 2, 5))
        assert world.synchronized == before
        assert world.trt.called("IExecutionContext.execute_async_v3") == []


def test_a_launch_returns_before_the_work_is_done(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    given = feeds(artifact, 2, 5)
    with RUNTIME.open(artifact, "cuda") as session:
        launch = session.bind(given)
        launch()
        assert world.queue
        session.synchronize()
        assert not world.queue
        close(launch.download(), reference(given))


def test_graphs_are_captured_once_a_shape_and_replayed(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    given = feeds(artifact, 3, 5)
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        launch = session.bind(given)
        for _ in range(4):
            launch()
        session.synchronize()
        assert device.captures == 1
        # Once as it is, once while capturing; replays do not pass through TensorRT.
        assert len(world.trt.called("IExecutionContext.execute_async_v3")) == 2
        close(launch.download(), reference(given))


def test_graphs_are_captured_again_on_a_change(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    one, other = feeds(artifact, 3, 5), feeds(artifact, 4, 40)
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        first = session.bind(one)
        first()
        first()
        second = session.bind(other)  # the same profile, another shape
        second()
        second()
        first()
        first()
        session.synchronize()
        assert device.captures == 3
        close(first.download(), reference(one))
        close(second.download(), reference(other))


def test_graphs_of_different_profiles_live_side_by_side(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    wide, narrow = feeds(artifact, 8, 40), feeds(artifact, 1, 5)
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        launches = [session.bind(wide), session.bind(narrow)]
        for _ in range(3):
            for launch in launches:
                launch()
        session.synchronize()
        assert device.captures == 2
        close(launches[0].download(), reference(wide))
        close(launches[1].download(), reference(narrow))


def test_growing_memory_makes_graphs_again(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    artifact = build(major)
    narrow = feeds(artifact, 1, 5)
    with RUNTIME.open(artifact, "cuda", {"cuda_graph": True}) as session:
        launch = session.bind(narrow)
        launch()
        session.run(feeds(artifact, 8, 40))
        launch()  # a replay of the old graph would write to memory that was given up
        session.synchronize()
        assert device.captures == 2
        close(launch.download(), reference(narrow))


def test_tensors_are_read_where_they_lie(
    world: World, device: HostDevice, major: str, build: Build, reference: Callable[..., Any]
) -> None:
    import torch

    artifact = build(major)
    given = feeds(artifact, 2, 6)
    tensors = {name: device.adopt(torch.from_numpy(value)) for name, value in given.items()}
    with RUNTIME.open(artifact, "cuda") as session:
        outputs = session.run_tensors(tensors)
        session.synchronize()
        addresses = {c["name"]: c["memory"]
                     for c in world.trt.called("IExecutionContext.set_tensor_address")}
        for name, tensor in (*tensors.items(), *outputs.items()):
            assert addresses[name] == tensor.data_ptr()
        close({n: v.numpy() for n, v in outputs.items()}, reference(given))


def test_tensors_that_cannot_be_read_in_place_are_refused(
    world: World, device: HostDevice, major: str, build: Build
) -> None:
    import torch

    artifact = build(major)
    good = {n: torch.from_numpy(v) for n, v in feeds(artifact, 2, 6).items()}
    name = artifact.spec.input_names[0]
    for bad in (good[name].int(), good[name][:, :3], good[name].t().contiguous().t()):
        with RUNTIME.open(artifact, "cuda") as session, pytest.raises(SpecError):
            session.run_tensors({**good, name: bad})


def test_sizes_outside_every_profile_are_refused(
    world: World, major: str, build: Build
) -> None:
    artifact = build(major, batch_profiles="2:2:2", seq_lens="4:8:16")
    with RUNTIME.open(artifact, "cuda") as session:
        for batch, sequence in ((1, 8), (3, 8), (2, 3), (2, 17)):
            with pytest.raises(SpecError, match="allowed"):
                session.run(feeds_of(artifact, batch, sequence))
        session.run(feeds(artifact, 2, 8))


def feeds_of(artifact: artifacts.Artifact, batch: int, sequence: int) -> dict[str, np.ndarray]:
    return {t.name: np.ones((batch, sequence), t.dtype) for t in artifact.spec.inputs}


# --- what is refused before anything is deserialised --------------------------------------------


def opens(world: World, artifact: artifacts.Artifact, here: gpu.Machine | None = None) -> None:
    """Open, and make sure that nothing was deserialised when it fails."""
    try:
        if here is None:
            RUNTIME.open(artifact, "cuda")
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu, "machine", lambda: here)
                RUNTIME.open(artifact, "cuda")
    finally:
        kinds = [m for k, m, _ in world.trt.calls if k == "Runtime"]
        assert "deserialize_cuda_engine" not in kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gpu": "Other GPU"}, "made for Test GPU 9000, and here is Other GPU"),
     ({"compute_capability": "8.6"}, r"compute capability 9\.0 .* has 8\.6"),
     ({"tensorrt": "10.17.0.1"}, r"made by TensorRT .*, and here is 10\.17\.0\.1")],
)  # fmt: skip
def test_an_engine_for_another_machine_is_not_deserialised(
    world: World, major: str, build: Build, change: dict[str, str], message: str
) -> None:
    here = dataclasses.replace(gpu.machine(), **change)
    with pytest.raises(BackendUnavailable, match=message) as caught:
        opens(world, build(major), here)
    assert "modelport export tensorrt" in caught.value.hint


def test_an_engine_of_another_digest_is_not_deserialised(
    world: World, major: str, build: Build, tmp_path: Path
) -> None:
    import shutil

    artifact = build(major)
    root = shutil.copytree(artifact.root, tmp_path / "copy")
    with (root / "model.engine").open("ab") as file:
        file.write(b" ")
    with pytest.raises(DigestMismatch):
        opens(world, artifacts.Artifact(root, artifact.manifest))
    with pytest.raises(DigestMismatch):  # the pipeline looks before the runtime is asked
        pipeline.open_artifact(root, device="cuda")


def test_an_engine_the_manifest_does_not_name_is_not_deserialised(
    world: World, major: str, build: Build
) -> None:
    artifact = build(major)
    files = {n: e for n, e in artifact.manifest.files.items() if n != "model.engine"}
    manifest = dataclasses.replace(artifact.manifest, files=files)
    with pytest.raises(DigestMismatch, match="no digest"):
        opens(world, dataclasses.replace(artifact, manifest=manifest))


def test_profiles_that_are_not_the_engines_are_refused(
    world: World, major: str, build: Build
) -> None:
    import copy

    artifact = build(major)
    facts = copy.deepcopy(dict(artifact.manifest.facts))
    facts["engines"][0]["profiles"][1]["batch"] = [2, 2, 3]
    manifest = dataclasses.replace(artifact.manifest, facts=facts)
    with pytest.raises(ClaimError, match="profile 1"):
        RUNTIME.open(dataclasses.replace(artifact, manifest=manifest), "cuda")


TARGET = gpu.Machine("A", "8.6", "580", "13.0", "10.16.1.11")


@pytest.mark.parametrize(
    ("flags", "change", "fine"),
    [
        ({}, {}, True),
        ({}, {"driver": "590"}, True),
        ({}, {"gpu": "B"}, False),
        ({}, {"tensorrt": "10.16.1.12"}, False),
        ({"version_compatible": True}, {"tensorrt": "10.17.0.0"}, True),
        ({"version_compatible": True}, {"tensorrt": "10.16.0.9"}, False),
        ({"version_compatible": True}, {"tensorrt": "11.0.0.0"}, True),
        ({"version_compatible": True}, {"tensorrt": "12.0.0.0"}, False),
        ({"version_compatible": True}, {"gpu": "B"}, False),
        ({"hardware": "same-compute-capability"}, {"gpu": "B"}, True),
        ({"hardware": "same-compute-capability"}, {"compute_capability": "8.9"}, False),
        ({"hardware": "ampere-plus"}, {"gpu": "B", "compute_capability": "12.0"}, True),
        ({"hardware": "ampere-plus"}, {"gpu": "B", "compute_capability": "7.5"}, False),
        ({"hardware": "ampere-plus"}, {"tensorrt": "11.0.0.0"}, False),
    ],
)
def test_what_runs_where(flags: dict[str, Any], change: dict[str, str], fine: bool) -> None:
    reason = gpu.refusal(TARGET.target(**flags), dataclasses.replace(TARGET, **change))
    assert (reason is None) is fine
    assert gpu.refusal({}, TARGET)


# --- engines of other kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"version_compatible": True}, {"strip_plan": True}, {"dtype": "fp32", "layout": "auto"},
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_portable_and_stripped_engines_run(
    world: World, major: str, build: Build, reference: Callable[..., Any], options: dict[str, Any]
) -> None:
    artifact = build(major, **options)
    given = feeds(artifact, 2, 3)
    with RUNTIME.open(artifact, "cuda") as session:
        close(session.run(given), reference(given))
    allowed = world.trt.called("Runtime.engine_host_code_allowed=")
    assert allowed == [{"value": "version_compatible" in options}]


@pytest.mark.parametrize(("asked", "wanted"), [(-1, 1 << 19), (12345, 12345)])
def test_the_weight_budget_is_set_before_any_context(
    world: World, major: str, build: Build, asked: int, wanted: int
) -> None:
    artifact = build(major, weight_streaming=True)
    RUNTIME.open(artifact, "cuda", {"weight_budget": asked}).close()
    assert world.trt.called("ICudaEngine.weight_streaming_budget_v2=") == [{"value": wanted}]


def test_the_contract_of_sessions_holds(world: World, major: str, build: Build) -> None:
    artifact = build(major)
    session = RUNTIME.open(artifact, "cuda")
    good = feeds(artifact, 2, 5)
    name = artifact.spec.input_names[0]
    for bad in ({}, {**good, "x": good[name]}, {**good, name: good[name].astype(np.int32)}):
        with pytest.raises(SpecError):
            session.run(bad)
        with pytest.raises(SpecError):
            session.bind(bad)
    kept = session.run(good)
    before = {n: v.copy() for n, v in kept.items()}
    session.run({n: np.flip(v, axis=1).copy() for n, v in good.items()})
    for output, value in kept.items():
        np.testing.assert_array_equal(value, before[output])
    assert session.placement().device == "cuda"
    assert session.device_memory() == (1, 2)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(good)


def test_inspect_and_verify_need_neither(build: Build, major: str) -> None:
    """No double here: the artifact is looked at as on any machine."""
    import subprocess
    import sys

    artifact = build(major)
    code = (
        "import sys; from pathlib import Path; from modelport import artifacts, console;"
        f"found = artifacts.verify(Path({str(artifact.root)!r}));"
        "print(console.artifact_record(found)['target']['gpu'] if 'target' in "
        "console.artifact_record(found) else found.manifest.target['gpu']);"
        "assert not {'torch', 'tensorrt'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Test GPU 9000"


REAL_DEVICE = _tensorrt_device.Device


def test_the_stand_in_has_the_devices_methods() -> None:
    import inspect

    for name, member in vars(REAL_DEVICE).items():
        if name.startswith("_") or isinstance(member, property):
            continue
        played = inspect.signature(getattr(HostDevice, name))
        assert list(played.parameters) == list(inspect.signature(member).parameters), name


def test_torch_has_what_the_device_calls() -> None:
    """The CPU build declares the same names and parameters as the CUDA build."""
    import inspect

    import torch

    graph = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"cuda_graph", "stream", "capture_error_mode"} <= set(graph)
    for holder, names in (
        (torch.cuda, ("Stream", "Event", "CUDAGraph", "stream", "current_stream",
                      "get_device_capability", "get_device_name", "max_memory_allocated",
                      "max_memory_reserved")),
        (torch.cuda.Stream, ("wait_stream", "synchronize")),
        (torch.cuda.Event, ("record", "synchronize", "elapsed_time")),
        (torch.cuda.CUDAGraph, ("replay",)),
        (torch.Tensor, ("record_stream", "copy_", "data_ptr")),
    ):  # fmt: skip
        for name in names:
            assert hasattr(holder, name), f"{holder} has no {name}"


def test_without_a_gpu_the_runtime_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert RUNTIME.unavailable("cpu") == "TensorRT engines run on cuda only; add --device cuda"
    assert RUNTIME.unavailable("cuda")


# --- with a GPU ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> artifacts.Artifact:
    if reason := gpu.unavailable():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("real") / "out"
    request = pipeline.ModelRequest(str(tiny("bert")))
    return pipeline.export("tensorrt", request, out, TensorRTOptions(**SMALL), validate=False)


@pytest.mark.gpu
def test_parity_on_every_profile_interleaved(
    real: artifacts.Artifact, reference: Callable[..., Any]
) -> None:
    with RUNTIME.open(real, "cuda") as session:
        for batch, sequence in SHAPES * 2:
            given = feeds(real, batch, sequence)
            close(session.run(given), reference(given))


@pytest.mark.gpu
def test_replaying_a_graph_equals_a_plain_launch(real: artifacts.Artifact) -> None:
    with (RUNTIME.open(real, "cuda") as plain,
          RUNTIME.open(real, "cuda", {"cuda_graph": True}) as graphs):
        for batch, sequence in SHAPES:
            given = feeds(real, batch, sequence)
            launch = graphs.bind(given)
            for _ in range(3):
                launch()
            graphs.synchronize()
            found, wanted = launch.download(), plain.run(given)
            for name, value in wanted.items():
                np.testing.assert_array_equal(found[name], value)


@pytest.mark.gpu
def test_torch_tensors_are_read_in_place(
    real: artifacts.Artifact, reference: Callable[..., Any]
) -> None:
    import torch

    given = feeds(real, 3, 8)
    with RUNTIME.open(real, "cuda") as session:
        outputs = session.run_tensors({n: torch.from_numpy(v).cuda() for n, v in given.items()})
        close({n: v.cpu().numpy() for n, v in outputs.items()}, reference(given))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
def test_bench_columns_have_times(real: artifacts.Artifact, batch: int) -> None:
    with RUNTIME.open(real, "cuda", {"cuda_graph": True}) as session:
        launch = session.bind(feeds(real, batch, 40))
        launch()
        session.synchronize()
        start = time.perf_counter()
        seconds = session.device_seconds(launch)
        assert 0 < seconds <= time.perf_counter() - start
        assert session.device_memory()[0] > 0
