"""read, verify and reports: what is on disk is what the manifest names, also after a crash."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from modelport.artifacts import (
    ParitySummary,
    collect,
    read,
    store,
    verify,
    with_report,
    write_manifest,
)
from modelport.errors import DigestMismatch, PathEscape, UsageError


def test_read_and_verify_return_the_artifact(artifact):
    assert read(artifact.root) == artifact
    assert verify(artifact.root) == artifact
    assert artifact.format == "onnx"


def test_read_says_what_is_missing(tmp_path: Path, artifact):
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"has no manifest\.json") as caught:
        read(tmp_path)
    assert "modelport export" in caught.value.hint
    with pytest.raises(UsageError, match="is a file") as caught:
        read(artifact.root / "model.onnx")
    assert str(artifact.root) in caught.value.hint


def test_the_manifest_may_not_be_a_link(tmp_path: Path, artifact):
    (artifact.root / "manifest.json").rename(tmp_path / "elsewhere.json")
    (artifact.root / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PathEscape, match="symbolic link"):
        read(artifact.root)


def _flip(root: Path) -> None:
    data = bytearray((root / "model.onnx").read_bytes())
    data[3] ^= 1
    (root / "model.onnx").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_flip, "has sha256"),
        (lambda root: (root / "model.onnx").write_text("longer than before"), "has 18 bytes"),
        (lambda root: (root / "model.onnx").unlink(), "is missing"),
        (lambda root: shutil.rmtree(root / "sub"), "is missing"),
        (lambda root: (root / "extra").touch(), "is not named"),
        (lambda root: (root / "sub" / "manifest.json").touch(), "is not named"),
        (lambda root: (root / ".model.onnx.tmp-1").touch(), "is not named"),
    ],
)
def test_verify_names_what_differs(artifact, damage, problem):
    damage(artifact.root)
    with pytest.raises(DigestMismatch, match=problem) as caught:
        verify(artifact.root)
    assert caught.value.hint
    assert caught.value.exit_code == 4


def test_verify_refuses_links_and_special_files(tmp_path: Path, artifact):
    for make in (
        lambda path: path.symlink_to(artifact.root / "model.onnx"),
        lambda path: path.symlink_to(artifact.root / "sub"),
        lambda path: path.symlink_to("/nowhere"),
        os.mkfifo,
    ):
        make(artifact.root / "sub" / "odd")
        with pytest.raises(PathEscape):
            verify(artifact.root)
        with pytest.raises(PathEscape):
            collect(artifact.root)
        (artifact.root / "sub" / "odd").unlink()
    verify(artifact.root)


def test_a_listed_file_replaced_by_a_link_to_the_same_bytes_is_refused(tmp_path: Path, artifact):
    (artifact.root / "model.onnx").rename(tmp_path / "model.onnx")
    (artifact.root / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(PathEscape):
        verify(artifact.root)


def test_a_report_is_added_and_replaced(artifact):
    summary = ParitySummary("pass", artifact.manifest.identity, {"effect": "pass"}, 1.5, 12)
    first = with_report(artifact, "parity.json", "{}", summary)
    assert verify(artifact.root) == first
    assert first.manifest.proven
    second = with_report(first, "benchmark.json", "[1]")
    third = with_report(second, "benchmark.json", "[1, 2]")
    assert verify(artifact.root) == third
    assert third.manifest.parity == summary
    assert third.manifest.identity == artifact.manifest.identity
    assert (artifact.root / "benchmark.json").read_text() == "[1, 2]"
    assert not [p for p in artifact.root.iterdir() if p.name.startswith(".")]


def test_a_report_on_something_else_is_refused(artifact):
    with pytest.raises(UsageError, match="not a report"):
        with_report(artifact, "model.onnx", "{}")
    other = ParitySummary("pass", "0" * 64, {}, None, 1)
    with pytest.raises(UsageError, match="another artifact"):
        with_report(artifact, "parity.json", "{}", other)
    _flip(artifact.root)
    write_manifest(
        artifact.root, dataclasses.replace(artifact.manifest, files=collect(artifact.root))
    )
    with pytest.raises(DigestMismatch, match="was replaced"):
        with_report(artifact, "parity.json", "{}")


class Crash(BaseException):
    """Stands for kill -9: nothing may catch it and tidy up."""


@pytest.mark.parametrize("step", range(1, 9))
def test_a_crash_at_any_step_of_a_report_leaves_an_artifact_that_verifies(
    artifact, monkeypatch, step
):
    before = with_report(artifact, "parity.json", "old")
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                raise Crash
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        try:
            with_report(before, "parity.json", "newer")
        except Crash:
            pass
        else:
            assert step > 6, "the counted steps are fewer than the test believes"
    verified = verify(artifact.root)
    text = (artifact.root / "parity.json").read_text()
    assert text in ("old", "newer")
    assert verified.manifest.files["parity.json"].size == len(text)
    # and the next report is none the worse
    with_report(verified, "parity.json", "newest")
    verify(artifact.root)
    assert (artifact.root / "parity.json").read_text() == "newest"


def test_a_pending_report_that_the_manifest_does_not_name_is_never_used(artifact):
    before = with_report(artifact, "parity.json", "old")
    store._pending(artifact.root, "parity.json").write_text("planted")
    assert verify(artifact.root) == before
    assert (artifact.root / "parity.json").read_text() == "old"
