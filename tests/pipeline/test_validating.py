"""Any pair can be compared, and every outcome has its exit code and its report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from modelport import artifacts, checkpoints, pipeline, validate
from modelport.checkpoints import consent, hub
from modelport.cli import execute
from modelport.commands import _shared
from modelport.errors import UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import validating
from modelport.spec import ModelSpec
from tiny_models import edit_config, pickled


@pytest.fixture(scope="module")
def made(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``made(name, seed, **options)`` → an exported tiny BERT, not validated."""
    root = tmp_path_factory.mktemp("made")

    def get(name: str, seed: int = 0, **options: object) -> Path:
        out = root / name
        if not out.exists():
            request = pipeline.ModelRequest(str(tiny("bert", seed=seed)))
            pipeline.export("onnx", request, out, OnnxOptions(**options), validate=False)
        return out

    return get


SMALL = ["--batch-sizes", "1,3", "--seq-lens", "2,7"]


def test_two_artifacts_of_one_model_agree(made: Callable[..., Path]) -> None:
    pair = [str(made("opset-11", opset=11)), "--reference", str(made("opset-20", opset=20))]
    assert execute(["validate", *pair, *SMALL]) == 0


def test_two_artifacts_of_different_weights_do_not(made: Callable[..., Path]) -> None:
    pair = [str(made("opset-11", opset=11)), "--reference", str(made("other", seed=1))]
    assert execute(["validate", *pair, *SMALL]) == 3


