"""float16 and bfloat16: finite at every shape, close to float32, weights really stored in half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
from modelport import transforms
from modelport.artifacts import Artifact, onnx_files
from modelport.errors import UsageError

FEEDS = {"x": np.ones((2, 64), np.float32)}


def cast(model: ir.Model, *samples: object, dtype: str = "float16") -> transforms.TransformResult:
    return transforms.get("cast").apply(model, {"dtype": dtype, "samples": list(samples)})


def weights(rows: int = 64, columns: int = 48) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


@pytest.mark.parametrize(("kind", "opset"), [
    ("bert", 11), ("bert", 17), ("gpt2", 11), ("gpt2", 17), ("t5", 17), ("vit", 17),
    ("deberta-v2", 17), ("resnet", 17),
])
def test_float16_is_close_and_finite_at_shapes_never_measured(
    kind: str, opset: int, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    parent = exported(kind, opset)
    result = cast(onnx_files.load(parent.root), graphs.feeds_of(parent, 2, 9))
    assert result.precision == "float16"
    assert result.notes["half_share"] > 0.9
    before, after = onnx_files.describe(parent.root), None
    for batch, length in ((1, 1), (3, 17), (2, 31)):
        feeds = graphs.feeds_of(parent, batch, length, seed=batch)
        expected = graphs.run(onnx_files.load(parent.root), feeds, tmp_path / "a")
        actual = graphs.run(result.model, feeds, tmp_path / "b")
        for e, a in zip(expected, actual, strict=True):
            assert a.dtype == e.dtype == np.float32
            assert np.isfinite(a).all()
            assert np.sqrt(np.mean((a - e) ** 2)) < 2e-2 * np.sqrt(np.mean(e**2))
            assert not np.array_equal(a, e), "nothing was rounded, so nothing was cast"
    after = onnx_files.describe(tmp_path / "b")
    assert (after.inputs, after.outputs, after.opsets) == (
        before.inputs, before.outputs, before.opsets)
    half, single = after.weight_bytes["float16"], after.weight_bytes.get("float32", 0)
    assert half > 9 * single


def test_a_value_that_overflows_stays_in_float32(tmp_path: Path) -> None:
    model = graphs.product(weights(), scale=1e4)
    assert abs(FEEDS["x"] @ weights() * 1e4).max() > 65504
    result = cast(model, FEEDS)
    (found,) = graphs.run(result.model, FEEDS, tmp_path / "m")
    assert np.isfinite(found).all()
    assert np.allclose(found, FEEDS["x"] @ weights() * 1e4, rtol=2e-2, atol=200)
    assert "range" in result.notes["kept"]


def test_headroom_for_inputs_larger_than_the_samples(tmp_path: Path) -> None:
    model = graphs.product(np.eye(64, dtype=np.float32) * 300)
    result = cast(model, {"x": np.full((1, 64), 100, np.float32)})  # 30000 fits, but barely
    (found,) = graphs.run(result.model, {"x": np.full((1, 64), 400, np.float32)}, tmp_path / "m")
    assert np.allclose(found, 120000)


def test_a_mask_of_the_lowest_float_stays_in_float32(tmp_path: Path) -> None:
    lowest = float(np.finfo(np.float32).min)
    for dtype in ("float16", "bfloat16"):
        small = {"x": FEEDS["x"] * 1e-6}
        result = cast(graphs.product(weights(), scale=lowest), small, dtype=dtype)
        constant = result.model.graph.initializers["c"]
        assert constant.dtype == ir.DataType.FLOAT
        assert constant.const_value is not None
        assert constant.const_value.numpy() == np.float32(lowest)


def test_a_weight_too_large_for_the_type_keeps_its_layer(tmp_path: Path) -> None:
    large = weights()
    large[3, 4] = 1e5
    zero = {"x": np.zeros((1, 64), np.float32)}
    result = cast(graphs.product(large), zero)
    assert result.model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert cast(graphs.product(weights()), zero).model.graph.initializers["w"].dtype == (
        ir.DataType.FLOAT16)


def test_a_small_constant_does_not_become_zero() -> None:
    result = cast(graphs.product(weights(), scale=1e-12), FEEDS)
    assert result.model.graph.initializers["c"].dtype == ir.DataType.FLOAT


def test_tied_weights_are_stored_once(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    parent = exported("bert")
    result = cast(onnx_files.load(parent.root), graphs.feeds_of(parent, 2, 9))
    onnx_files.save(result.model, tmp_path)
    halved = onnx_files.describe(tmp_path).weight_bytes["float16"]
    single = onnx_files.describe(parent.root).weight_bytes["float32"]
    assert halved <= single / 2


def test_weights_are_those_of_the_checkpoint_rounded_once(tmp_path: Path) -> None:
    for dtype, numpy in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        result = cast(graphs.product(weights()), FEEDS, dtype=dtype)
        found = result.model.graph.initializers["w"].const_value
        assert found is not None
        assert np.array_equal(found.numpy(), weights().astype(numpy))


def test_bfloat16_needs_opset_13() -> None:
    with pytest.raises(UsageError, match="opset 11 have no bfloat16") as caught:
        cast(graphs.product(weights(), opset=11), FEEDS, dtype="bfloat16")
    assert "--opset 13" in caught.value.hint
    cast(graphs.product(weights(), opset=13), FEEDS, dtype="bfloat16")


def test_what_cannot_be_cast_is_refused() -> None:
    once = cast(graphs.product(weights()), FEEDS).model
    with pytest.raises(UsageError, match="float16 already"):
        cast(once, FEEDS)
    quantised = transforms.get("quantize").apply(
        graphs.product(weights()), {"scheme": "int8-dynamic", "samples": [FEEDS]}).model
    with pytest.raises(UsageError, match="quantised already"):
        cast(quantised, FEEDS)
    with pytest.raises(UsageError, match="no samples"):
        cast(graphs.product(weights()))
    with pytest.raises(UsageError, match="cannot cast to float8"):
        cast(graphs.product(weights()), FEEDS, dtype="float8")
