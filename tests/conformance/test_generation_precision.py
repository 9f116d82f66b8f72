"""Half precision and int8 apply graph by graph to models of several, and are proven like any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_bark
from modelport import artifacts, checkpoints, exporters, pipeline
from modelport.artifacts import Artifact
from modelport.errors import OpsetTooLow, UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import deriving

TASKS = {"t5": "text2text-generation", "whisper": "automatic-speech-recognition",
         "bark": "text-to-audio"}  # fmt: skip
SMALL = pipeline.Limits(sizes={"batch": (3,), "sequence": (1, 17), "past": (0, 7),
                               "source": (1, 9), "frames": (1, 9)})  # fmt: skip
EXPORTER = exporters.get("onnx")
Proven = Callable[[str], tuple[pipeline.ModelRequest, Artifact]]


@pytest.fixture(scope="module")
def proven(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Proven:
    """The float32 artifact of a kind with its verdict, at a few sizes, made once."""
    made: dict[str, tuple[pipeline.ModelRequest, Artifact]] = {}

    def get(kind: str) -> tuple[pipeline.ModelRequest, Artifact]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            source = (tiny_bark.build(place / "model") if kind == "bark" else
                      tiny(kind, TASKS[kind], **({"init_std": 0.4} if kind == "whisper" else {})))
            request = pipeline.ModelRequest(str(source), task=TASKS[kind])
            pipeline.export("onnx", request, place / "out", validate=False)
            report = pipeline.validate_artifact(place / "out", limits=SMALL)
            assert report.accepted, "\n".join(r.reason for r in report.failures)
            parent = artifacts.read(place / "out")
            artifacts.with_report(parent, artifacts.PARITY, report.to_json(),
                                  report.summary(parent.manifest.identity))
            made[kind] = request, artifacts.read(place / "out")
        return made[kind]

    return get


def derived(proven: Proven, kind: str, place: Path, options: OnnxOptions) -> Artifact:
    """What an export with these options makes of the float32 artifact."""
    request, parent = proven(kind)
    model = checkpoints.load(request.resolve())
    (step,) = EXPORTER.derivations(options)
    place.mkdir()
    return deriving.derive(EXPORTER, model, parent, place, step)


@pytest.mark.parametrize("kind", TASKS)
def test_float16_is_proven(kind: str, proven: Proven, tmp_path: Path) -> None:
    artifact = derived(proven, kind, tmp_path / "out", OnnxOptions(dtype="fp16"))
    facts = {name: found.facts["weight_bytes"]
             for name, found in artifact.manifest.components.items()}
    assert all(found.get("float16") for found in facts.values())
    report = pipeline.validate_artifact(tmp_path / "out", limits=SMALL)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert {"precision", "translation", "effect", "generation"} <= set(report.gates)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weights"])
def test_int8_is_proven_where_there_are_products(
    kind: str, scheme: str, proven: Proven, tmp_path: Path
) -> None:
    artifact = derived(proven, kind, tmp_path / "out", OnnxOptions(quantize=scheme))
    quantised = {name: sum(found.facts["quantised_products"].values())
                 for name, found in artifact.manifest.components.items()}
    # A table and a codec have no product with a constant matrix, and stay as they are.
    idle = {"embeddings", "codec"} & set(quantised)
    assert {name for name, count in quantised.items() if not count} == idle
    assert artifact.manifest.facts["precision"] == scheme
    report = pipeline.validate_artifact(tmp_path / "out", limits=SMALL)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert any("not what they generate together" in note for note in report.notes)


def test_a_convolution_in_bfloat16_names_the_opset(proven: Proven, tmp_path: Path) -> None:
    with pytest.raises(OpsetTooLow, match="have no bfloat16") as caught:
        derived(proven, "bark", tmp_path / "out", OnnxOptions(dtype="bf16"))
    assert caught.value.needed == 22


def test_nothing_to_quantise_at_all_is_an_error(
    proven: Proven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport.transforms import quantize

    monkeypatch.setattr(quantize, "layers", lambda model: [])
    with pytest.raises(UsageError, match="no product with a constant matrix"):
        derived(proven, "bark", tmp_path / "out", OnnxOptions(quantize="int8-dynamic"))
