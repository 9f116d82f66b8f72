"""Engines are built right on both majors of TensorRT, as far as a double of them can tell."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_world
from modelport import artifacts, checkpoints, cli, exporters, gpu, pipeline, profiles
from modelport.errors import (
    BackendUnavailable,
    ClaimError,
    ExportError,
    OpsetTooLow,
    ParityError,
    StorageError,
    UsageError,
)
from modelport.exporters import _tensorrt_build as building
from modelport.exporters import _tensorrt_precision as precision
from modelport.exporters import tensorrt
from modelport.exporters.tensorrt import EXPORTER, LAYERS, LOG, TIMING, TIMINGS, TensorRTOptions
from modelport.spec import Dim, ModelSpec
from tensorrt_world import World

SMALL: dict[str, Any] = {"batch_profiles": "1,2,4", "seq_lens": "1:8:40"}


@pytest.fixture(params=["10", "11"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    return tensorrt_world.install(monkeypatch, request.param)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> checkpoints.LoadedModel:
    return checkpoints.load(checkpoints.resolve(str(tiny("bert"))))


@pytest.fixture(scope="module")
def parents(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], artifacts.Artifact]:
    """The ONNX artifact to build from, by dtype."""
    from modelport.exporters.onnx import OnnxOptions

    made: dict[str, artifacts.Artifact] = {}

    def get(dtype: str) -> artifacts.Artifact:
        if dtype not in made:
            out = tmp_path_factory.mktemp(dtype) / "onnx"
            request = pipeline.ModelRequest(str(tiny("bert")))
            made[dtype] = pipeline.export(
                "onnx", request, out, OnnxOptions(dtype=dtype), validate=False
            )
        return made[dtype]

    return get


@pytest.fixture
def export(
    world: World, model: checkpoints.LoadedModel, parents: Callable[[str], artifacts.Artifact],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Build engines into a new directory."""

    def run(parent: str | None = None, **options: Any) -> Path:
        chosen = TensorRTOptions(**{**SMALL, **options})
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        EXPORTER.export(model, parents(parent or chosen.dtype), out, chosen, "build")
        return out

    return run


def test_the_network_is_strongly_typed(world: World, export: Callable[..., Path]) -> None:
    export()
    flags = [call["flags"] for call in world.trt.called("Builder.create_network")]
    assert flags == ([2] if world.trt.__version__.startswith("10") else [0])


def test_no_precision_flag_is_set_and_tf32_is_off(
    world: World, export: Callable[..., Path]
) -> None:
    export(dtype="fp16")
    assert world.trt.called("IBuilderConfig.set_flag") == []
    cleared = [call["flag"].name for call in world.trt.called("IBuilderConfig.clear_flag")]
    assert cleared == ["TF32"]


def test_profiles_have_min_opt_and_max_of_their_bucket(
    world: World, export: Callable[..., Path]
) -> None:
    export()
    shapes = [(c["min"], c["opt"], c["max"])
              for c in world.trt.called("IOptimizationProfile.set_shape")
              if c["input"] == "input_ids"]
    assert shapes == [((1, 1), (1, 8), (1, 40)), ((2, 1), (2, 8), (2, 40)),
                      ((3, 1), (4, 8), (4, 40))]
    names = {c["input"] for c in world.trt.called("IOptimizationProfile.set_shape")}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}
    assert len(world.trt.called("IBuilderConfig.add_optimization_profile")) == 3


@pytest.mark.parametrize(
    ("layout", "files"),
    [("auto", 1), ("multi-profile", 1), ("engine-per-profile", 3)],
)
def test_layouts(export: Callable[..., Path], layout: str, files: int) -> None:
    out = export(layout=layout)
    assert len(list(out.glob("*.engine"))) == files