def test_a_bare_onnx_file_against_a_model(
    made: Callable[..., Path], tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = str(made("opset-11", opset=11) / "model.onnx")
    assert execute(["validate", bare]) == 2
    assert "--reference MODEL" in capsys.readouterr().err
    assert execute(["validate", bare, "--reference", str(tiny("bert")), *SMALL]) == 0
    assert execute(["validate", bare, "--reference", str(tiny("bert", seed=1)), *SMALL]) == 3


def test_a_file_that_no_runtime_opens(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.txt").write_text("no model")
    arguments = ["validate", str(tmp_path / "model.txt"), "--reference", str(tiny("bert"))]
    assert execute(arguments) == 2
    assert ".onnx" in capsys.readouterr().err


def test_every_report_is_written(made: Callable[..., Path], tmp_path: Path) -> None:
    files = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "html", "markdown")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert execute(["validate", str(made("opset-11", opset=11)), *SMALL, *options]) == 0
    assert "<testsuite" in files["junit"].read_text()
    assert "<html" in files["html"].read_text()
    assert "parity pass" in files["markdown"].read_text()


@pytest.mark.parametrize("kind", ["junit", "html", "markdown"])
def test_a_report_without_a_directory_is_refused_before_any_work(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:
    monkeypatch.setattr(pipeline, "validate_artifact", lambda *_, **__: pytest.fail("it ran"))
    where = ["--" + kind, str(tmp_path / "missing" / "x")]
    assert execute(["validate", str(made("opset-11", opset=11)), *where]) == 2
    assert "missing is no directory" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("kind", "package"), [("junit", "junitparser"), ("html", "altair")])
def test_a_report_without_its_extra_is_refused_before_any_work(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str,
) -> None:
    monkeypatch.setattr(_shared, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline, "validate_artifact", lambda *_, **__: pytest.fail("it ran"))
    out = str(made("opset-11", opset=11))
    assert execute(["validate", out, "--" + kind, str(tmp_path / "x")]) == 6
    said = capsys.readouterr().err
    assert f"--{kind} needs {package}" in said
    assert "modelport[report]" in said


def test_a_narrowed_pass_is_not_recorded_and_a_full_one_is(made: Callable[..., Path]) -> None:
    out = made("recorded", opset=12)
    assert execute(["validate", str(out), *SMALL]) == 0
    assert artifacts.read(out).manifest.parity is None
    assert execute(["validate", str(out)]) == 0
    assert artifacts.read(out).manifest.proven


@pytest.mark.parametrize(("options", "code", "said"), [
    (["--runtime", "onnxrutime"], 2, "onnxruntime"),
    (["--device", "cuda"], 6, "modelport doctor"),
])
def test_what_cannot_be_run_here_is_no_verdict(
    made: Callable[..., Path], options: list[str], code: int, said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    from modelport.runtimes.onnxruntime import OnnxRuntime
    from modelport.runtimes.openvino import OpenVino

    for runtime in (OnnxRuntime, OpenVino):
        monkeypatch.setattr(runtime, "unavailable", lambda self, device="cpu":
                            "there is no GPU here" if device == "cuda" else None)
    out = made("unseen", opset=13)
    assert execute(["validate", str(out), *SMALL, *options]) == code
    assert said in capsys.readouterr().err
    assert artifacts.read(out).manifest.parity is None


@pytest.mark.parametrize("limit", [("--max-memory", "0.0005"), ("--max-seconds", "1")])
def test_a_pass_cut_short_is_not_published(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, limit: tuple[str, str],
) -> None:
    from modelport.validate.pace import Pace

    asked: Counter[Pace] = Counter()

    def refuse(self: Pace, size: int, *, essential: bool) -> str:
        asked[self] += 1
        return "no time is left" if asked[self] > 10 else ""

    if limit[0] == "--max-seconds":
        monkeypatch.setattr(Pace, "refuse", refuse)
    out, url = made(f"cut-short{limit[0]}", opset=13), f"file://{tmp_path}/models"
    assert execute(["validate", str(out), "--in-process", "--no-cache", *limit]) == 0
    assert artifacts.read(out).manifest.proven
    assert execute(["publish", str(out), url]) == 3
    assert "cut short" in capsys.readouterr().err
    monkeypatch.undo()
    # Limits that cost nothing which coverage rests on narrow nothing.
    assert execute(["validate", str(out), "--max-memory", "1.5", "--max-seconds", "500"]) == 0
    assert execute(["publish", str(out), url]) == 0
    # A pass cut short does not take the place of that one; a failure does.
    recorded = (out / artifacts.PARITY).read_bytes()
    report = pipeline.validate_artifact(out, limits=pipeline.Limits(max_seconds=1e-6))
    assert report.accepted
    assert report.narrowed
    assert report.notes[-1].startswith("not recorded")
    assert (out / artifacts.PARITY).read_bytes() == recorded


def test_the_reference_is_run_once_for_many_artifacts(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelport.runtimes.torch_eager import TorchSession

    runs = 0
    real = TorchSession._run

    def counted(self: TorchSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal runs
        runs += 1
        return real(self, feeds)

    monkeypatch.setattr(TorchSession, "_run", counted)
    limits = pipeline.Limits(sizes={"batch": (1, 3), "sequence": (2, 7)})

    def cost(name: str, **options: object) -> tuple[int, validate.ParityReport]:
        before = runs
        report = pipeline.validate_artifact(made(name, **options), limits=limits)
        return runs - before, report

    first, _ = cost("opset-11", opset=11)
    again, report = cost("opset-20", opset=20)
    assert first > 0
    assert again == 0
    assert report.comparisons
    # Gate B has a reference and a truth of its own; a stored run of float32 never stands in for
    # them. The effects are measured against the original, which is run once for each case too.
    half, report = cost("half", dtype="fp16")
    fewer, same = cost("half-again", dtype="fp16", opset=14)
    assert report.gates["precision"] == same.gates["precision"] == "pass"
    assert half > 2 * len(report.cases)
    assert fewer == 0
    assert report.worst_rho is not None
    assert report.worst_rho != 1.0


def test_your_own_inputs_are_compared(made: Callable[..., Path], tmp_path: Path) -> None:
    out = made("opset-11", opset=11)
    ids = np.full((2, 9), 5, dtype=np.int64)
    feeds = {name: np.zeros_like(ids) for name in artifacts.read(out).spec.input_names}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    np.savez(tmp_path / "mine.npz", **feeds)
    limits = pipeline.Limits(
        sizes={"batch": (1,), "sequence": (2,)}, inputs=tmp_path / "mine.npz"
    )
    report = pipeline.validate_artifact(out, limits=limits)
    assert report.accepted
    assert any(case.origin == "file" for case in report.cases)


@pytest.mark.parametrize("text", ["sqnr=30", "sqnr_db=loud", "nonsense", "agreement"])
def test_a_budget_that_says_nothing_is_refused(
    text: str, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["validate", str(made("opset-11", opset=11)), "--budget", text]) == 2
    assert "sqnr_db" in capsys.readouterr().err


def test_a_budget_is_not_held_against_an_artifact(
    made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(made("opset-11", opset=11))
    assert execute(["validate", out, "--reference", out, "--budget", "sqnr_db=40"]) == 2
    assert "--budget with --reference MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["modelport", "sentence-transformers", "timm"])
def test_another_version_has_no_stored_runs(
    package: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints.resolve(str(tiny("bert")))
    spec = ModelSpec((), ())

    def key() -> str:
        found = validating._cache(spec, None, checkpoint, "cpu", "float32")
        assert found is not None
        return found.source

    before, real = key(), metadata.version
    assert key() == before
    monkeypatch.setattr(
        metadata, "version", lambda name: "99" if name == package else real(name))
    assert key() != before


def test_a_budget_is_recorded_with_who_set_it(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "budget"
    file.write_text("sqnr_db = 40\nagreement_low = none\n")
    out = str(made("opset-11", opset=11))
    assert execute(["validate", out, *SMALL, "--json", "--budget", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["budget"]["set_by"] == "file"
    assert report["budget"]["sqnr_db"] == 40
    assert report["gates"]["effect"] == "pass"
    assert execute(["validate", out, *SMALL, "--budget", "sqnr_db=400"]) == 3


@pytest.mark.parametrize("sizes", ["0", "1,x", "-3", "1;2"])
def test_sizes_that_are_no_sizes(sizes: str, made: Callable[..., Path]) -> None:
    assert execute(["validate", str(made("opset-11", opset=11)), "--batch-sizes", sizes]) == 2


def with_code(source: Path, target: Path) -> Path:
    """A copy that wants to run Python of its own."""
    shutil.copytree(source, target)
    edit_config(target, auto_map={"AutoModelForMaskedLM": "modeling_mine.Mine"})
    code = "from transformers import BertForMaskedLM\n\n\nclass Mine(BertForMaskedLM):\n    pass\n"
    (target / "modeling_mine.py").write_text(code)
    return target


def test_code_of_its_own_has_no_stored_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    root = with_code(tiny("bert"), tmp_path / "model")
    request = pipeline.ModelRequest(str(root), trust_remote_code=True)
    pipeline.export("onnx", request, tmp_path / "out", validate=False)
    limits = pipeline.Limits(sizes={"batch": (3,), "sequence": (7,)})
    with consent.allowing(request.allowed):
        assert pipeline.validate_artifact(tmp_path / "out", limits=limits).accepted
    assert list((tmp_path / "cache").rglob("*.npz")) == []


def test_an_artifact_with_other_inputs_is_no_reference(
    made: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    vit = tmp_path / "vit"
    pipeline.export("onnx", pipeline.ModelRequest(str(tiny("vit"))), vit, validate=False)
    with pytest.raises(UsageError, match="pixel_values"):
        pipeline.validate_artifact(made("opset-11", opset=11), reference=vit)


def test_bisect_names_the_layer_on_the_command_line(
    made: Callable[..., Path],
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx

    wrong = onnx.load(made("opset-11", opset=11) / "model.onnx")
    next(n for n in wrong.graph.node if n.op_type == "Erf").op_type = "Tanh"
    onnx.save(wrong, tmp_path / "wrong.onnx")
    arguments = ["validate", str(tmp_path / "wrong.onnx"), "--reference", str(tiny("bert")),
                 *SMALL, "--bisect", str(tmp_path / "why")]  # fmt: skip
    assert execute(arguments) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "first wrong: bert.encoder.layer.0.intermediate.intermediate_act_fn" in said
    assert (tmp_path / "why" / "reproduce.py").exists()
    assert execute(arguments) == 2  # what was written is not overwritten

    def broken(*_: object, **__: object) -> None:
        raise UsageError("no way in")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.bisecting, "bisect", broken)
        assert execute([*arguments[:-1], str(tmp_path / "why-not"), "--json"]) == 3
    said, noted = capsys.readouterr()
    assert json.loads(said)["verdict"] == "fail", "one document"
    assert "not bisected: no way in" in noted
    artifact = str(made("opset-11", opset=11))
    assert execute(["validate", artifact, "--reference", artifact, "--bisect", "x"]) == 2


def test_a_pickle_is_converted_again_where_this_user_allows_it(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pickled(tiny("bert"), tmp_path / "source")
    out = pipeline.export("onnx", pipeline.ModelRequest(str(source), allow_pickle=True),
                          tmp_path / "out", validate=False).root
    assert execute(["validate", str(out), *SMALL]) == 4
    assert f"modelport validate {out} --allow-pickle" in capsys.readouterr().err
    assert execute(["validate", str(out), "--allow-pickle", *SMALL]) == 0


def test_a_reference_on_a_hub_is_taken_at_a_commit(
    made: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = with_code(tiny("bert"), tmp_path / "model")
    monkeypatch.setattr(hub, "fetch", lambda _, revision, **__: hub.Snapshot(root, revision))
    command = ["validate", str(made("opset-11", opset=11)), "--reference", "owner/mine",
               "--trust-remote-code", *SMALL]  # fmt: skip
    assert execute(command) == 4
    assert "try: --revision" in capsys.readouterr().err
    assert execute([*command, "--revision", "0" * 40]) == 0


@pytest.mark.parametrize("option", [("--revision", "main"), ("--weights", "random")])
def test_what_is_said_of_a_reference_goes_with_a_model(
    made: Callable[..., Path], option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = str(made("opset-11", opset=11))
    for reference in ((), ("--reference", artifact)):
        assert execute(["validate", artifact, *reference, *option]) == 2
        assert f"{option[0]} goes with a model" in capsys.readouterr().err


def test_a_source_out_of_reach_has_a_way_out_that_validate_knows(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(model: str, *_: object, **__: object) -> None:
        raise hub._unreachable(model, OSError("no network"))

    monkeypatch.setattr(hub, "fetch", gone)
    out = shutil.copytree(made("opset-11", opset=11), tmp_path / "out")
    manifest = artifacts.read(out).manifest
    source = dataclasses.replace(manifest.source, model="owner/gone")
    artifacts.write_manifest(out, dataclasses.replace(manifest, source=source))
    assert execute(["validate", str(out)]) == 6
    said = capsys.readouterr().err
    assert "HF_HOME" in said
    assert f"try: modelport validate {out} --reference DIRECTORY" in said
