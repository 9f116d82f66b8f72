"""OpenVINO: the same artifacts, the precision read back, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelport import pipeline, runtimes
from modelport.artifacts import Artifact
from modelport.errors import BackendUnavailable, UsageError
from modelport.exporters.onnx import OnnxOptions

pytest.importorskip("openvino")

FEEDS = {
    "input_ids": np.arange(10, dtype=np.int64).reshape(2, 5) + 2,
    "attention_mask": np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int64),
    "token_type_ids": np.zeros((2, 5), np.int64),
}


def has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def artifact(tiny: Callable[..., Path], tmp_path: Path) -> Artifact:
    return pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out",
                           OnnxOptions(opset=14), validate=False)


def test_equal_to_onnx_runtime_at_several_shapes(artifact: Artifact) -> None:
    with runtimes.get("openvino").open(artifact) as ours, \
            runtimes.get("onnxruntime").open(artifact) as theirs:
        for rows in (2, 1):
            feeds = {name: value[:rows] for name, value in FEEDS.items()}
            expected = theirs.run(feeds)
            for name, value in ours.run(feeds).items():
                assert value.dtype == np.float32
                assert np.allclose(value, expected[name], rtol=1e-3, atol=1e-4)


def test_outputs_survive_the_next_run(artifact: Artifact) -> None:
    with runtimes.get("openvino").open(artifact) as session:
        first = session.run(FEEDS)["logits"]
        kept = first.copy()
        session.run({**FEEDS, "input_ids": FEEDS["input_ids"] + 20})
        assert np.array_equal(first, kept)
        session.bind(FEEDS)()


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
def test_the_precision_is_read_from_the_compiled_graph(artifact: Artifact) -> None:
    with runtimes.get("openvino").open(artifact) as session:
        assert "bf16" not in session.precisions()  # type: ignore[attr-defined]
        exact = session.run(FEEDS)["logits"]
    with runtimes.get("openvino").open(artifact, options={"precision": "bf16"}) as session:
        assert session.precisions()["bf16"] > 10  # type: ignore[attr-defined]
        rounded = session.run(FEEDS)["logits"]
    assert not np.array_equal(exact, rounded)
    assert np.allclose(exact, rounded, atol=0.1)


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
def test_bfloat16_goes_to_the_runtime_that_has_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    made = pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out",
                           OnnxOptions(opset=14, dtype="bf16"), validate=False)
    with pytest.raises(BackendUnavailable, match="lacks an operator") as caught:
        runtimes.get("onnxruntime").open(made)
    assert "openvino" in caught.value.hint
    with pipeline.open_session(made) as session:
        assert session.runtime == "openvino"
        assert np.isfinite(session.run(FEEDS)["logits"]).all()


def test_a_cpu_without_bfloat16_is_said_so(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport.runtimes import openvino as runtime

    monkeypatch.setitem(runtime.CAPABILITIES, "bf16", "BF17")
    with pytest.raises(BackendUnavailable, match="no bf16 arithmetic"):
        runtimes.get("openvino").open(artifact, options={"precision": "bf16"})


def test_what_it_refuses(artifact: Artifact) -> None:
    runtime = runtimes.get("openvino")
    assert runtime.unavailable("cuda")
    with pytest.raises(BackendUnavailable, match="cuda"):
        runtime.open(artifact, "cuda")
    with pytest.raises(UsageError, match="precision 'int4'"):
        runtime.open(artifact, options={"precision": "int4"})
