"""Fusions of ONNX Runtime: equal results, a target in the manifest, and no matrix read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
from modelport import artifacts, pipeline, runtimes, transforms, validate
from modelport.artifacts import Artifact, onnx_files
from modelport.errors import BackendUnavailable, UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.transforms import _attention, _rotary, fuse

MHA = "com.microsoft::MultiHeadAttention"


def fused(parent: Artifact) -> transforms.TransformResult:
    simple = transforms.get("simplify").apply(onnx_files.load(parent.root), {}).model
    return transforms.get("fuse").apply(simple, {})


@pytest.mark.parametrize(("kind", "opset", "norms"), [
    ("bert", 11, 4), ("bert", 17, 4), ("vit", 17, 5)])
def test_fused_and_equal(
    kind: str, opset: int, norms: int, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported(kind, opset)
    result = fused(parent)
    assert result.target == {"runtime": "onnxruntime"}
    assert result.notes["fused"][MHA] == 2
    assert result.notes["fused"]["com.microsoft::SkipLayerNormalization"] == norms
    assert result.notes["fused"]["com.microsoft::BiasGelu"] >= 2
    # Ranges are computed on the host, and their copies keep a GPU from recording the graph.
    assert not any(node.op_type == "Range" for node in result.model.graph)
    assert result.notes["nodes_after"] < 0.65 * result.notes["nodes_before"]
    for batch, length in ((1, 1), (3, 17)):
        feeds = graphs.feeds_of(parent, batch, length)
        expected = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
        actual = graphs.run(result.model, feeds, tmp_path / "b")
        for e, a in zip(expected, actual, strict=True):
            assert np.allclose(e, a, rtol=1e-4, atol=1e-5)
    before, after = onnx_files.describe(parent.root), onnx_files.describe(tmp_path / "b")
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert after.opsets == {"": opset, "com.microsoft": 1}


def norm(opset: int) -> ir.Model:
    """(x - mean) / sqrt(mean((x - mean)²) + ε) · gain + shift."""
    x, y = graphs.value("x", ("batch", 8)), graphs.value("y", ("batch", 8))
    weights = {"two": np.float32(2).reshape(()), "tiny": np.float32(1e-5).reshape(()),
               "gain": np.arange(1, 9, dtype=np.float32), "shift": np.ones(8, np.float32)}
    values = {name: graphs.value(name, array.shape) for name, array in weights.items()}
    nodes: list[ir.Node] = []

    def after(operator: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes))
        nodes[-1].outputs[0].name = f"n{len(nodes)}"
        return nodes[-1].outputs[0]

    centred = after("Sub", x, after("ReduceMean", x, axes=[-1]))
    variance = after("ReduceMean", after("Pow", centred, values["two"]), axes=[-1])
    scaled = after("Div", centred, after("Sqrt", after("Add", variance, values["tiny"])))
    nodes.append(ir.node("Add", [after("Mul", scaled, values["gain"]), values["shift"]],
                         outputs=[y]))
    return graphs.graph(nodes, [x], [y], weights, values, opset)


@pytest.mark.parametrize(("opset", "target"), [(13, {"runtime": "onnxruntime"}), (17, {})])
def test_a_norm_below_the_opset_that_brought_it_ties_the_graph(
    opset: int, target: dict[str, str], tmp_path: Path
) -> None:
    result = transforms.get("fuse").apply(norm(opset), {})
    assert result.notes["fused"] == {"LayerNormalization": 1}
    assert result.target == target
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 8), np.float32)}
    (expected,) = graphs.run(norm(opset), feeds, tmp_path / "a")
    (actual,) = graphs.run(result.model, feeds, tmp_path / "b")
    assert np.allclose(actual, expected, atol=1e-5)


def test_a_row_without_any_key_stays_finite_and_the_others_right(
    exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported("bert", 17)
    sizes = (("batch", 3), ("sequence", 9))
    feeds = dict(validate.draw(parent.spec, validate.Case(sizes, "masked", 0)))
    empty = feeds["attention_mask"].sum(axis=1) == 0
    assert empty.any()
    (expected,) = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
    (actual,) = graphs.run(fused(parent).model, feeds, tmp_path / "b")
    assert np.isfinite(actual).all()
    assert np.allclose(actual[~empty], expected[~empty], rtol=1e-4, atol=1e-5)


def test_no_matrix_is_read(
    exported: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    original = ir.ExternalTensor.numpy

    def counted(self: ir.ExternalTensor) -> np.ndarray:
        read.append(tuple(self.shape.numpy()))
        return original(self)

    monkeypatch.setattr(ir.ExternalTensor, "numpy", counted)
    result = fused(exported("bert", 17))
    assert not [shape for shape in read if len(shape) > 1]
    stored = [v.const_value for v in result.model.graph.initializers.values()
              if isinstance(v.const_value, ir.ExternalTensor)]
    assert len(stored) > 10, "the weights are still those of the file"


def attention(*, scaled: bool, masked: bool, size: int = 4) -> tuple[ir.Model, dict[str, object]]:
    """softmax(q·k / 2 + bias)·v with two heads, cut by constants; q, k and v are inputs."""
    width, names = 2 * size, ("q", "k", "v")
    inputs = [graphs.value(n, ("batch", f"length_{n == 'q'}", width)) for n in names]
    values = {"cut": graphs.value("cut", (4,), ir.DataType.INT64),
              "join": graphs.value("join", (3,), ir.DataType.INT64),
              "half": graphs.value("half", ())}
    weights = {"cut": np.array([0, 0, 2, size]), "join": np.array([0, 0, width]),
               "half": np.float32(0.5).reshape(())}
    nodes, turned = [], {}
    for name, value in zip(names, inputs, strict=True):
        cut = ir.node("Reshape", [value, values["cut"]])
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        move = ir.node("Transpose", cut.outputs, {"perm": perm})
        nodes += [cut, move]
        turned[name] = move.outputs[0]
    last = ir.node("MatMul", [turned["q"], turned["k"]])
    nodes.append(last)
    if scaled:
        last = ir.node("Mul", [last.outputs[0], values["half"]])
        nodes.append(last)
    if masked:
        inputs.append(graphs.value("mask", ("batch", 1, 1, "length_False")))
        last = ir.node("Add", [last.outputs[0], inputs[-1]])
        nodes.append(last)
    soft = ir.node("Softmax", last.outputs, {"axis": -1})
    product = ir.node("MatMul", [soft.outputs[0], turned["v"]])
    back = ir.node("Transpose", product.outputs, {"perm": [0, 2, 1, 3]})
    y = graphs.value("y", ("batch", "length_True", width))
    joined = ir.node("Reshape", [back.outputs[0], values["join"]], outputs=[y])
    nodes += [soft, product, back, joined]
    for number, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"n{number}"
    model = graphs.graph(nodes, inputs, [y], weights, values)
    rng = np.random.default_rng(0)
    feeds: dict[str, object] = {n: rng.standard_normal((2, 3 if n == "q" else 5, width))
                                .astype(np.float32) for n in names}
    if masked:
        feeds["mask"] = np.where(rng.random((2, 1, 1, 5)) < 0.4, -np.inf, 0).astype(np.float32)
    return model, feeds


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_hand(scaled: bool, masked: bool, tmp_path: Path) -> None:
    model, feeds = attention(scaled=scaled, masked=masked)
    (expected,) = graphs.run(model, feeds, tmp_path / "a")
    assert _attention.fuse(model) == 1
    (node,) = [n for n in model.graph if n.op_type == "MultiHeadAttention"]
    assert node.attributes["num_heads"].value == 2
    assert node.attributes["scale"].value == (0.5 if scaled else 1.0)
    assert (len(node.inputs) == 6 and node.inputs[5] is not None) is masked
    assert not any(n.op_type == "Softmax" for n in model.graph)
    assert [v.name for v in model.graph.outputs] == ["y"]
    (actual,) = graphs.run(model, feeds, tmp_path / "b")
    assert np.allclose(actual, expected, atol=1e-6)


def test_a_factor_of_the_models_own_is_not_lost(tmp_path: Path) -> None:
    model, feeds = attention(scaled=True, masked=True)
    (back,) = [n for n in model.graph if n.op_type == "Transpose"
               and n.inputs[0].producer().op_type == "MatMul"]
    largest = ir.node("ReduceMax", [model.graph.inputs[0]], {"keepdims": 1})
    times = ir.node("Mul", [back.inputs[0], largest.outputs[0]])
    largest.outputs[0].name, times.outputs[0].name = "largest", "times"
    model.graph.insert_before(back, [largest, times])
    back.replace_input_with(0, times.outputs[0])
    (expected,) = graphs.run(model, feeds, tmp_path / "a")
    _attention.fuse(model)
    (actual,) = graphs.run(model, feeds, tmp_path / "b")
    assert np.allclose(actual, expected, atol=1e-5)


@pytest.fixture(scope="module")
def decoder(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Artifact]:
    """``decoder(kind)`` → an artifact of a decoder that keeps its keys and values."""
    made: dict[str, Artifact] = {}

    def get(kind: str) -> Artifact:
        if kind not in made:
            request = pipeline.ModelRequest(str(tiny(kind, "text-generation")))
            made[kind] = pipeline.export(
                "onnx", request, tmp_path_factory.mktemp(kind) / "out",
                OnnxOptions(strategy="trace"), validate=False)
        return made[kind]

    return get


def cached(artifact: Artifact) -> ir.Model:
    return onnx_files.load(artifact.root / "decoder.onnx")


OPERATORS = {
    "gpt2": {MHA: 2, "com.microsoft::FastGelu": 2, "com.microsoft::SkipLayerNormalization": 4},
    "llama": {"com.microsoft::GroupQueryAttention": 2, MHA: 2, "If": 2,
              "com.microsoft::RotaryEmbedding": 4,
              "com.microsoft::SkipSimplifiedLayerNormalization": 4},
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_decoder_with_a_cache(
    kind: str, decoder: Callable[..., Artifact], tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    made = decoder(kind)
    simple = transforms.get("simplify").apply(cached(made), {}).model
    capsys.readouterr()
    result = transforms.get("fuse").apply(simple, {})
    assert capsys.readouterr().out == ""
    assert "optimizer_failed" not in result.notes
    assert {name: result.notes["fused"][name] for name in OPERATORS[kind]} == OPERATORS[kind]
    assert not any(n.op_type == "Softmax" for n in result.model.graph.all_nodes())
    assert result.notes["nodes_after"] < 0.7 * result.notes["nodes_before"]
    spec = made.component("decoder").spec
    for batch, length, past in ((1, 1, 0), (3, 7, 0), (2, 4, 5), (1, 4, 5), (3, 1, 9)):
        sizes = (("batch", batch), ("past", past), ("sequence", length))
        padding = "left" if length > 1 else "none"
        feeds = dict(validate.draw(spec, validate.Case(sizes, padding, 0)))
        feeds["logits_to_keep"] = np.array(1)  # of the last token, which is never padding
        expected = graphs.run(cached(made), feeds, tmp_path)
        actual = graphs.run(result.model, feeds, tmp_path)
        mask = feeds["attention_mask"].astype(bool)
        for e, a in zip(expected, actual, strict=True):
            if e.ndim == 4:  # a padded token's own keys and values are not read
                e, a = (x.swapaxes(1, 2)[mask] for x in (e, a))
            assert np.allclose(a, e, rtol=1e-4, atol=1e-5)


def test_shapes_that_reshapes_share_survive_the_optimizer(
    decoder: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attention, "fuse", lambda _: 0)
    made = decoder("gpt2")
    simple = transforms.get("simplify").apply(cached(made), {}).model
    result = transforms.get("fuse").apply(simple, {})
    assert "optimizer_failed" not in result.notes
    assert result.notes["fused"]["com.microsoft::FastGelu"] == 2
    sizes = (("batch", 2), ("past", 5), ("sequence", 4))
    spec = made.component("decoder").spec
    feeds = dict(validate.draw(spec, validate.Case(sizes, "none", 0)))
    expected = graphs.run(cached(made), feeds, tmp_path)
    actual = graphs.run(result.model, feeds, tmp_path)
    assert all(np.allclose(a, e, rtol=1e-4, atol=1e-5)
               for a, e in zip(actual, expected, strict=True))


def test_a_mask_made_from_the_cache_keeps_it_in_the_graph(
    decoder: Callable[..., Artifact]
) -> None:
    simple = transforms.get("simplify").apply(cached(decoder("gpt2")), {}).model
    first = next(n for n in simple.graph if n.op_type == "Softmax")
    scores = first.inputs[0].producer()
    bias = scores.inputs[1]
    present = next(v for v in simple.graph.outputs if v.name == "present_value_0")
    lengths = ir.node("ReduceSum", [present], {"keepdims": 1})
    mask = ir.node("Add", [bias, lengths.outputs[0]])
    simple.graph.insert_before(scores, [lengths, mask])
    scores.replace_input_with(1, mask.outputs[0])
    assert _attention.fuse(simple) == 2
    kept = [n for n in simple.graph if n.op_type == "MultiHeadAttention" and len(n.outputs) == 3]
    assert len(kept) == 1


def test_a_sum_of_products_is_no_rotation() -> None:
    x = graphs.value("x", ("batch", 2, "tokens", 4))
    names = ("cos", "sin")
    tables = {n: graphs.value(n, ("batch", 1, "tokens", 4)) for n in names}
    one, two = (ir.node("Mul", [x, tables[n]]) for n in names)
    y = graphs.value("y", ("batch", 2, "tokens", 4))
    added = ir.node("Add", [one.outputs[0], two.outputs[0]], outputs=[y])
    model = graphs.graph([one, two, added], [x, *tables.values()], [y], {}, {})
    assert _rotary.fuse(model) == 0


def test_what_is_no_attention_is_left_alone() -> None:
    model, _ = attention(scaled=True, masked=False)
    (soft,) = [n for n in model.graph if n.op_type == "Softmax"]
    soft.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert _attention.fuse(model) == 0
    used, _ = attention(scaled=True, masked=False)
    (soft,) = [n for n in used.graph if n.op_type == "Softmax"]
    kept = ir.node("Neg", soft.outputs)  # somebody reads the probabilities
    kept.outputs[0].name = "kept"
    used.graph.append(kept)
    assert _attention.fuse(used) == 0


def test_only_the_runtime_it_is_tied_to_opens_it(
    exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    parent = exported("bert")
    tied = Artifact(parent.root, dataclasses.replace(
        parent.manifest, target={"runtime": "onnxruntime"}))
    with pytest.raises(BackendUnavailable, match="those of onnxruntime"):
        runtimes.get("openvino").open(tied)
    assert artifacts.read(parent.root).manifest.target == {}


def test_a_failure_of_the_optimizer_leaves_attention_fused(
    monkeypatch: pytest.MonkeyPatch, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    def broken(_: object) -> object:
        raise RuntimeError("Graph is not a DAG")

    monkeypatch.setattr(fuse, "_optimised", broken)
    parent = exported("bert")
    result = fused(parent)
    assert result.notes["optimizer_failed"] == "Graph is not a DAG"
    assert result.notes["fused"][MHA] == 2
    feeds = graphs.feeds_of(parent, 2, 7)
    expected = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
    actual = graphs.run(result.model, feeds, tmp_path / "b")
    assert np.allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)


def test_what_is_quantised_is_not_fused() -> None:
    model = graphs.product(np.ones((8, 8), np.float32))
    quantised = transforms.get("quantize").apply(
        model, {"scheme": "int8-dynamic", "samples": [{"x": np.ones((1, 8), np.float32)}]}).model
    with pytest.raises(UsageError, match="quantised already"):
        transforms.get("fuse").apply(quantised, {})
