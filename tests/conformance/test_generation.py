"""One suite for every family that generates: exported, and proven part by part and end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from modelport import artifacts, pipeline

DECODERS = ("gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "phi")
SMALL = pipeline.Limits(sizes={"batch": (3,), "sequence": (1, 17), "past": (0, 7)})


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_is_proven(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = tiny(kind, "text-generation")
    artifact = pipeline.export("onnx", pipeline.ModelRequest(str(source)), out, validate=False)
    assert artifacts.verify(out) == artifact
    assert list(artifact.manifest.components) == ["decoder"]
    report = pipeline.validate_artifact(out, limits=SMALL)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert report.noise_floor
    assert report.gates == {"hygiene": "pass", "translation": "pass", "generation": "pass"}
    generated = {r.output for r in report.results if r.gate == "generation"}
    assert generated == {"greedy", "sampled 0", "sampled 1", "beams", "first logits"}
    steps = [c for c in report.cases if c.shape.startswith("part=steps")]
    assert {part for c in steps for part in c.shape.split() if part.startswith("steps=")} == {
        "steps=16"
    }


def test_the_verdict_is_recorded_for_the_whole(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In the flow, with every size; the graph is proven as any other."""
    out = tmp_path / "out"
    source = tiny("gpt2", "text-generation")
    pipeline.export("onnx", pipeline.ModelRequest(str(source)), out)
    manifest = artifacts.verify(out).manifest
    assert manifest.proven
    assert manifest.parity is not None
    assert manifest.parity.gates["generation"] == "pass"
    assert manifest.parity.comparisons > 1000


def test_a_decoder_of_other_weights_is_caught(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = tiny("llama", "text-generation")
    pipeline.export("onnx", pipeline.ModelRequest(str(source)), out, validate=False)
    other = pipeline.ModelRequest(str(tiny("llama", "text-generation", seed=1)))
    report = pipeline.validate_artifact(out, reference=other, limits=SMALL)
    assert report.verdict == "fail"
    assert report.gates["generation"] == "fail"
    assert report.gates["translation"] == "fail"


@pytest.mark.parametrize("name", ["torchscript", "aotinductor"])
def test_a_format_of_one_graph_says_so(
    name: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from modelport.errors import UsageError

    source = pipeline.ModelRequest(str(tiny("gpt2", "text-generation")))
    with pytest.raises(UsageError, match="holds one graph without a state") as caught:
        pipeline.export(name, source, tmp_path / "out")
    assert caught.value.allowed == "onnx"
    assert "--task feature-extraction" in caught.value.hint
