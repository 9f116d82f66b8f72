"""The layer that was spoilt is the layer that is named, and the reproduction shows it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mutants
import numpy as np
import pytest
import subjects
from modelport import pipeline, validate
from modelport.cli import execute
from modelport.errors import UsageError
from modelport.pipeline import ModelRequest, bisecting
from modelport.runtimes import _onnx_taps, _torch_taps
from subjects import FEW, Subject

NAMED = (
    "dropped bias", "transposed weight", "one weight NaN", "weight of another layer",
    "embedding channel x 1.01", "the other GELU", "LayerNorm eps 1e-3", "attention scale x 1.01",
    "softmax axis", "dropped residual", "dropped layer", "last LayerNorm skipped",
    "dropout left on",
)  # fmt: skip

Subjects = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    root = tmp_path_factory.mktemp("bisected")
    made: dict[str, Subject] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPORT_CACHE", str(root / "cache"))

        def get(kind: str) -> Subject:
            if kind not in made:
                made[kind] = subjects.subject(kind, root, sizes=FEW)
            return made[kind]

        yield get


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("name", NAMED)
def test_the_spoilt_layer_is_named(
    kind: str, name: str, subject: Subjects, tmp_path: Path
) -> None:
    where = subjects.spoilt_artifact(subject(kind), name, tmp_path / "out")
    found = bisecting.bisect(tmp_path / "out")
    assert found.layer == where.removeprefix("model.")
    assert found.kind == ("absent" if name in ("dropped layer", "last LayerNorm skipped")
                          else "layer")
    assert found.reason
    assert found.nodes
    assert found.before or name == "embedding channel x 1.01"


def test_a_correct_artifact_has_no_culprit(subject: Subjects) -> None:
    found = bisecting.bisect(subject("bert").artifact.root)
    assert (found.layer, found.kind) == (None, "none")
    assert found.compared > 30


def test_the_reproduction_runs_and_holds_the_spoilt_layer_alone(
    subject: Subjects, tmp_path: Path
) -> None:
    import onnx

    subjects.spoilt_artifact(subject("bert"), "the other GELU", tmp_path / "out")
    found = bisecting.bisect(tmp_path / "out", out=tmp_path / "repro")
    assert found.reproduction == str(tmp_path / "repro")
    graph = onnx.load(tmp_path / "repro" / "cut.onnx").graph
    assert len(graph.node) < 20
    assert not [i.name for i in graph.initializer if "layer.0" in i.name]
    run = subprocess.run([sys.executable, "reproduce.py"], cwd=tmp_path / "repro",
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert "FAIL encoder.layer.1.intermediate.intermediate_act_fn" in run.stdout
    shown = [line for line in run.stdout.splitlines() if "largest error" in line]
    assert [line.split(":")[0] for line in shown] == ["stored candidate", "cut graph run now"]
    assert "largest error 0 " not in run.stdout
    assert json.loads(found.to_json())["layer"] == found.layer


def test_a_node_that_raises_is_named_and_cut_out(subject: Subjects, tmp_path: Path) -> None:
    where = subjects.spoilt_artifact(subject("bert"), "frozen sequence", tmp_path / "out")
    found = bisecting.bisect(tmp_path / "out", out=tmp_path / "repro")
    assert found.layer is not None
    assert found.kind == "node"
    assert found.layer.replace("/", ".").startswith(f".{where}")
    run = subprocess.run([sys.executable, "reproduce.py"], cwd=tmp_path / "repro",
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode != 0
    assert "Reshape" in run.stderr


def test_a_node_that_the_runtime_made_up_is_named_and_not_cut_out(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise _onnx_taps.NodeFailedError("/attention/MatMulScaleFusion/", "no kernel")

    artifact = subject("bert").artifact
    monkeypatch.setattr(_onnx_taps.GraphTap, "run", fails)
    found = bisecting.bisect(artifact.root, out=tmp_path / "repro")
    assert (found.kind, found.layer) == ("node", "/attention/MatMulScaleFusion/")
    assert found.reproduction is None


def test_outputs_that_are_missing_need_no_search(subject: Subjects, tmp_path: Path) -> None:
    subjects.spoilt_artifact(subject("bert"), "missing output", tmp_path / "out")
    found = bisecting.bisect(tmp_path / "out")
    assert (found.layer, found.kind) == ("pooler_output", "output")


def test_a_mask_fault_is_found_in_a_padded_case(subject: Subjects, tmp_path: Path) -> None:
    subjects.spoilt_artifact(subject("bert"), "ignored attention mask", tmp_path / "out")
    found = bisecting.bisect(tmp_path / "out")
    assert found.layer == "encoder.layer.0.attention.self"
    assert " right " in found.case or " left " in found.case


def test_what_failed_on_given_inputs_is_looked_for_on_them(
    subject: Subjects, tmp_path: Path
) -> None:
    subjects.spoilt_artifact(subject("bert"), "softmax axis", tmp_path / "out")
    spec = subject("bert").artifact.spec
    np.savez(tmp_path / "mine.npz", **validate.draw(spec, validate.Case(
        (("batch", 2), ("sequence", 9)), seed=7)))
    limits = pipeline.Limits(sizes=FEW, inputs=tmp_path / "mine.npz", cache=False)
    report = pipeline.validate_artifact(tmp_path / "out", limits=limits)
    given = [case.label for case in report.cases if case.origin == "file"]
    report = dataclasses.replace(
        report, results=tuple(r for r in report.results if r.case in given))
    found = bisecting.bisect(tmp_path / "out", report=report, limits=limits)
    assert [found.case] == given
    assert found.layer == "encoder.layer.1.attention.self"


def test_the_view_names_the_layer(subject: Subjects, tmp_path: Path) -> None:
    from rich.console import Console

    subjects.spoilt_artifact(subject("bert"), "softmax axis", tmp_path / "out")
    console = Console(record=True, width=120, quiet=False)
    console.print(bisecting.bisect(tmp_path / "out").view())
    assert "first wrong: encoder.layer.1.attention.self" in console.export_text()


def test_a_bare_file_needs_a_reference(subject: Subjects, tmp_path: Path) -> None:
    one = subject("bert")
    mutants.spoil(one.artifact, "softmax axis", tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    with pytest.raises(UsageError, match="nothing of its source"):
        bisecting.bisect(file)
    request = ModelRequest(str(one.checkpoint.root), task=one.checkpoint.task)
    found = bisecting.bisect(file, reference=request)
    assert found.layer == "encoder.layer.1.attention.self"


def test_a_format_without_a_graph_says_so(
    tmp_path: Path, subject: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects.export(subject("bert").checkpoint, tmp_path / "out", "torchscript")
    with pytest.raises(UsageError, match="holds no graph"):
        bisecting.bisect(tmp_path / "out")
    monkeypatch.delattr(pipeline.validating, "validate_artifact")  # told before any work
    assert execute(["validate", str(tmp_path / "out"), "--bisect", str(tmp_path / "why")]) == 2


def test_scopes_of_repeated_calls_are_told_apart() -> None:
    import torch

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner[0](self.inner[0](x))

    module = Twice()
    found = _torch_taps.record(lambda: module(torch.ones(1, 2)))
    assert [c.scope for c in found.calls] == ["/inner.0", "/inner.0_1", ""]
    assert set(found.values) == {
        name + end for name in ("/inner.0", "/inner.0_1", "") for end in ("", _torch_taps.INPUT)}
