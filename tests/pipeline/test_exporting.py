"""Composition: strategies in order, rejection, and a destination that is whole or absent."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelport import artifacts, pipeline, validate
from modelport.errors import (
    ClaimError,
    DestinationExists,
    ExportError,
    ParityError,
    StorageError,
    UsageError,
)
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import deriving


@pytest.fixture
def request_(tiny: Callable[..., Path]) -> pipeline.ModelRequest:
    return pipeline.ModelRequest(str(tiny("bert")))


def breaking(monkeypatch: pytest.MonkeyPatch, how: Callable[[Any, str], None]) -> list[str]:
    """Let ``how(graph, strategy)`` spoil each captured graph; returns the strategies tried."""
    from modelport.exporters import _onnx_capture

    tried: list[str] = []
    for strategy in ("trace", "dynamo"):
        capture = getattr(_onnx_capture, f"by_{strategy}")

        def spoiled(model: Any, opset: int, capture: Any = capture, name: str = strategy) -> Any:
            tried.append(name)
            graph = capture(model, opset)
            how(graph, name)
            return graph

        monkeypatch.setattr(_onnx_capture, f"by_{strategy}", spoiled)
    return tried


def test_the_cheapest_strategy_that_passes_is_kept(
    request_: pipeline.ModelRequest, tmp_path: Path
) -> None:
    artifact = pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(opset=18))
    assert [(a.strategy, a.outcome) for a in artifact.manifest.attempts] == [("trace", "kept")]
    assert artifact.manifest.proven
    assert artifacts.verify(tmp_path / "out") == artifact


def test_a_strategy_that_fails_gives_way_to_the_next(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_trace(graph: Any, strategy: str) -> None:
        if strategy == "trace":
            raise RuntimeError("no translation for aten::unheard_of")

    tried = breaking(monkeypatch, fail_trace)
    artifact = pipeline.export(
        "onnx", request_, tmp_path / "out", OnnxOptions(opset=18), validate=False
    )
    assert tried == ["trace", "dynamo"]
    first, second = artifact.manifest.attempts
    assert (first.strategy, first.outcome) == ("trace", "failed")
    assert "aten::unheard_of" in first.reason
    assert (second.strategy, second.outcome) == ("dynamo", "kept")
    assert artifact.manifest.facts["strategy"] == "dynamo"


def test_what_fails_parity_is_set_aside_with_its_report(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_gelu(graph: Any, strategy: str) -> None:
        for node in graph.graph.all_nodes():
            if node.op_type == "Erf":
                node.op_type = "Tanh"  # a wrong activation: finite, plausible, unequal

    breaking(monkeypatch, swap_gelu)
    out = tmp_path / "out"
    pipeline.export("onnx", request_, out, validate=False, options=OnnxOptions(strategy="dynamo"))
    before = artifacts.read(out).manifest.identity
    with pytest.raises(ParityError, match="no strategy passed parity") as caught:
        pipeline.export("onnx", request_, out, OnnxOptions(opset=11), force=True)
    assert "out.rejected" in caught.value.hint
    assert re.search(r"parity: fail, \w+: sample \d+: error .* times what is allowed",
                     str(caught.value))
    assert artifacts.read(out).manifest.identity == before
    rejected = artifacts.read(tmp_path / "out.rejected").manifest
    assert rejected.parity is not None
    assert rejected.parity.verdict == "fail"
    assert [a.outcome for a in rejected.attempts] == ["rejected"]
    assert json.loads((tmp_path / "out.rejected" / "parity.json").read_text())["verdict"] == "fail"


def test_what_fails_parity_is_kept_though_a_later_strategy_captures_nothing(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(graph: Any, strategy: str) -> None:
        if strategy != "trace":
            raise RuntimeError("no translation for aten::unheard_of")
        for node in graph.graph.all_nodes():
            if node.op_type == "Erf":
                node.op_type = "Tanh"

    tried = breaking(monkeypatch, spoil)
    monkeypatch.setattr("modelport.exporters.onnx.OnnxExporter.strategies",
                        lambda self, options: ("trace", "dynamo"))
    with pytest.raises(ParityError, match="no strategy passed parity") as caught:
        pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(opset=18))
    assert tried == ["trace", "dynamo"]
    assert caught.value.hint == f"modelport inspect {tmp_path / 'out.rejected'}"
    rejected = artifacts.read(tmp_path / "out.rejected")
    assert [a.outcome for a in rejected.manifest.attempts] == ["rejected", "failed"]
    assert rejected.manifest.facts["strategy"] == "trace"
    assert "parity: fail" in (tmp_path / "out.rejected" / "rejected.txt").read_text()
    assert set(rejected.manifest.files) <= {p.name for p in rejected.root.iterdir()}
    assert not [p for p in rejected.root.iterdir() if p.name.startswith(".")]
    assert not (tmp_path / "out").exists()


def test_a_strategy_that_passes_leaves_nothing_of_one_that_did_not(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(graph: Any, strategy: str) -> None:
        for node in graph.graph.all_nodes() if strategy == "trace" else ():
            if node.op_type == "Erf":
                node.op_type = "Tanh"

    breaking(monkeypatch, spoil)
    artifact = pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(opset=18))
    assert [a.outcome for a in artifact.manifest.attempts] == ["rejected", "kept"]
    assert {p.name for p in artifact.root.iterdir()} == {"manifest.json", *artifact.manifest.files}
    assert not (tmp_path / "out.rejected").exists()


def test_a_file_that_is_not_what_was_asked_for_is_no_success(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_opset(graph: Any, strategy: str) -> None:
        graph.graph.opset_imports[""] = 18

    breaking(monkeypatch, other_opset)
    with pytest.raises(ClaimError, match="the file has opset 18"):
        pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(opset=11))
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"] or not list(tmp_path.iterdir())


def test_a_frozen_axis_fails_the_attempt(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze(graph: Any, strategy: str) -> None:
        import onnx_ir as ir

        graph.graph.inputs[0].shape = ir.Shape((2, "sequence"))

    breaking(monkeypatch, freeze)
    with pytest.raises(ExportError, match="batch of input_ids came out static"):
        pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(opset=11))


def test_options_are_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    nowhere = pipeline.ModelRequest(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="opset 9"):
        pipeline.export("onnx", nowhere, tmp_path / "out", OnnxOptions(opset=9))


@pytest.mark.parametrize("optimize", ["none", "auto"])
@pytest.mark.parametrize(("field", "content", "said"), [
    ("budget", None, "is no limit of a budget"), ("budget", b"\xff\xfe", "cannot be read as text"),
    ("budget", b"sqnr = 3\n", "'sqnr = 3' is no limit"), ("texts", b"\n", "holds no text"),
    ("texts", None, "cannot be read as text"), ("texts", b"\xff\xfe", "cannot be read as text"),
])
def test_files_of_options_are_read_before_the_model_is_looked_for(
    field: str, content: bytes | None, said: str, optimize: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    options = OnnxOptions(optimize=optimize, **{field: str(file)})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        pipeline.export("onnx", pipeline.ModelRequest(str(tmp_path / "nowhere")),
                        tmp_path / "out", options)


def test_a_budget_lies_in_the_artifact_whatever_becomes_of_its_file(
    request_: pipeline.ModelRequest, tmp_path: Path
) -> None:
    file = tmp_path / "budget"
    file.write_text("sqnr_db = 30\nagreement_low = none\n")
    artifact = pipeline.export("onnx", request_, tmp_path / "out", OnnxOptions(budget=str(file)),
                               validate=False)
    expected = validate.read_budget(str(file))
    file.write_text("sqnr_db = 3\n")
    found = deriving.budget_of(artifact.manifest.options)
    assert found == dataclasses.replace(expected, set_by="export")
    assert (found.sqnr_db, found.agreement, found.agreement_low) == (30, 0.99, None)


def test_a_taken_destination_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not lose me")
    nowhere = pipeline.ModelRequest(str(tmp_path / "nowhere"))
    for force in (False, True):
        with pytest.raises(DestinationExists):
            pipeline.export("onnx", nowhere, tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_disk_that_is_full_leaves_nothing(
    request_: pipeline.ModelRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from modelport.artifacts import onnx_files

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_files, "copy_file", full)
    monkeypatch.setattr(onnx_files, "write_safetensors", full)
    out = tmp_path / "here" / "out"
    with pytest.raises(StorageError):
        pipeline.export("onnx", request_, out, validate=False)
    assert not list(out.parent.iterdir())


def test_default_output_names_model_and_format() -> None:
    request = pipeline.ModelRequest("some/where/camembert-base")
    assert pipeline.default_output(request, "onnx") == Path("out/camembert-base-onnx")


def test_the_same_request_gives_the_same_bytes(
    request_: pipeline.ModelRequest, tmp_path: Path
) -> None:
    made = [
        pipeline.export("onnx", request_, tmp_path / side / "out", validate=False)
        for side in ("a", "b")
    ]
    assert made[0].manifest.identity == made[1].manifest.identity


# Forks a child per round after the frameworks are imported, so that fifty kills take seconds.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from modelport import artifacts, checkpoints, pipeline
from modelport.exporters.onnx import OnnxOptions
import torch, transformers, torch.onnx, onnx, onnx_ir, onnxscript

model, out, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
request = pipeline.ModelRequest(model)
checkpoints.load(checkpoints.resolve(model))
chance = random.Random(0)

def child(opset):
    pid = os.fork()
    if pid:
        return pid
    pipeline.export("onnx", request, out, OnnxOptions(opset=opset), force=True, validate=False)
    os._exit(0)

os.waitpid(child(11), 0)
start = time.monotonic()
os.waitpid(child(12), 0)  # the second one knows its way: that is how long a round takes
whole = time.monotonic() - start
killed = 0
for number in range(rounds):
    pid = child(11 + number % 2)
    time.sleep(chance.random() * whole * 0.9)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status)
    artifacts.verify(out)
print(killed)
pipeline.export("onnx", request, out, OnnxOptions(opset=13), force=True, validate=False)
print(sorted(p.name for p in out.parent.iterdir() if p != out))
"""


def test_killed_at_random_moments_the_destination_verifies(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Fifty times; what a killed process left behind is swept by the next export."""
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tiny("bert")), str(out), "50"],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    killed, left = done.stdout.strip().splitlines()
    assert int(killed) >= 20  # else the kills came too late to test anything
    assert left == "[]"
    assert artifacts.verify(out).manifest.facts["opset"] == 13
