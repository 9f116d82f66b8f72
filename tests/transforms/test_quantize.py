"""int8: what the graph computes is what ONNX's operators mean, and bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelport import runtimes, transforms
from modelport.artifacts import Artifact, onnx_files
from modelport.errors import UsageError
from modelport.transforms import _blockwise, _calibration, _graph, _layers

FEEDS = {"x": np.random.default_rng(1).standard_normal((5, 64), np.float32)}


def weights(rows: int = 64, columns: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


def quantize(
    model: ir.Model, scheme: str = "int8-dynamic", **options: object
) -> transforms.TransformResult:
    return transforms.get("quantize").apply(
        model, {"scheme": scheme, "samples": [FEEDS], **options})


def by_hand(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x · w with both rounded as the ONNX specification says, in float64."""
    step = np.abs(w).max(axis=0) / 127
    low, high = min(x.min(), 0), max(x.max(), 0)
    size = (high - low) / 255
    zero = np.rint(-low / size)
    grid = np.clip(np.rint(x / size) + zero, 0, 255) - zero
    return np.asarray((grid * np.float64(size)) @ (np.rint(w / step) * np.float64(1) * step))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_symmetric_activations_have_a_zero_point_of_zero(
    plain: bool, scale: float, tmp_path: Path
) -> None:
    x, w = FEEDS["x"] * np.float32(scale), weights()
    result = transforms.get("quantize").apply(
        graphs.product(w), {"scheme": "int8-symmetric", "samples": [{"x": x}]})
    points = [n.inputs[2].const_value.numpy() for n in result.model.graph
              if n.op_type in ("QuantizeLinear", "DequantizeLinear")]  # fmt: skip
    assert len(points) == 3
    assert all(p.dtype == np.int8 and not p.any() for p in points)
    (found,) = graphs.run(result.model, {"x": x}, tmp_path / "m", plain=plain)
    step = np.abs(x).max() / 127 or 1.0
    steps = np.abs(w).max(axis=0) / 127
    expected = (np.rint(x / step) * step) @ (np.rint(w / steps) * steps)
    np.testing.assert_allclose(found, expected, atol=2e-2 * expected.std() + 1e-6)


@pytest.mark.parametrize("kind", ["matmul", "transposed", "gemm"])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("plain", [True, False])
def test_computes_what_the_operators_mean(
    kind: str, scheme: str, plain: bool, tmp_path: Path
) -> None:
    stored = weights() if kind == "matmul" else np.ascontiguousarray(weights().T)
    result = quantize(graphs.product(stored, kind=kind), scheme)
    (found,) = graphs.run(result.model, FEEDS, tmp_path / "m", plain=plain)
    bias = np.arange(48) if kind == "gemm" else 0
    expected = by_hand(FEEDS["x"], weights()) + bias
    assert np.allclose(found, expected, atol=2e-2 * np.abs(expected).std())
    exact = FEEDS["x"] @ weights() + bias
    assert not np.allclose(found, exact, atol=1e-3), "nothing was rounded"
    assert onnx_files.describe(tmp_path / "m").weight_bytes["int8"] >= 64 * 48
    assert result.notes["layers"]["w"]["transposed"] is (kind != "matmul")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_no_weight_moves_by_more_than_half_a_step(
    seed: int, rows: int, columns: int, transposed: bool
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32) * 10.0 ** rng.integers(-20, 20)
    w[:, 0] *= rng.integers(0, 2)  # a channel of zeros now and then
    stored = np.ascontiguousarray(w.T) if transposed else w
    node = ir.node("MatMul", [graphs.value("x", (1, rows)), graphs.value("w", stored.shape)])
    layer = _layers.Layer(node, ir.Value(name="w", const_value=ir.tensor(stored)), transposed)
    steps = _layers.scales(layer)
    q = _layers.quantised(layer, steps)
    assert q.shape == w.shape
    assert q.dtype == np.int8
    assert q.min() >= -127
    assert np.all(np.abs(q * steps.astype(np.float64) - w) <= steps * 0.5001)


