"""One suite for every exporter: what comes out is what was asked for, and equals the source."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelport import artifacts, exporters, pipeline, runtimes, validate
from modelport.errors import BackendUnavailable

KINDS = (
    "bert", "camembert", "distilbert", "albert", "electra", "mpnet", "deberta-v2",
    "gpt2", "vit", "resnet", "wav2vec2",
)  # fmt: skip
COMPILED = {"aotinductor"}  # half a minute of g++ per model: one by default, the rest with -m slow


def pairs() -> list[object]:
    return [
        pytest.param(
            name, kind, id=f"{name}-{kind}",
            marks=[pytest.mark.slow] if name in COMPILED and kind != "bert" else [],
        )
        for name in exporters.names()
        for kind in KINDS
    ]  # fmt: skip


def formats() -> list[object]:
    """Every format, for what is the same code in all: with -m slow where a compiler runs."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in COMPILED else [])
        for name in exporters.names()
    ]


Exported = Callable[[str, Path, Path], artifacts.Artifact]


@pytest.fixture
def exported(device: str) -> Exported:
    """Export without validation: the tests here validate in this process, which is faster."""

    def export(name: str, model: Path, out: Path) -> artifacts.Artifact:
        exporter = exporters.get(name)
        fields = {f.name for f in dataclasses.fields(exporter.options_type)}
        chosen = exporter.options_type(**({"device": device} if "device" in fields else {}))
        try:
            exporter.check(chosen)
        except BackendUnavailable as absent:
            pytest.skip(str(absent))
        return pipeline.export(
            name, pipeline.ModelRequest(str(model)), out, chosen, validate=False
        )

    return export


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_equal_to_the_source_at_shapes_never_traced(
    name: str, kind: str, tiny: Callable[..., Path], tmp_path: Path, exported: Exported,
    device: str,
) -> None:
    out = tmp_path / "out"
    artifact = exported(name, tiny(kind), out)
    assert artifacts.verify(out) == artifact
    assert artifact.manifest.parity is None
    report = pipeline.validate_artifact(out, device=device)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert report.noise_floor
    assert artifacts.verify(out).manifest.proven
    traced = artifact.manifest.facts["traced"]
    for dim, size in traced.items():
        assert [c for c in report.cases if f"{dim}={size}" not in c.shape.split()]


@pytest.mark.parametrize("name", formats())
def test_the_manifest_tells_the_whole_story(
    name: str, tiny: Callable[..., Path], tmp_path: Path, exported: Exported
) -> None:
    artifact = exported(name, tiny("bert"), tmp_path / "out")
    manifest = artifact.manifest
    assert manifest.format == name
    assert [a.outcome for a in manifest.attempts] == ["kept"]
    assert manifest.source.weights == "pretrained"
    assert len(manifest.source.digest) == 64
    assert "torch" in manifest.tools
    assert "config.json" in manifest.files
    assert set(manifest.files) == {
        p.relative_to(artifact.root).as_posix()
        for p in artifact.root.rglob("*") if p.is_file() and p.name != "manifest.json"
    }  # fmt: skip
    for tensor in (*manifest.spec.inputs, *manifest.spec.outputs):
        assert tensor.shape[0] == "batch"
    assert str(tmp_path) not in json.dumps(
        {k: v for k, v in json.loads((artifact.root / "manifest.json").read_text()).items()
         if k != "source"}
    )  # fmt: skip


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_checkpoints_become_float32_artifacts(
    name: str, stored: str, tiny: Callable[..., Path], tmp_path: Path, exported: Exported,
    device: str,
) -> None:
    out = tmp_path / "out"
    exported(name, tiny("bert", dtype=stored), out)
    report = pipeline.validate_artifact(out, device=device)
    assert report.accepted, "\n".join(r.reason for r in report.failures)


@pytest.mark.parametrize("name", formats())
def test_a_sharded_checkpoint_exports_like_a_single_file(
    name: str, tiny: Callable[..., Path], tmp_path: Path, exported: Exported, device: str
) -> None:
    feeds = None
    outputs = []
    for model in (tiny("bert", shards=3), tiny("bert")):
        exported(name, model, tmp_path / str(len(outputs)))
        artifact, session = pipeline.open_artifact(
            tmp_path / str(len(outputs)), device=device
        )
        with session:
            feeds = feeds or validate.draw(artifact.spec, validate.plan(artifact.spec).cases[0])
            outputs.append(session.run(feeds))
    for output, values in outputs[0].items():
        np.testing.assert_array_equal(values, outputs[1][output])


@pytest.mark.parametrize("name", exporters.names())
def test_every_option_has_help_and_a_default(name: str) -> None:
    exporter = exporters.get(name)
    assert exporter.name == name
    assert exporter.summary
    for field in dataclasses.fields(exporter.options_type):
        assert field.metadata.get("help"), f"{name}: {field.name} has no help"
    exporter.options_type()


@pytest.mark.parametrize("name", formats())
def test_a_wrong_graph_is_caught(
    name: str, tiny: Callable[..., Path], tmp_path: Path, exported: Exported, device: str
) -> None:
    """Export one set of weights, then judge against another: the validator must object."""
    out = tmp_path / "out"
    exported(name, tiny("bert"), out)
    other = pipeline.ModelRequest(str(tiny("bert", seed=1)))
    report = pipeline.validate_artifact(out, reference=other, device=device)
    assert report.verdict == "fail"
    assert artifacts.read(out).manifest.parity is None  # another reference is not recorded


def test_source_weights_that_changed_are_noticed(
    tiny: Callable[..., Path], tmp_path: Path, exported: Exported
) -> None:
    import shutil

    from modelport.errors import DigestMismatch

    model = tmp_path / "model"
    shutil.copytree(tiny("bert"), model)
    exported("onnx", model, tmp_path / "out")
    shutil.copy(tiny("bert", seed=1) / "model.safetensors", model)
    with pytest.raises(DigestMismatch, match="now has weights"):
        pipeline.validate_artifact(tmp_path / "out")


def test_every_format_has_a_runtime() -> None:
    for name in exporters.names():
        assert runtimes.for_format(name), f"nothing opens {name}"
