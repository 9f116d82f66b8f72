"""TorchScript archives and AOTInductor packages through every command, right and tampered with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelport import artifacts, exporters, pipeline, validate
from modelport.cli import execute
from modelport.errors import BackendUnavailable

FILES = {"torchscript": "model.pt", "aotinductor": "model.pt2"}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(
    scope="module",
    params=["torchscript", pytest.param("aotinductor", marks=pytest.mark.slow)],
)
def proven(
    request: pytest.FixtureRequest,
    tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A proven artifact of one format."""
    exporter = exporters.get(request.param)
    try:
        exporter.check(exporter.options_type())
    except BackendUnavailable as absent:
        pytest.skip(str(absent))
    out = tmp_path_factory.mktemp(request.param) / "out"
    model = pipeline.ModelRequest(str(tiny("bert")))
    pipeline.export(request.param, model, out, exporter.options_type(), validate=False)
    assert pipeline.validate_artifact(out).accepted
    return out


def outputs(root: Path) -> dict[str, np.ndarray]:
    artifact, session = pipeline.open_artifact(root)
    with session:
        return session.run(validate.draw(artifact.spec, validate.plan(artifact.spec).cases[-1]))


def test_inspected_measured_published_pulled_and_verified(
    proven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["inspect", str(proven), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"]["parity"]["verdict"] == "pass"
    assert shown["manifest"]["facts"]["route"]
    run = tmp_path / "run"
    assert execute(["bench", str(proven), "--batch-sizes", "2", "--seq-lens", "5", "--rounds", "1",
                    "--seconds", "0.1", "--threads", "1", "--output", str(run), "--quiet"]) == 0
    cells = json.loads((run / "benchmark.json").read_text())["results"]
    assert cells
    assert all(cell["status"] == "ok" for cell in cells)
    store = f"file://{tmp_path}/store"
    assert execute(["publish", str(proven), store]) == 0
    assert execute(["pull", store, str(tmp_path / "pulled")]) == 0
    assert execute(["verify", str(tmp_path / "pulled")]) == 0
    there = outputs(tmp_path / "pulled")
    for name, value in outputs(proven).items():
        np.testing.assert_array_equal(there[name], value)


@pytest.mark.parametrize("command", ["verify", "validate", "bench", "publish", "run"])
def test_one_changed_byte_is_refused_by_every_command(
    command: str, proven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(proven, tmp_path / "copy"))
    path = out / FILES[artifacts.read(out).format]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    more = {
        "publish": [f"file://{tmp_path}/store"], "run": ["--text", "hello"],
        "bench": ["--batch-sizes", "1", "--seq-lens", "2", "--output", str(tmp_path / "run")],
    }  # fmt: skip
    assert execute([command, str(out), *more.get(command, [])]) == 4
    assert path.name in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", FILES)
def test_an_export_for_a_gpu_without_one(
    name: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--model", str(tiny("bert")), "--output", str(tmp_path / "out")]
    assert execute(["export", name, *arguments, "--device", "cuda"]) == 6
    said = capsys.readouterr().err
    assert "torch sees no CUDA device" in said
    assert "--device cpu" in said
    assert not (tmp_path / "out").exists()


def test_torchscript_on_a_python_without_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["--model", str(tiny("bert")), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    code = execute(["export", "torchscript", *arguments])
    monkeypatch.undo()
    assert code == 6
    said = capsys.readouterr().err
    assert "TorchScript does not exist on Python 3.14" in said
    assert "modelport export aotinductor" in said
    assert not (tmp_path / "out").exists()
