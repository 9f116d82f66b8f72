"""--optimize auto: what fails is dropped, the front is kept, the best is placed, and it goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from modelport import artifacts, checkpoints, exporters, pipeline, validate
from modelport.artifacts.manifest import Manifest, ParitySummary
from modelport.errors import (
    BackendUnavailable,
    ClaimError,
    ExportError,
    ModelportError,
    OpsetTooLow,
    ParityError,
    SpecError,
    StorageError,
    UsageError,
)
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import deriving, figures, searching
from modelport.pipeline.searching import Trial
from modelport.pipeline.validator import Validator
from modelport.runtimes import benchmark

FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"


def measured(name: str, latency: float, rows: float, size: int, peak: int) -> Trial:
    return Trial(name, {}, "measured", "", "onnxruntime", size, latency, rows, peak)


TRIALS = searching._with_front([
    measured("plain", 0.010, 100, 400, 900),
    measured("int8", 0.004, 300, 100, 600),
    measured("half", 0.012, 90, 200, 500),
    measured("same as int8", 0.004, 300, 100, 600),
    Trial("broken", {}, "rejected", "parity: fail"),
])


def test_the_front_is_what_nothing_beats_in_everything() -> None:
    assert [t.name for t in TRIALS if t.front] == ["int8", "half", "same as int8"]


@pytest.mark.parametrize(("objective", "name"), [
    ("latency", "int8"), ("throughput", "int8"), ("size", "int8"), ("memory", "half")])
def test_the_best_for_an_objective(objective: str, name: str) -> None:
    best, why = searching.choose(TRIALS, objective)
    assert best.name == name
    assert "of 3 on the front" in why
    assert "% behind" in why


def test_how_far_the_next_is_behind() -> None:
    two = searching._with_front([measured("a", 1.0, 100, 2, 2), measured("b", 2.0, 125, 1, 1)])
    assert searching.choose(two, "latency")[1].endswith("next is b, 100.0 % behind")
    assert searching.choose(two, "throughput")[1].endswith("next is a, 20.0 % behind")


def test_nothing_to_choose_from() -> None:
    with pytest.raises(UsageError, match="objective 'beauty'"):
        searching.choose(TRIALS, "beauty")
    failed, late = Trial("absent", {}, "failed", "x"), Trial("late", {}, "left out", "time")
    for trials in (TRIALS[-1:], [TRIALS[-1], failed]):
        with pytest.raises(ParityError, match="broken: parity: fail") as caught:
            searching.choose(trials, "latency")
        assert "--budget" in caught.value.hint
    for trials in ([failed], [TRIALS[-1], late]):
        with pytest.raises(ExportError, match="no combination") as longer:
            searching.choose(trials, "latency")
        assert "--search-seconds" in longer.value.hint


def test_a_search_covers_graphs_and_precisions_unless_one_is_asked_for() -> None:
    exporter = exporters.get("onnx")
    every = exporter.candidates(OnnxOptions(optimize="auto", opset="auto"))
    assert len(every) == len(set(every)) == 21
    assert {o.opset for o in every} == {17}
    assert not any(o.optimize == "auto" for o in every)
    asked = exporter.candidates(OnnxOptions(optimize="auto", dtype="fp16"))
    assert {(o.dtype, o.quantize) for o in asked} == {("fp16", "none")}
    assert exporter.candidates(OnnxOptions(optimize="fuse")) == ()
    with pytest.raises(UsageError, match="0 seconds"):
        exporter.check(OnnxOptions(search_seconds=0))


def test_a_search_needs_its_gates(tiny: Callable[..., Path], tmp_path: Path) -> None:
    options = OnnxOptions(optimize="auto")
    request = pipeline.ModelRequest(str(tiny("bert")))
    with pytest.raises(UsageError, match="cannot do without"):
        pipeline.export("onnx", request, tmp_path / "out", options, validate=False)
    assert list(tmp_path.glob("out*")) == []


def test_a_search_measures_calls_or_tokens() -> None:
    def model(*parts: str) -> Any:
        return SimpleNamespace(parts=dict.fromkeys(parts))

    for parts in ((), ("decoder",), ("encoder", "cross", "decoder")):
        figures.require_measurable(model(*parts))
    with pytest.raises(UsageError, match="this one is semantic, coarse"):
        figures.require_measurable(model("semantic", "coarse"))


@pytest.mark.parametrize(("compared", "full", "chosen", "reason"), [
    (9, "pass", "int8-dynamic", ""),
    (9, "fail", "simplify", "proven in full: parity: fail"),
    (0, "fail", "simplify", "quantize: parity: fail"),  # no case in time: in full at once
    (0, "pass", "int8-dynamic", ""),
])
def test_less_precise_is_tried_within_a_limit_and_placed_only_if_proven_in_full(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    compared: int, full: Any, chosen: str, reason: str,
) -> None:
    exporter = exporters.get("onnx")
    plain = OnnxOptions(budget="sqnr_db=0,agreement=0,agreement_low=0")
    candidates = (plain, dataclasses.replace(plain, optimize="simplify"),
                  dataclasses.replace(plain, quantize="int8-dynamic"))
    monkeypatch.setattr(type(exporter), "candidates", lambda self, options:
                        candidates if options.optimize == "auto" else ())
    judged: list[tuple[str, float | None]] = []

    def verdict(_: Validator, root: Path, max_seconds: float | None = None) -> Manifest:
        manifest = artifacts.read(root).manifest
        judged.append((manifest.facts.get("precision", "float32"), max_seconds))
        kind = full if judged[-1] == ("int8-dynamic", None) else "pass" if compared else "fail"
        kind = "pass" if judged[-1][0] == "float32" else kind
        parity = ParitySummary(kind, manifest.identity, {"translation": kind}, None,
                               9 if max_seconds is None else compared)
        return artifacts.write_manifest(
            root, dataclasses.replace(manifest, parity=parity)).manifest

    def figured(_: Any, made: Any, *rest: Any) -> dict[str, figures.Figures]:
        return {name: figures.Figures("onnxruntime", 1 / len(name), len(name), 1) for name in made}

    monkeypatch.setattr(Validator, "validate", verdict)
    monkeypatch.setattr(figures, "measure", figured)
    request, out = pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out"
    made = pipeline.export("onnx", request, out, OnnxOptions(optimize="auto"))
    assert judged == [("float32", None), ("float32", None),
                      ("int8-dynamic", searching.PROOF_SECONDS), ("int8-dynamic", None)]
    table = made.manifest.facts["search"]
    assert table["chosen"] == chosen
    assert {t["name"]: t["reason"] for t in table["trials"]}["int8-dynamic"] == reason
    assert made.manifest.proven
    assert list((tmp_path / "out.search").glob("*.tried")) == []


@pytest.mark.parametrize("opset", ["auto", 17])
def test_an_opset_that_is_left_open_is_raised_for_the_trials_that_need_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: Any
) -> None:
    """As a convolution in bfloat16 does, which wants 22."""
    exporter = exporters.get("onnx")
    candidates = OnnxOptions(), OnnxOptions(dtype="bf16")
    monkeypatch.setattr(type(exporter), "candidates", lambda self, options:
                        candidates if options.optimize == "auto" else ())

    def verdict(_: Validator, root: Path, max_seconds: float | None = None) -> Manifest:
        manifest = artifacts.read(root).manifest
        parity = ParitySummary("pass", manifest.identity, {"translation": "pass"}, None, 9)
        return artifacts.write_manifest(
            root, dataclasses.replace(manifest, parity=parity)).manifest

    monkeypatch.setattr(Validator, "validate", verdict)
    monkeypatch.setattr(figures, "measure", lambda _, made, *rest: {
        name: figures.Figures("onnxruntime", 1 / len(name), 1, 1) for name in made})
    made = pipeline.export("onnx", pipeline.ModelRequest(str(tiny("resnet"))), tmp_path / "out",
                           OnnxOptions(optimize="auto", opset=opset))
    table = made.manifest.facts["search"]
    trials = {t["name"]: (t["outcome"], t["options"].get("opset")) for t in table["trials"]}
    assert trials["plain"] == ("measured", None)
    assert trials["bf16"] == (("measured", 22) if opset == "auto" else ("failed", None))
    for place in (tmp_path / "out.search").glob("*/manifest.json"):
        manifest = artifacts.read(place.parent).manifest
        assert [a.options["opset"] for a in manifest.lineage] in ([], [22])
    assert not list((tmp_path / "out.search").glob("*.failed"))


@pytest.mark.parametrize(("error", "remembered"), [
    (ExportError("x"), True), (UsageError("x"), True), (ClaimError("x"), True),
    (SpecError("x"), True), (ValueError("x"), True), (OpsetTooLow("x", needed=22), False),
    (ModelportError("the validating process ended with status -9"), False),
    (BackendUnavailable("x"), False), (StorageError("x"), False), (ParityError("x"), False),
    (MemoryError("x"), False), (OSError("x"), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
], ids=lambda value: type(value).__name__)
def test_what_may_pass_is_tried_again(
    error: Exception, remembered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work: Any = searching.Search.__new__(searching.Search)
    work._exporter, work._workshop, work._source = exporters.get("onnx"), tmp_path, []
    options = OnnxOptions(dtype="fp16")
    parent = work._place(work._exporter.base(options))
    monkeypatch.setattr(searching, "_found", lambda place: place == parent or None)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(searching.Search, "_derived", fails)
    with pytest.raises(ModelportError, match=r"x|status -9|memory"):
        work._artifact(options, work._exporter.derivations(options))
    assert [p.suffix for p in tmp_path.glob("[0-9a-f]*.*")] == [".failed"] * remembered


@pytest.mark.parametrize(("shown", "left", "untold"), [
    ("part=decoder batch=1", "part=decoder batch=3", False),
    ("part=decoder batch=1", "part=steps batch=3", True),
    ("batch=1", "batch=3", False),
    (None, "batch=3", True),
])
def test_a_trial_of_which_a_part_was_not_compared_is_no_verdict(
    tmp_path: Path, shown: str | None, left: str, untold: bool
) -> None:
    place = shutil.copytree(FROZEN, tmp_path / "place")
    (place / artifacts.PARITY).unlink(missing_ok=True)
    assert not searching._untold(place), "no report says that anything was left out"
    results = [validate.Result(shown, "logits", "translation", "pass", samples=1)] if shown else []
    report = validate.ParityReport("fail", {}, validate.Rule(), True, 1, (), tuple(results),
                                   (validate.LeftOut(left, "no time"),))
    (place / artifacts.PARITY).write_text(report.to_json())
    assert searching._untold(place) == untold


def test_what_is_found_again_is_of_the_same_model_task_and_files(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    exporter = exporters.get("onnx")
    model = shutil.copytree(tiny("bert"), tmp_path / "model")
    texts = tmp_path / "texts"
    texts.write_text("one")
    options = OnnxOptions(quantize="int8-static", texts=str(texts))

    def place(task: str = "fill-mask", *, own: bool = False) -> str:
        loaded = checkpoints.load(pipeline.ModelRequest(str(model), task=task).resolve())
        origin = dataclasses.replace(loaded.checkpoint.origin, remote_code=own)
        loaded = dataclasses.replace(
            loaded, checkpoint=dataclasses.replace(loaded.checkpoint, origin=origin))
        search = searching.Search(exporter, pipeline.ModelRequest(str(model)), loaded,
                                  options, tmp_path / "work", 1, Validator(), print)
        return search._place(options).name

    first = place()
    assert place() == first
    others = [place("feature-extraction"), place(own=True)]
    texts.write_text("two")
    others.append(place())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    others.append(place())
    assert len({first, *others}) == 5


@pytest.mark.parametrize("own", [False, True])
def test_a_search_of_code_of_ones_own_begins_anew(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    exporter = exporters.get("onnx")
    monkeypatch.setattr(type(exporter), "candidates", lambda self, options:
                        (OnnxOptions(),) if options.optimize == "auto" else ())
    monkeypatch.setattr(checkpoints.Checkpoint, "own_code", own)
    monkeypatch.setattr(figures, "measure", lambda _, made, *rest: {
        name: figures.Figures("onnxruntime", 1, 1, 1) for name in made})
    exports: list[Path] = []

    def verdict(_: Validator, root: Path, max_seconds: float | None = None) -> Manifest:
        exports.append(root)
        manifest = artifacts.read(root).manifest
        parity = ParitySummary("pass", manifest.identity, {"translation": "pass"}, None, 9)
        return artifacts.write_manifest(
            root, dataclasses.replace(manifest, parity=parity)).manifest

    monkeypatch.setattr(Validator, "validate", verdict)
    request, out = pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out"
    work, old = tmp_path / "out.search", "0123456789abcdef"
    for name in (f"{old}/x", f"{old}.rejected/x", "measured/x", "mine/x"):
        (work / name).mkdir(parents=True)
    for name in (f"{old}.tried", f"{old}.failed", "notes"):
        (work / name).touch()
    for _ in range(2):
        pipeline.export("onnx", request, out, OnnxOptions(optimize="auto"), force=True)
    assert len(exports) == (2 if own else 1)
    left = {place.name for place in work.glob("[!.]*")}
    left -= {exports[-1].name.split(".")[1]}  # staged as .NAME.partial-…
    assert left == ({"mine", "notes"} if own else {
        old, f"{old}.rejected", f"{old}.tried", f"{old}.failed", "measured", "mine", "notes"})


def test_what_a_kill_left_unproven_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(FROZEN, tmp_path / "place")
    artifact = artifacts.read(place)
    work: Any = searching.Search.__new__(searching.Search)
    work._validator = Validator()

    def verdict(kind: Any) -> Callable[..., Manifest]:
        manifest = artifacts.read(place).manifest
        parity = ParitySummary(kind, manifest.identity, {"translation": kind}, None, 9)
        return lambda *_: artifacts.write_manifest(
            place, dataclasses.replace(manifest, parity=parity)).manifest

    verdict("pass")()
    found = searching._found(place)
    assert found is not None
    assert found.manifest.proven
    assert searching._found(tmp_path / "absent") is None

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    searching._tried(place).touch()
    monkeypatch.setattr(Validator, "validate", verdict("fail"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            work.proven(artifact)
    assert searching._tried(place).exists()
    assert searching._found(place) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_of_a_model_that_generates(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = exporters.get("onnx")
    plain = OnnxOptions()
    candidates = (plain, dataclasses.replace(plain, optimize="fuse"))
    monkeypatch.setattr(type(exporter), "candidates", lambda self, options:
                        candidates if options.optimize == "auto" else ())
    monkeypatch.setattr(searching, "ROUNDS", 1)
    monkeypatch.setattr(figures, "TOKENS", 4)
    request, out = pipeline.ModelRequest(str(tiny("gpt2", "text-generation"))), tmp_path / "out"
    made = pipeline.export("onnx", request, out, OnnxOptions(optimize="auto"))
    trials = {t["name"]: t for t in made.manifest.facts["search"]["trials"]}
    assert {name: t["outcome"] for name, t in trials.items()} == {
        "plain": "measured", "fuse": "measured"}
    assert all(t["latency_s"] > 0 and t["rows_per_s"] > 0 and t["peak_bytes"] > 1e7
               for t in trials.values())
    assert trials["plain"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert made.manifest.proven
    assert set(made.manifest.components) == {"decoder"}


@pytest.mark.slow
def test_a_search_from_end_to_end_and_again(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = exporters.get("onnx")
    plain = OnnxOptions(budget="sqnr_db=60")  # int8 cannot hold that
    candidates = (plain, dataclasses.replace(plain, optimize="simplify"),
                  dataclasses.replace(plain, quantize="int8-dynamic"))
    monkeypatch.setattr(type(exporter), "candidates", lambda self, options:
                        candidates if options.optimize == "auto" else ())
    monkeypatch.setattr(figures, "SAMPLING", benchmark.Sampling(1, 5, 3, 0.2))
    monkeypatch.setattr(deriving, "MOST_KEPT", 0)
    request, out = pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out"
    options = OnnxOptions(optimize="auto", objective="size", search_seconds=1)

    # The time is over once the plain export is done, which is measured all the same.
    first = pipeline.export("onnx", request, out, options)
    outcomes = {t["name"]: t["outcome"] for t in first.manifest.facts["search"]["trials"]}
    assert outcomes == {"plain": "measured", "simplify": "left out", "int8-dynamic": "left out"}
    assert first.manifest.facts["search"]["chosen"] == "plain"
    assert first.manifest.proven

    more = dataclasses.replace(options, search_seconds=600)
    again: list[str] = []
    export = pipeline.exporting.export
    monkeypatch.setattr(pipeline.exporting, "export",
                        lambda *a, **k: again.append("plain") or export(*a, **k))
    monkeypatch.setattr(searching, "ROUNDS", 2)
    second = export("onnx", request, out, more, force=True)
    assert again == [], "the plain export was there"
    table = second.manifest.facts["search"]
    assert {t["name"]: t["outcome"] for t in table["trials"]} == {
        "plain": "measured", "simplify": "measured", "int8-dynamic": "rejected"}
    assert table["chosen"] in [t["name"] for t in table["trials"] if t["front"]]
    assert all(t["latency_s"] > 0 and t["rows_per_s"] > 0 and t["peak_bytes"] > 1e7
               for t in table["trials"] if t["outcome"] == "measured")
    assert second.manifest.proven
    assert artifacts.verify(out).manifest == second.manifest
    told = " ".join(a.reason for a in second.manifest.attempts)
    assert "ms a row alone" in told
    assert table["why"] in told
    kept = [p for p in (tmp_path / "out.search").iterdir() if (p / "manifest.json").exists()]
    front = [t for t in table["trials"] if t["front"]]
    assert len([p for p in kept if p.suffix != ".rejected"]) == len(front)