def test_a_fixed_shape_is_one_profile_with_equal_bounds(
    world: World, export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    out = export(batch_profiles="8:8:8", seq_lens="16")
    calls = world.trt.called("IOptimizationProfile.set_shape")
    assert {(c["min"], c["opt"], c["max"]) for c in calls} == {((8, 16),) * 3}
    options = TensorRTOptions(batch_profiles="8:8:8", seq_lens="16")
    written = EXPORTER.read_back(model, out, options)
    assert (written.spec.dims["batch"].min, written.spec.dims["batch"].max) == (8, 8)


def test_batches_end_where_the_model_does(model: checkpoints.LoadedModel) -> None:
    few = ModelSpec(model.spec.inputs, (), {**model.spec.dims, "batch": Dim(1, 1, 6)})
    [engine] = tensorrt.planned(few, TensorRTOptions())
    assert [p.dims["batch"].max for p in engine.profiles] == [1, 2, 4, 6]
    with pytest.raises(UsageError, match="batches of 1 to 64"):
        tensorrt.planned(few, TensorRTOptions(batch_profiles="1,64"))


def test_every_option_reaches_the_builder(world: World, export: Callable[..., Path]) -> None:
    export(
        workspace=64, opt_level=5, tf32=True, version_compatible=True, refit=True,
        weight_streaming=True, hardware_compatible="ampere-plus",
    )  # fmt: skip
    flags = {c["flag"].name for c in world.trt.called("IBuilderConfig.set_flag")}
    assert flags == {"TF32", "VERSION_COMPATIBLE", "REFIT", "WEIGHT_STREAMING"}
    [limit] = world.trt.called("IBuilderConfig.set_memory_pool_limit")
    assert (limit["pool"].name, limit["pool_size"]) == ("WORKSPACE", 64 << 20)
    assert world.trt.called("IBuilderConfig.builder_optimization_level=") == [{"value": 5}]
    [level] = world.trt.called("IBuilderConfig.hardware_compatibility_level=")
    assert level["value"].name == "AMPERE_PLUS"


def test_what_is_not_asked_for_is_left_alone(world: World, export: Callable[..., Path]) -> None:
    export()
    for method in ("set_memory_pool_limit", "hardware_compatibility_level="):
        assert world.trt.called(f"IBuilderConfig.{method}") == []


def test_no_call_that_11_removed_is_made(world: World, export: Callable[..., Path]) -> None:
    """The double of 11 would raise; on 10 the same calls are made."""
    export(dtype="fp16")
    made = {(kind, method) for kind, method, _ in world.trt.calls}
    removed = {("Builder", "platform_has_fast_fp16"), ("OnnxParser", "supports_model"),
               ("ICudaEngine", "create_execution_context_without_device_memory")}
    assert not made & removed
    assert ("OnnxParser", "parse_from_file") in made


@pytest.mark.parametrize(("dtype", "word"), [("fp32", "float32"), ("fp16", "float16"),
                                             ("bf16", "bfloat16")])
def test_read_back_states_precision_profiles_and_target(
    world: World, export: Callable[..., Path], model: checkpoints.LoadedModel, dtype: str, word: str
) -> None:
    out = export(dtype=dtype)
    written = EXPORTER.read_back(model, out, TensorRTOptions(**SMALL, dtype=dtype))
    assert written.facts.get("precision", "float32") == word
    assert set(written.facts["layers"]) == {f"model.engine profile {i}" for i in range(3)}
    for counts in written.facts["layers"].values():
        assert max(counts, key=counts.__getitem__) == word
    assert written.facts["engines"] == [{"file": "model.engine", "profiles": [
        {"batch": [1, 1, 1], "sequence": [1, 8, 40]}, {"batch": [2, 2, 2], "sequence": [1, 8, 40]},
        {"batch": [3, 4, 4], "sequence": [1, 8, 40]}]}]  # fmt: skip
    assert written.target["gpu"] == "Test GPU 9000"
    assert written.target["compute_capability"] == "9.0"
    assert written.target["tensorrt"] == world.trt.__version__
    assert written.target["driver"] == "580.65"
    assert {t.dtype for t in written.spec.inputs} == {"int64"}


def test_float32_layers_where_fp16_was_asked_for_fail_with_their_names(
    world: World, export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    world.forgets_precision = True
    out = export(dtype="fp16")
    with pytest.raises(ClaimError, match=r"(?s)do not compute in float16: .*MatMul.*\(float32\)"):
        EXPORTER.read_back(model, out, TensorRTOptions(**SMALL, dtype="fp16"))


def test_a_weakly_typed_network_would_be_found_out(
    world: World, export: Callable[..., Path], model: checkpoints.LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On 10, a network without the flag builds in float32 without a word."""
    monkeypatch.setattr(gpu, "major", lambda _: 11)
    out = export(dtype="fp16")
    options = TensorRTOptions(**SMALL, dtype="fp16")
    if world.trt.__version__.startswith("10"):
        with pytest.raises(ClaimError, match="do not compute in float16"):
            EXPORTER.read_back(model, out, options)
    else:
        EXPORTER.read_back(model, out, options)


def test_half_layers_where_fp32_was_asked_for_fail(
    export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    out = export("fp16")
    with pytest.raises(ClaimError, match="do not compute in float32"):
        EXPORTER.read_back(model, out, TensorRTOptions(**SMALL))


def test_other_profiles_than_asked_for_fail(
    export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    out = export()
    with pytest.raises(ClaimError, match=r"profile 2 of model\.engine has input_ids"):
        EXPORTER.read_back(model, out, TensorRTOptions(batch_profiles="1,2,8", seq_lens="1:8:40"))
    with pytest.raises(ClaimError, match="has 3 profiles"):
        EXPORTER.read_back(model, out, TensorRTOptions(batch_profiles="1,2", seq_lens="1:8:40"))


def test_parser_errors_are_all_printed_with_their_nodes(
    world: World, export: Callable[..., Path]
) -> None:
    world.parser_errors = [("NonZero", "/mask/NonZero", 7, "unsupported"),
                           ("", "", 9, "no such plugin")]  # fmt: skip
    with pytest.raises(ExportError) as caught:
        export()
    assert "NonZero '/mask/NonZero' (node 7): unsupported" in str(caught.value)
    assert "node 9: no such plugin" in str(caught.value)


def test_nothing_from_the_builder_is_an_error_with_its_reason(
    world: World, export: Callable[..., Path]
) -> None:
    world.build_fails = True
    with pytest.raises(ExportError, match="Could not find any implementation for node"):
        export()


def test_a_full_disk_is_a_storage_error(
    world: World, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = building.stream_writer

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "stream_writer", lambda trt, file: original(trt, Full()))
    with pytest.raises(StorageError):
        export()


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])
def test_an_interruption_ends_the_build(
    world: World, export: Callable[..., Path], how: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(number: int, frame: object) -> None:
        raise how

    world.stuck = True
    before = signal.signal(signal.SIGINT, stop)
    timer = threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,))
    try:
        timer.start()
        with pytest.raises(how):
            export()
    finally:
        signal.signal(signal.SIGINT, before)
    assert world.cancelled, "the builder still runs, on files that are gone"


def test_progress_is_reported_and_a_broken_report_does_not_break_the_build(
    world: World, export: Callable[..., Path]
) -> None:
    from modelport.exporters import NOTIFY

    heard: list[str] = []

    def notify(text: str) -> None:
        heard.append(text)
        if "1 of" in text:
            raise RuntimeError

    token = NOTIFY.set(notify)
    try:
        export()
    finally:
        NOTIFY.reset(token)
    assert heard == ["building model.engine", "model.engine: Building (0 of 2)",
                     "model.engine: Building (1 of 2)", "model.engine: Building (2 of 2)"]


def test_the_timing_cache_is_kept_beside_the_artifacts_and_used_again(
    world: World, export: Callable[..., Path], tmp_path: Path
) -> None:
    out = export()
    [kept] = (tmp_path / TIMINGS).iterdir()
    version = world.trt.__version__
    assert kept.name == f"test-gpu-9000-9.0-tensorrt-{version}.timing"
    assert (out / TIMING).read_bytes() == kept.read_bytes()
    before = kept.read_bytes()
    export()
    assert kept.read_bytes() == before + b"t"
    kept.write_bytes(b"of another GPU")
    export()  # refused by TensorRT, which starts with an empty one
    assert kept.read_bytes() == before


def test_the_log_names_no_directory(export: Callable[..., Path], tmp_path: Path) -> None:
    text = (export() / LOG).read_text()
    assert "Test GPU 9000" in text
    assert "/" not in building.log_text([f"info: {tmp_path}: parsed"], tmp_path)


def test_stripped_engines_keep_the_graph_beside_them(
    world: World, export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    out = export(strip_plan=True)
    assert (out / "model.onnx").exists()
    assert (out / "model.safetensors").exists()
    written = EXPORTER.read_back(model, out, TensorRTOptions(**SMALL, strip_plan=True))
    assert written.facts["weights"] == "beside the engines"
    assert world.trt.called("Refitter.refit_cuda_engine")
    flags = {c["flag"].name for c in world.trt.called("IBuilderConfig.set_flag")}
    assert flags == {"STRIP_PLAN", "REFIT_IDENTICAL"}


def test_a_version_compatible_engine_is_read_back(
    export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    out = export(version_compatible=True)
    written = EXPORTER.read_back(model, out, TensorRTOptions(**SMALL, version_compatible=True))
    assert written.target["version_compatible"] == "yes"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"opt_level": 6}, "optimisation level 6"), ({"workspace": -1}, "-1 MiB"),
     ({"batch_profiles": "4,2"}, "--batch-profiles"), ({"seq_lens": "9:1"}, "--seq-lens"),
     ({"version_compatible": True, "strip_plan": True}, "lean runtime"),
     ({"opset": 9}, "opset 9"), ({"dtype": "bf16", "opset": 12}, "opset 12")],
)  # fmt: skip
def test_options_that_cannot_work_are_refused_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        EXPORTER.check(TensorRTOptions(**options))


@pytest.mark.parametrize(("dtype", "needed"), [("bf16", 13), ("int8", 13)])
def test_an_opset_too_low_is_refused_with_options_of_this_command(dtype: str, needed: int) -> None:
    with pytest.raises(OpsetTooLow, match="opset 12") as caught:
        EXPORTER.check(TensorRTOptions(dtype=dtype, opset=12))
    assert caught.value.hint == f"--opset {needed}, or --opset auto"


def test_opset_auto_is_raised_where_the_graph_is_made(
    capsys: pytest.CaptureFixture[str]
) -> None:
    """As a convolution in bfloat16 asks for."""
    wanted = EXPORTER.parent_options(TensorRTOptions(dtype="bf16", opset="auto"))
    raised = exporters.get("onnx").raised(wanted, 22)
    assert raised is not None
    assert raised.opset == 22
    assert EXPORTER.attention(TensorRTOptions(opset="auto")) == "sdpa"
    arguments = ["export", "tensorrt", "--model", "demo", "--opset", "auto", "--opt-level", "6"]
    assert cli.execute(arguments) == 2
    assert "optimisation level 6" in capsys.readouterr().err  # and nothing of the opset


def test_lengths_beyond_the_model_are_refused(
    export: Callable[..., Path], model: checkpoints.LoadedModel
) -> None:
    with pytest.raises(UsageError, match=r"(?s)--seq-lens.*1 to 40"):
        export(seq_lens="1:128:512")


def test_without_tensorrt_the_command_says_so_in_one_sentence() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("TensorRT is installed here")
    with pytest.raises(BackendUnavailable) as caught:
        EXPORTER.check(TensorRTOptions())
    assert str(caught.value) == (
        'TensorRT is not installed here; install it with pip install "modelport[tensorrt]"'
    )
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("version", "fine"), [
    ("10.16.1.11", True), ("11.4.0.106", True), ("10.15.9.1", False), ("9.3.0", False),
    ("12.0.0", False)])  # fmt: skip
def test_versions(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    if fine:
        assert gpu.tensorrt().__version__ == version
    else:
        with pytest.raises(BackendUnavailable, match=f"TensorRT {version} is not supported"):
            gpu.tensorrt()


def test_the_whole_chain_from_the_checkpoint(
    world: World, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    artifact = pipeline.export(
        "tensorrt", pipeline.ModelRequest(str(tiny("bert"))), out,
        TensorRTOptions(**SMALL, dtype="fp16"), validate=False,
    )
    manifest = artifacts.verify(out).manifest
    assert {"model.engine", TIMING, LOG, LAYERS, "config.json"} <= set(manifest.files)
    assert "model.onnx" not in manifest.files
    assert [a.made_by for a in manifest.lineage] == ["export", "cast"]
    assert manifest.parent == manifest.lineage[-1].identity
    assert manifest.target["gpu"] == "Test GPU 9000"
    assert manifest.facts["precision"] == "float16"
    engines = profiles.from_record(manifest.facts["engines"], artifact.spec)
    assert validated(artifact) == set(range(len(engines[0].profiles)))
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("cache")) == [
        TIMINGS, "out"]  # fmt: skip
    text = (out / "manifest.json").read_text()
    assert str(tmp_path) not in json.dumps({k: v for k, v in json.loads(text).items()
                                            if k != "source"})


def test_a_graph_to_build_from_that_fails_parity_is_there_to_look_at(
    world: World, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport.exporters import _onnx_capture

    capture = _onnx_capture.by_trace

    def spoiled(model: Any, opset: int) -> Any:
        graph = capture(model, opset)
        for node in graph.graph.all_nodes():
            if node.op_type == "Erf":
                node.op_type = "Tanh"
        return graph

    monkeypatch.setattr(_onnx_capture, "by_trace", spoiled)
    monkeypatch.setattr("modelport.exporters.onnx.OnnxExporter.strategies",
                        lambda self, options: ("trace",))
    out = tmp_path / "out"
    with pytest.raises(ParityError, match="the onnx artifact to build from failed") as caught:
        pipeline.export("tensorrt", pipeline.ModelRequest(str(tiny("bert"))), out,
                        TensorRTOptions(**SMALL))
    assert caught.value.hint == f"modelport inspect {tmp_path / 'out.rejected'}"
    rejected = artifacts.verify(tmp_path / "out.rejected").manifest
    assert (rejected.format, rejected.attempts[0].outcome) == ("onnx", "rejected")
    assert [p for p in tmp_path.iterdir() if ".partial-" in p.name or "parent" in p.name] == []


def test_int8_is_quantised_in_the_graph_as_tensorrt_reads_it(
    world: World, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = pipeline.export(
        "tensorrt", pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out",
        TensorRTOptions(**SMALL, dtype="int8"), validate=False,
    )
    facts = artifact.manifest.facts
    assert facts["precision"] == "int8-symmetric"
    assert facts["quantize"]["ranges"]  # what the reference is rounded by
    assert [a.made_by for a in artifact.manifest.lineage] == ["export", "quantize"]
    for counts in facts["layers"].values():
        assert counts["int8"] > sum(counts.values()) / 2


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_other_kinds_of_int8_would_not_be_parsed(
    world: World, model: checkpoints.LoadedModel, tiny: Callable[..., Path], tmp_path: Path,
    scheme: str,
) -> None:
    from modelport.exporters.onnx import OnnxOptions

    request, options = pipeline.ModelRequest(str(tiny("bert"))), OnnxOptions(quantize=scheme)
    parent = pipeline.export("onnx", request, tmp_path / "onnx", options, validate=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"Quantize.* \(node \d+\)"):
        EXPORTER.export(model, parent, tmp_path / "out", TensorRTOptions(**SMALL), "build")


def validated(artifact: artifacts.Artifact) -> set[int]:
    """Indices of the profiles that validation of an artifact with one engine runs."""
    from modelport.pipeline import subjects, validating

    subject = subjects.Subject(artifact.spec, lambda: None, artifact)  # type: ignore[arg-type]
    plan = validating.planned(subject.spec, validating._facts(subject), artifact.root,
                            validating.Limits())
    engines = profiles.from_record(artifact.manifest.facts["engines"], artifact.spec)
    return {profiles.route(engines, dict(case.sizes)).profile for case in plan.cases if case.sizes}


def test_an_engine_that_forgot_its_precision_is_never_placed(
    world: World, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    world.forgets_precision = True
    request = pipeline.ModelRequest(str(tiny("bert")))
    with pytest.raises(ClaimError, match="do not compute in float16") as caught:
        pipeline.export("tensorrt", request, tmp_path / "out",
                        TensorRTOptions(**SMALL, dtype="fp16"), validate=False)  # fmt: skip
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


# --- precision ----------------------------------------------------------------------------------


def report(*layers: dict[str, Any]) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": []})


def layer(kind: str, name: str, reads: list[str], field: str = "Format/Datatype",
          **extra: Any) -> dict[str, Any]:  # fmt: skip
    return {"Name": name, "LayerType": kind, "Inputs": [{"Name": "x", field: r} for r in reads],
            "Outputs": [{"Name": "y", field: reads[0]}], **extra}


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("Half", "float16"), ("Row major linear FP16 format", "float16"), ("Float", "float32"),
     ("Row major linear FP32 format (kLINEAR)", "float32"), ("BFloat16", "bfloat16"),
     ("Row major linear BF16", "bfloat16"), ("FP8", "float8"),
     ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
     ("Int64", ""), ("UInt8", ""), ("Bool", ""), ("N/A due to dynamic shapes", "")],
)  # fmt: skip
def test_words_of_the_inspector(word: str, wanted: str) -> None:
    [found] = precision.parse(report(layer("gemm", "a", [word])))
    assert found.reads == ({wanted} if wanted else set())


def test_version_11_has_the_type_in_a_field_of_its_own() -> None:
    entry = layer("gemm", "a", ["Half"], "DataType")
    entry["Inputs"][0]["Format"] = "Row major linear FP32 format (kLINEAR)"
    [found] = precision.parse(report(entry))
    assert found.reads == {"float16"}


def test_only_what_multiplies_is_judged() -> None:
    layers = precision.parse(report(
        layer("gemm", "a", ["Half"]),
        layer("kgen", "__myl_MeanSubMul", ["Float"]), layer("kgen", "softmax", ["Float"]),
        layer("Reformat", "Reformatting CopyNode for Input Tensor 0 to MatMul_3", ["Float"]),
        layer("CaskConvolution", "c", ["Float"], Weights={"Type": "Half", "Count": 9}),
    ))  # fmt: skip
    assert precision.require(layers, "float16", "e") == {"float16": 2}


def test_an_engine_of_fused_layers_without_products_is_judged_by_all() -> None:
    layers = precision.parse(report(layer("kgen", "a", ["Float"]), layer("kgen", "b", ["Float"])))
    with pytest.raises(ClaimError, match="2 of 2 layers"):
        precision.require(layers, "float16", "e")


@pytest.mark.parametrize("halves", [0, 1, 2])
def test_at_least_half_must_be_of_the_type_asked_for(halves: int) -> None:
    layers = precision.parse(report(*(
        layer("gemm", f"g{i}", ["Half" if i < halves else "Float"]) for i in range(3)
    )))  # fmt: skip
    if halves == 2:
        assert precision.require(layers, "float16", "e") == {"float16": 2, "float32": 1}
    else:
        with pytest.raises(ClaimError, match=rf"{3 - halves} of 3 .*g2 \(float32\)"):
            precision.require(layers, "float16", "e")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Layers": ["a", "b"]}', report(layer("gemm", "a", ["N/A"]))]
)
def test_an_engine_that_does_not_say_is_refused(text: str) -> None:
    with pytest.raises(ClaimError):
        precision.require(precision.parse(text), "float16", "e")


# --- with a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def real() -> None:
    if reason := gpu.unavailable():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_real_engine_is_built_and_proven_on_every_profile(
    real: None, dtype: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    artifact = pipeline.export(
        "tensorrt", pipeline.ModelRequest(str(tiny("bert"))), out,
        TensorRTOptions(**SMALL, dtype=dtype),
    )
    assert artifact.manifest.proven
