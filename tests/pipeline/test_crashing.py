"""A real archive that ends its process in one shape and never returns in another."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelport import artifacts, pipeline
from modelport.cli import execute
from modelport.pipeline.subjects import of_artifact

SIZES = ["--batch-sizes", "1", "--seq-lens", "2,7,11", "--case-seconds", "2"]


class Treacherous(torch.nn.Module):
    """Right, but for two lengths."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor]:
        length = input_ids.size(1)
        if length == 7:  # an alias far beyond the memory that there is, read to its end
            mask = torch.ops.aten._reshape_alias(attention_mask, [1 << 40], [1])
            attention_mask = attention_mask + mask.sum()
        while length == 11 and bool((input_ids >= 0).all()):
            input_ids = input_ids * 3 % 7
        return self.inner(input_ids, attention_mask, token_type_ids)


@pytest.fixture
def treacherous(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A TorchScript artifact whose digests are in order."""
    out = tmp_path / "out"
    request = pipeline.ModelRequest(str(tiny("bert")))
    artifact = pipeline.export("torchscript", request, out, validate=False)
    extra = {"modelport.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.load(str(out / "model.pt"), _extra_files=extra)
        scripted = torch.jit.script(Treacherous(inner))
        torch.jit.save(scripted, str(out / "model.pt"), _extra_files=extra)
    manifest = dataclasses.replace(artifact.manifest, files=artifacts.collect(out))
    (out / artifacts.MANIFEST).unlink()
    artifacts.write_manifest(out, manifest)
    return out


@pytest.mark.timeout(300)
def test_its_cases_fail_and_the_rest_goes_on(
    treacherous: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "report.xml"
    arguments = ["validate", str(treacherous), *SIZES, "--json", "--junit", str(junit),
                 "--budget", "sqnr_db=1"]
    assert execute(arguments) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "fail"
    shapes = {case["label"]: case["shape"] for case in report["cases"]}
    reasons: dict[str, list[str]] = {}
    for result in report["results"]:
        if result["verdict"] != "pass":
            length = shapes[result["case"]].rpartition("=")[2]
            reasons.setdefault(length, []).append(result["reason"])
    assert set(reasons) == {"7", "11"}
    assert set(reasons["7"]) == {"the model's process ended: signal 11"}
    assert any("no result within 2 s; the process was ended" in r for r in reasons["11"])
    passed = [r for r in report["results"] if r["verdict"] == "pass"]
    assert {shapes[r["case"]] for r in passed} == {"batch=1 sequence=2"}
    assert report["comparisons"]
    assert "no effects were measured, since Gate 0 does not pass" in report["notes"]
    assert "signal 11" in junit.read_text()
    assert artifacts.read(treacherous).manifest.parity is not None
    assert not artifacts.read(treacherous).manifest.proven


def test_what_opens_an_artifact_can_be_called_in_another_process(treacherous: Path) -> None:
    import pickle

    subject = of_artifact(treacherous)
    again = pickle.loads(pickle.dumps(subject.open))
    with again() as session:
        assert session.spec == subject.spec