@pytest.mark.parametrize(
    "scheme", ["int8-dynamic", "int8-static", "int8-symmetric", "int8-weights", "int4-weights"])
def test_a_weight_multiplied_both_ways_round_stays_in_float(scheme: str, tmp_path: Path) -> None:
    """Stored once for both products it would be right for one of them."""
    square, first = weights(64, 64) / 8, weights(64, 64)[::-1] / 8
    x, y = graphs.value("x", ("batch", 64)), graphs.value("y", ("batch", 64))
    values = {"v": graphs.value("v", (64, 64)), "w": graphs.value("w", (64, 64))}
    turned = ir.node("Transpose", [values["w"]], {"perm": [1, 0]})
    nodes = [turned, ir.node("MatMul", [x, values["v"]])]
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], turned.outputs[0]]))
    nodes.append(ir.node("Tanh", nodes[-1].outputs))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], values["w"]], outputs=[y]))
    for number, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"n{number}"
    model = graphs.graph(nodes, [x], [y], {"v": first, "w": square}, values)
    result = quantize(model, scheme)
    assert list(result.notes["layers"]) == ["v"]
    (found,) = graphs.run(result.model, FEEDS, tmp_path / "m")
    expected = np.tanh(FEEDS["x"] @ first @ square.T) @ square
    assert np.abs(found - expected).max() < (0.5 if scheme == "int4-weights" else 0.1)


def test_one_activation_is_rounded_once_for_all_that_read_it(
    exported: Callable[..., Artifact]
) -> None:
    parent = exported("bert", 17)
    result = transforms.get("quantize").apply(
        onnx_files.load(parent.root),
        {"scheme": "int8-dynamic", "samples": [graphs.feeds_of(parent, 2, 9)]})
    counts = _graph.operators(result.model)
    assert counts["MatMulInteger"] == len(result.notes["layers"])
    assert counts["DynamicQuantizeLinear"] < counts["MatMulInteger"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "vit"])
def test_real_architectures_keep_their_signal(
    kind: str, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported(kind, 17)
    result = transforms.get("quantize").apply(
        onnx_files.load(parent.root),
        {"scheme": "int8-dynamic", "samples": [graphs.feeds_of(parent, 2, 9)]})
    for batch, length in ((1, 1), (3, 17)):
        feeds = graphs.feeds_of(parent, batch, length)
        (e, *_), (a, *_) = (graphs.run(m, feeds, tmp_path / n) for n, m in (
            ("a", onnx_files.load(parent.root)), ("b", result.model)))
        assert np.sqrt(np.mean((a - e) ** 2)) < 0.15 * np.sqrt(np.mean(e**2))


def test_weights_are_computed_when_written_and_not_before() -> None:
    result = quantize(graphs.product(weights()))
    tensor = result.model.graph.initializers["w:int8"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert "w" not in result.model.graph.initializers


def test_the_noisiest_layers_stay_in_float() -> None:
    result = quantize(graphs.product(weights()), keep=0)
    assert not result.notes["layers"]["w"]["kept"]
    with pytest.raises(UsageError, match="too sensitive"):
        quantize(graphs.product(weights()), keep=1)


def test_a_layer_with_an_outlier_is_found_noisy() -> None:
    spiked = weights()
    spiked[0] = 0
    spiked[0, :] = 1e4  # one large weight in each channel leaves the rest no levels
    quiet = {"x": FEEDS["x"] * (np.arange(64) > 0)}
    noisy, calm = (
        _layers.noise(model, _layers.layers(model), [quiet], _layers.by_channel)["w"]
        for model in (graphs.product(spiked), graphs.product(weights()))
    )
    assert noisy < 3 < 30 < calm


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "int8-weights"])
def test_no_weight_stays_in_memory(scheme: str, exported: Callable[..., Artifact]) -> None:
    parent = exported("bert", 17)
    model = onnx_files.load(parent.root)
    stored = [v.const_value for v in model.graph.initializers.values()
              if isinstance(v.const_value, ir.ExternalTensor)]
    assert len(stored) > 10
    quantize(model, scheme, samples=[graphs.feeds_of(parent, 2, 9)])
    mapped = [tensor.name for tensor in stored if tensor.raw is not None]
    assert not mapped


