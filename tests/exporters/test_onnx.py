"""The ONNX exporter: every opset, every strategy, and weights that are never loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hand_made
import numpy as np
import pytest
import torch
from modelport import checkpoints, exporters, pipeline
from modelport.artifacts import onnx_files
from modelport.errors import ClaimError, ExportError, UsageError
from modelport.exporters import _onnx_capture
from modelport.exporters.onnx import DYNAMO_MIN_OPSET, OPSETS, OnnxOptions

EXPORTER = exporters.get("onnx")


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Callable[..., checkpoints.LoadedModel]:
    def load(kind: str = "bert", opset: int = 17, **options: object) -> checkpoints.LoadedModel:
        attention = EXPORTER.attention(OnnxOptions(opset=opset))
        return checkpoints.load(
            checkpoints.resolve(str(tiny(kind, **options))), attention=attention
        )

    return load


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_written_read_back_and_right(
    opset: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    request = pipeline.ModelRequest(str(tiny("camembert")))
    out = tmp_path / "out"
    artifact = pipeline.export("onnx", request, out, OnnxOptions(opset=opset), validate=False)
    assert onnx_files.describe(out).opsets[""] == opset
    assert artifact.manifest.facts["opset"] == opset
    report = pipeline.validate_artifact(out)
    assert report.accepted, "\n".join(r.reason for r in report.failures)


@pytest.mark.parametrize(("strategy", "opset"), [
    ("dynamo", DYNAMO_MIN_OPSET), ("dynamo", 21), ("transformers", 18)])
def test_the_dearer_strategies_are_right_too(
    strategy: str, opset: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    request = pipeline.ModelRequest(str(tiny("bert")))
    options = OnnxOptions(opset=opset, strategy=strategy)
    artifact = pipeline.export("onnx", request, tmp_path / "out", options, validate=False)
    assert artifact.manifest.facts["strategy"] == strategy
    report = pipeline.validate_artifact(tmp_path / "out")
    assert report.accepted, "\n".join(r.reason for r in report.failures)


class Flat(torch.nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (tensors[0].sum(-1),)


class Fixed(torch.nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (tensors[0].mean() * torch.ones(2, 5),)


@pytest.mark.parametrize(("module", "strategy", "said"), [
    (Flat(), "trace", "y came out with shape"), (Flat(), "dynamo", "y came out with shape"),
    (Fixed(), "dynamo", "dimension batch of y came out static")])
def test_an_output_that_is_not_as_stated_fails_the_attempt(
    module: torch.nn.Module, strategy: str, said: str, tmp_path: Path
) -> None:
    """It would get the stated shape in the file, and read back as right."""
    model = hand_made.loaded(module, hand_made.spec(hand_made.VALUES))
    with pytest.raises(ExportError, match=said):
        EXPORTER.export(model, None, tmp_path, OnnxOptions(), strategy)


def test_the_graph_holds_names_not_weights(
    model: Callable[..., checkpoints.LoadedModel], tmp_path: Path
) -> None:
    loaded = model("bert", hidden_size=64, intermediate_size=256)
    EXPORTER.export(loaded, None, tmp_path, OnnxOptions(), "trace")
    found = onnx_files.describe(tmp_path)
    assert [t.name for t in found.inputs] == list(loaded.spec.input_names)
    assert [t.name for t in found.outputs] == list(loaded.spec.output_names)
    assert found.inputs[0].shape == ("batch", "sequence")
    source = next(iter(loaded.weights.values())).file
    assert (tmp_path / "model.safetensors").read_bytes() == source.read_bytes()
    assert (tmp_path / "model.onnx").stat().st_size < source.stat().st_size
    assert found.metadata["modelport.source"] == loaded.source.digest


def test_tied_weights_are_stored_once(
    model: Callable[..., checkpoints.LoadedModel], tmp_path: Path
) -> None:
    loaded = model("bert")
    EXPORTER.export(loaded, None, tmp_path, OnnxOptions(), "trace")
    stored = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    original = next(iter(loaded.weights.values())).file.stat().st_size
    assert stored <= original * 1.01


def test_skipping_products_does_not_change_the_graph(
    model: Callable[..., checkpoints.LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import onnx_ir as ir

    loaded = model("bert")
    quick = ir.to_proto(_onnx_capture.by_trace(loaded, 17)).SerializeToString()
    monkeypatch.setattr(_onnx_capture, "_skipped_products", contextlib.nullcontext)
    full = ir.to_proto(_onnx_capture.by_trace(loaded, 17)).SerializeToString()
    assert quick == full


def test_products_work_again_after_a_trace(model: Callable[..., checkpoints.LoadedModel]) -> None:
    import torch

    _onnx_capture.by_trace(model("bert"), 17)
    x = torch.ones(2, 2)
    np.testing.assert_array_equal((x @ x).numpy(), [[2, 2], [2, 2]])
    np.testing.assert_array_equal(torch.addmm(x, x, x).numpy(), [[3, 3], [3, 3]])


@pytest.mark.parametrize("opset", [8, 9, 10, 26, 99, 0, -1])
def test_an_opset_out_of_range_is_refused_with_the_range(opset: int) -> None:
    with pytest.raises(UsageError, match=r"(?s)opset .*allowed: 11 to 25"):
        EXPORTER.check(OnnxOptions(opset=opset))


def test_dynamo_is_not_tried_where_torch_would_write_another_opset() -> None:
    assert EXPORTER.strategies(OnnxOptions(opset=14)) == ("trace",)
    assert EXPORTER.strategies(OnnxOptions(opset=17)) == ("trace", "dynamo", "transformers")
    with pytest.raises(UsageError, match="--strategy trace"):
        EXPORTER.check(OnnxOptions(opset=14, strategy="dynamo"))


@pytest.mark.parametrize("claim", ["opset", "input", "output"])
def test_read_back_compares_the_file_with_the_request(
    claim: str, model: Callable[..., checkpoints.LoadedModel], tmp_path: Path
) -> None:
    import onnx

    loaded = model("bert")
    EXPORTER.export(loaded, None, tmp_path, OnnxOptions(), "trace")
    path = tmp_path / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    if claim == "opset":
        proto.opset_import[0].version = 18
    elif claim == "input":
        proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    else:
        proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ClaimError):
        EXPORTER.read_back(loaded, tmp_path, OnnxOptions())


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_weights_are_widened_exactly(
    stored: str, model: Callable[..., checkpoints.LoadedModel], tmp_path: Path
) -> None:
    from modelport.artifacts import weights

    loaded = model("bert", dtype=stored)
    EXPORTER.export(loaded, None, tmp_path, OnnxOptions(), "trace")
    kinds = set(onnx_files.describe(tmp_path).weight_bytes)
    assert "float32" in kinds
    assert not kinds & {"float16", "bfloat16"}
    written = weights.read_header(tmp_path / "model.safetensors")
    name = next(n for n in written if n.endswith("word_embeddings.weight"))
    np.testing.assert_array_equal(
        weights.read(written[name]), weights.read(loaded.weights[name], "float32")
    )


def test_simplify_makes_the_graph_smaller_and_leaves_it_right(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    request = pipeline.ModelRequest(str(tiny("bert")))
    nodes = []
    for optimize in ("none", "simplify"):
        out = tmp_path / optimize
        options = OnnxOptions(opset=11, optimize=optimize)
        pipeline.export("onnx", request, out, options, validate=False)
        nodes.append(onnx_files.describe(out).nodes)
        report = pipeline.validate_artifact(out)
        assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert nodes[1] < nodes[0]


def test_an_artifact_survives_a_move(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Weights are referred to relative to the graph, so a directory is all there is to it."""
    request = pipeline.ModelRequest(str(tiny("bert")))
    pipeline.export("onnx", request, tmp_path / "a", validate=False)
    (tmp_path / "a").rename(tmp_path / "b")
    artifact, session = pipeline.open_artifact(tmp_path / "b")
    with session:
        ones = np.ones((2, 3), dtype=np.int64)
        outputs = session.run(dict.fromkeys(artifact.spec.input_names, ones))
    assert np.isfinite(outputs["logits"]).all()


def test_a_parameter_without_elements(tmp_path: Path) -> None:
    """DINOv3 without register tokens joins an empty parameter to its patches."""
    import transformers

    config = transformers.DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37,
        image_size=32, patch_size=16, num_register_tokens=0)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "model")
    artifact = pipeline.export("onnx", pipeline.ModelRequest(str(tmp_path / "model")),
                               tmp_path / "out", OnnxOptions(strategy="trace"))
    assert artifact.manifest.proven
