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
from modelport import transforms
from modelport.artifacts import Artifact, onnx_files
from modelport.errors import UsageError
from modelport.transforms import _calibration, _graph, _layers

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
        _layers.noise(model, _layers.layers(model), [quiet])["w"]
        for model in (graphs.product(spiked), graphs.product(weights()))
    )
    assert noisy < 3 < 30 < calm


def test_what_cannot_be_quantised_is_refused() -> None:
    done = quantize(graphs.product(weights())).model
    with pytest.raises(UsageError, match="quantised already"):
        quantize(done)
    with pytest.raises(UsageError, match="opset 9") as caught:
        quantize(graphs.product(weights(), opset=9))
    assert caught.value.hint == "--opset 11"
    with pytest.raises(UsageError, match="opset 11") as caught:
        quantize(graphs.product(weights(), opset=11), "int8-static")
    assert caught.value.hint == "--opset 13"
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