@pytest.mark.parametrize("transposed", [True, False])
def test_a_product_in_pieces_is_the_product(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights()
    pieces = [w.reshape(-1)[start : start + 5 * 48] for start in range(0, w.size, 5 * 48)]
    monkeypatch.setattr(_graph, "blocks", lambda _: iter(pieces))
    rows = FEEDS["x"][:, :48] if transposed else FEEDS["x"]
    expected = rows @ (w.T if transposed else w)
    found = _layers._product(rows, ir.tensor(w), transposed)
    assert np.allclose(found, expected, atol=1e-4)


def by_blocks(x: np.ndarray, w: np.ndarray, bits: int, block: int) -> np.ndarray:
    """x · w, both rounded block by block of the inputs as MatMulNBits means it, in float64."""
    total = np.zeros((len(x), w.shape[1]))
    for start in range(0, len(w), block):
        a, b = x[:, start : start + block], w[start : start + block].astype(np.float64)
        peak = b[np.abs(b).argmax(axis=0), np.arange(b.shape[1])]
        step = np.where(peak == 0, 1, peak / -(2 ** (bits - 1)))
        size = np.abs(a).max(axis=1, keepdims=True) / 127
        grid = np.rint(np.divide(a, size, out=np.zeros_like(a), where=size > 0))
        levels = np.clip(np.rint(b / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        total += (grid * size) @ (levels * step)
    return total


@pytest.mark.parametrize("kind", ["matmul", "transposed", "gemm"])
@pytest.mark.parametrize(("scheme", "bits", "block"), [
    ("int8-weights", 8, 128), ("int4-weights", 4, 32)])
@pytest.mark.parametrize("width", [64, 200])
def test_weights_alone_compute_what_the_operator_means(
    kind: str, scheme: str, bits: int, block: int, width: int, tmp_path: Path
) -> None:
    w = weights(width)
    x = np.random.default_rng(1).standard_normal((5, width), np.float32)
    stored = w if kind == "matmul" else np.ascontiguousarray(w.T)
    result = quantize(graphs.product(stored, kind=kind), scheme, samples=[{"x": x}])
    (found,) = graphs.run(result.model, {"x": x}, tmp_path / "m")
    bias = np.arange(48) if kind == "gemm" else 0
    expected = by_blocks(x, w, bits, block) + bias
    noise = np.std(x @ w + bias - expected)
    assert np.std(found - expected) < 0.2 * noise, "not rounded like that"
    assert result.target == {"runtime": "onnxruntime"}
    layer = result.notes["layers"]["w"]
    assert (layer["bits"], layer["block"], layer["kept"]) == (bits, block, False)
    size = onnx_files.describe(tmp_path / "m").weight_bytes["uint8"]
    assert size == 48 * -(-width // block) * block * bits // 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 7), st.booleans(),
       st.sampled_from([4, 8]))
def test_no_weight_alone_moves_by_more_than_a_step(
    seed: int, rows: int, columns: int, transposed: bool, bits: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32) * 10.0 ** rng.integers(-20, 20)
    w[:, 0] *= rng.integers(0, 2)
    stored = np.ascontiguousarray(w.T) if transposed else w
    node = ir.node("MatMul", [graphs.value("x", (1, rows)), graphs.value("w", stored.shape)])
    layer = _layers.Layer(node, ir.Value(name="w", const_value=ir.tensor(stored)), transposed)
    block = _blockwise.BLOCK[bits]
    steps = np.abs(np.repeat(_blockwise.steps(layer, bits), block, axis=1)[:, :rows].T)
    moved = np.abs(_blockwise.rounded(layer, bits) - w)
    # The level opposite to the largest magnitude's lacks: there a whole step is lost, at most.
    assert np.all(moved <= steps * 1.0001)
    assert np.mean(moved <= steps * 0.5001) > 0.8
    packed = _blockwise.packed(layer, bits)
    levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
    again = (levels.reshape(columns, -1)[:, :rows].T.astype(np.float32) - 2 ** (bits - 1)) * (
        np.repeat(_blockwise.steps(layer, bits), block, axis=1)[:, :rows].T)
    assert np.array_equal(again, _blockwise.rounded(layer, bits))


def test_a_weight_is_packed_the_same_in_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for kind in ("matmul", "transposed"):
        w = weights(200)
        stored = w if kind == "matmul" else np.ascontiguousarray(w.T)
        onnx_files.save(graphs.product(stored, kind=kind), tmp_path)
        layer = _layers.layers(onnx_files.load(tmp_path))[0]
        whole = _blockwise.packed(layer, 4), _blockwise.steps(layer, 4)
        monkeypatch.setattr(_blockwise, "PIECE", 500)
        parts = _blockwise.packed(layer, 4), _blockwise.steps(layer, 4)
        monkeypatch.undo()
        for a, b in zip(whole, parts, strict=True):
            assert np.array_equal(a, b)


def test_the_noisiest_layers_of_4_bits_take_8() -> None:
    result = quantize(graphs.product(weights()), "int4-weights", keep=1)
    assert result.notes["layers"]["w"]["bits"] == 8
    assert not result.notes["layers"]["w"]["kept"]


def test_what_cannot_be_quantised_is_refused() -> None:
    done = quantize(graphs.product(weights())).model
    with pytest.raises(UsageError, match="quantised already"):
        quantize(done)
    with pytest.raises(UsageError, match="opset 9") as caught:
        quantize(graphs.product(weights(), opset=9))
    assert caught.value.hint == "--opset 11, or --opset auto"
    with pytest.raises(UsageError, match="opset 11") as caught:
        quantize(graphs.product(weights(), opset=11), "int8-static")
    assert caught.value.hint == "--opset 13, or --opset auto"
    with pytest.raises(UsageError, match="no samples"):
        quantize(graphs.product(weights()), samples=[])
    with pytest.raises(UsageError, match="cannot quantise to int3"):
        quantize(graphs.product(weights()), "int3")
    x, y = graphs.value("x", ("batch", 4)), graphs.value("y", ("batch", 4))
    nothing = graphs.graph([ir.node("Neg", [x], outputs=[y])], [x], [y], {}, {})
    with pytest.raises(UsageError, match="no product"):
        quantize(nothing)


def test_ranges_by_method() -> None:
    model = graphs.product(weights())
    value = _layers.layers(model)[0].activation
    rng = np.random.default_rng(0)
    spiked = rng.standard_normal((400, 64)).astype(np.float32)
    spiked[0, 0] = 100
    feeds = [{"x": spiked}]
    found = {m: _calibration.ranges(model, [value], feeds, m)[value]
             for m in ("minmax", "percentile", "entropy")}
    assert found["minmax"] == (float(spiked.min()), 100.0)
    assert 3 < found["percentile"][1] < 100
    assert 2 < found["entropy"][1] < 100
    with pytest.raises(UsageError, match="calibration 'magic'"):
        _calibration.ranges(model, [value], feeds, "magic")


def test_one_file_for_onnx_runtime_and_openvino(
    exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    parent = exported("bert", 17)
    feeds = graphs.feeds_of(parent, 3, 17)
    result = transforms.get("quantize").apply(
        onnx_files.load(parent.root), {"scheme": "int8-static", "samples": [feeds]})
    (theirs,) = graphs.run(result.model, feeds, tmp_path)
    (exact,) = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
    artifact = Artifact(tmp_path, parent.manifest)
    with runtimes.get("openvino").open(artifact) as session:
        ours = session.run(feeds)["logits"]
        eight = sum(count for kind, count in session.precisions().items()  # type: ignore[attr-defined]
                    if kind in ("i8", "u8"))
    noise = np.std(theirs - exact)
    assert noise > 0
    assert np.std(ours - exact) < 2 * noise
    assert np.std(ours - theirs) < noise
    assert eight >= 12, "the products run in 8 bits"
