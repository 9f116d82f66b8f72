"""AOTInductor packages: one compiled here, the families with ``-m slow``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from typing import TYPE_CHECKING

import hand_made
import numpy as np
import pytest
import torch
from modelport import artifacts, checkpoints, exporters, pipeline, runtimes, validate
from modelport.errors import BackendUnavailable, ClaimError
from modelport.exporters.aotinductor import AOTInductorOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXPORTER = exporters.get("aotinductor")
COMPILER = shutil.which("g++") or shutil.which("clang++")
compiles = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 1)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(self.norm(self.table(ids))).squeeze(-1),)


def normed() -> checkpoints.LoadedModel:
    torch.manual_seed(0)
    return hand_made.loaded(Normed(), hand_made.spec(hand_made.IDS))


@compiles
@pytest.mark.timeout(600)
def test_a_package_is_what_was_asked_for_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(work / "unused"))
    model = normed()
    options = AOTInductorOptions()
    artifact = hand_made.written(EXPORTER, model, tmp_path / "out", options, "export")
    assert set(artifact.manifest.files) == {"model.pt2"}
    assert not [p for p in work.rglob("*") if p.is_file() and "precompiled" not in str(p)]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(work / "unused")
    assert "attention" not in artifact.manifest.facts  # nothing says that there is any
    target = artifact.manifest.target
    assert (target["device"], target["torch"]) == ("cpu", torch.__version__)
    assert target["machine"]
    with zipfile.ZipFile(artifact.root / "model.pt2") as file:
        name = next(n for n in file.namelist() if n.endswith("wrapper_metadata.json"))
        record = json.loads(json.loads(file.read(name))["modelport"])
    assert record["source"] == model.source.digest
    assert record["processor"] == dict(torch.cpu.get_capabilities())
    with runtimes.get("aotinductor").open(artifact) as session, torch.no_grad():
        for batch, length in ((1, 1), (8, 16), (1, 16), (3, 7)):
            feeds = hand_made.feeds(model.spec, batch=batch, length=length)
            expected = model.module(torch.from_numpy(feeds["ids"]))[0].numpy()
            np.testing.assert_allclose(session.run(feeds)["y"], expected, atol=1e-6)
    with pytest.raises(ClaimError, match=r"(?s)computes in float32.*bfloat16"):
        EXPORTER.read_back(model, artifact.root, AOTInductorOptions(dtype="bf16"))
    with pytest.raises(ClaimError, match="for cpu"):
        EXPORTER.read_back(model, artifact.root, AOTInductorOptions(device="cuda"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@compiles
@pytest.mark.parametrize(
    "kind",
    ["camembert", "distilbert", "albert", "mpnet", "deberta-v2", "gpt2", "t5", "vit", "resnet",
     "wav2vec2"],
)  # fmt: skip
def test_families_pass_parity(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.export("aotinductor", pipeline.ModelRequest(str(tiny(kind))), out, validate=False)
    report = pipeline.validate_artifact(out)
    assert report.accepted, "\n".join(r.reason for r in report.failures)


@pytest.mark.slow
@pytest.mark.timeout(900)
@compiles
def test_bfloat16_is_as_near_to_the_truth_as_eager_bfloat16(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = checkpoints.resolve(str(tiny("camembert")))
    options = AOTInductorOptions(dtype="bf16")
    model = checkpoints.load(checkpoint)
    artifact = hand_made.written(EXPORTER, model, tmp_path / "out", options, "export")
    assert [t.dtype for t in artifact.spec.outputs] == ["bfloat16"]
    assert artifact.manifest.facts["precision"] == "bfloat16"
    eager = runtimes.get("torch_eager")
    rounded = checkpoints.load_reference(checkpoint, dtype="float64")
    with torch.no_grad():
        for parameter in rounded.module.parameters():
            parameter.copy_(parameter.bfloat16())
    reference = checkpoints.load_reference(checkpoint, dtype="bfloat16", attention="sdpa")
    report = validate.judge(
        runtimes.get("aotinductor").open(artifact),
        eager.open(reference),
        eager.open(rounded),
        validate.plan(artifact.spec, max_seconds=60),
        spec=artifact.spec,
        settings=validate.Settings(
            gate="precision",
            parent=artifacts.ParitySummary("pass", "", {"translation": "pass"}, None, 1),
        ),
    )
    assert report.accepted, "\n".join(r.reason for r in report.failures)


def test_what_is_absent_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="CUDA"):
        EXPORTER.check(AOTInductorOptions(device="cuda"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"C\+\+ compiler"):
        EXPORTER.check(AOTInductorOptions())
