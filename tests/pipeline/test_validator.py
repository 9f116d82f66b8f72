"""The process that validates: started ahead, one for several artifacts, its errors and its end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from modelport import artifacts, checkpoints, pipeline
from modelport.artifacts import Artifact
from modelport.checkpoints.model import IN_MEMORY
from modelport.errors import DigestMismatch, ModelportError
from modelport.pipeline import validator
from modelport.pipeline.validator import Validator


@pytest.fixture
def exported(tiny: Callable[..., Path], tmp_path: Path) -> Artifact:
    """An artifact that nobody has validated, of a checkpoint beside it."""
    model = shutil.copytree(tiny("bert"), tmp_path / "model")
    return pipeline.export("onnx", pipeline.ModelRequest(str(model)), tmp_path / "out",
                           validate=False)


def of(ours: Validator) -> int:
    assert ours._process is not None
    return ours._process.pid


def stored() -> int:
    return len(list(checkpoints.cache_root().glob("reference/*/*.npz")))


def ahead(ours: Validator, artifact: Artifact) -> None:
    source = artifact.manifest.source
    ours.start(source.model)
    ours.prepare(pipeline.ModelRequest.of(source).resolve(), "onnx", "cpu")


def test_one_process_validates_several_and_says_what_it_is_at(exported: Artifact) -> None:
    said: list[str] = []
    with Validator(said.append) as ours:
        assert ours.validate(exported.root).proven
        first = of(ours)
        assert ours.validate(exported.root, max_seconds=60).proven
        assert of(ours) == first
    assert any("truth" in text for text in said)
    assert any("compare" in text for text in said)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_the_original_is_run_before_there_is_an_artifact(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    task = "text2text-generation" if kind == "t5" else None
    made = pipeline.export("onnx", pipeline.ModelRequest(str(tiny(kind)), task=task),
                           tmp_path / "out", validate=False)
    said: list[str] = []
    with Validator(said.append) as ours:
        ahead(ours, made)
        assert ours.validate(made.root).proven
    report = pipeline.parity_report(artifacts.read(made.root))
    assert report is not None
    # Of every case both sides, no run twice, and none that validation had no use for.
    parts = list(made.manifest.components) or [""]
    planned = [case for case in report.cases
               if any(case.shape.startswith(f"part={part} ") for part in parts) or parts == [""]]
    assert stored() == 2 * len(planned) > 0
    sides = {side for side, text in report.sides.items() if text == "stored runs"}
    assert sides == {f"{part} {side}".strip() for part in parts
                     for side in ("truth", "reference")}


@pytest.mark.parametrize("why", ["size", "device", "code"])
def test_an_original_that_is_not_run_ahead_is_left_for_later(
    exported: Artifact, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "size":
        monkeypatch.setattr(validator, "SMALL", 1000)
    sent: list[dict[str, object]] = []
    monkeypatch.setattr(Validator, "_send", lambda self, request: sent.append(request))
    with Validator() as ours:
        ours.start(exported.manifest.source.model)
        checkpoint = pipeline.ModelRequest.of(exported.manifest.source).resolve()
        if why == "code":  # its runs are not stored
            origin = dataclasses.replace(checkpoint.origin, remote_code=True)
            checkpoint = dataclasses.replace(checkpoint, origin=origin)
        ours.prepare(checkpoint, "onnx", "cuda" if why == "device" else "cpu")
    assert sent == [{"format": "onnx", "origin": None, "generates": False}]


def test_what_fails_there_is_raised_here(exported: Artifact, tmp_path: Path) -> None:
    with Validator() as ours:
        ahead(ours, exported)
        path = exported.root / "model.onnx"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(DigestMismatch, match=r"model\.onnx"):
            ours.validate(exported.root)
        shutil.rmtree(tmp_path / "model")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelportError, match="cannot be read") as caught:
            ours.validate(exported.root)
        assert "--reference" in caught.value.hint


def test_what_nobody_raised_on_purpose_brings_its_traceback(
    exported: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(validator, "_validate", broken)
    said = io.StringIO()
    validator._answered(said, {"validate": ".", "device": "cpu", "max_seconds": None})
    monkeypatch.setattr(Validator, "_answer", lambda _: json.loads(said.getvalue()))
    with Validator() as ours, pytest.raises(ModelportError) as caught:
        ours.validate(exported.root)
    assert caught.value.found == "unexpected KeyError: 'surprise'"
    assert "in broken" in caught.value.__notes__[0]


def test_who_asks_on_the_terminal_gets_no_request() -> None:
    """transformers asks there whether it may run code."""
    request = {"validate": ".", "device": "cpu", "max_seconds": None, "consent": {}}
    done = subprocess.run(
        [sys.executable, "-c", "from modelport.pipeline import validator\n"
         "validator._validate = lambda *_, **__: input()\nvalidator.serve()"],
        input=f"{json.dumps(request)}\n" * 3, capture_output=True, text=True, check=True,
        timeout=100)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["error"]["found"].split(":")[0] for answer in answers] == [
        "unexpected EOFError"] * 3


def test_after_its_end_another_takes_its_place(exported: Artifact) -> None:
    with Validator() as ours:
        ahead(ours, exported)
        os.kill(of(ours), signal.SIGKILL)
        with pytest.raises(ModelportError, match="ended with status -9"):
            ours.validate(exported.root)
        assert ours.validate(exported.root).proven
        os.kill(of(ours), signal.SIGKILL)
        time.sleep(0.5)
        ahead(ours, exported)  # says nothing: the next validation is what it is for
        assert ours.validate(exported.root).proven


def test_what_lives_in_this_process_has_none_of_its_own(exported: Artifact) -> None:
    with Validator() as ours:
        ours.start(f"{IN_MEMORY}Toy")
        assert ours._process is None
        checkpoint = pipeline.ModelRequest.of(exported.manifest.source).resolve()
        ours.prepare(checkpoint, "onnx", "cpu")
        assert ours._process is None


def test_an_export_that_fails_leaves_no_process(tmp_path: Path) -> None:
    import psutil

    before = set(psutil.Process().children())
    with pytest.raises(ModelportError):
        pipeline.export("onnx", pipeline.ModelRequest(str(tmp_path / "none")), tmp_path / "out")
    assert set(psutil.Process().children()) <= before
