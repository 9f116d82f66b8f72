"""What a killed validation left on disk is removed by the next one, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from modelport.validate import spool


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_directories_of_dead_processes_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / f"{spool.PREFIX}{dead()}-abc"
    alive = tmp_path / f"{spool.PREFIX}{os.getppid()}-abc"
    other = tmp_path / f"{spool.PREFIX}notes-abc"
    for directory in (left, alive, other):
        directory.mkdir()
        (directory / "x.npz").write_bytes(b"x")
    with spool.spool_directory() as mine:
        assert mine.is_dir()
        assert str(os.getpid()) in mine.name
        assert not left.exists()
        assert alive.exists()
        assert other.exists()
    assert not mine.exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / f"{spool.PREFIX}{dead()}-abc"
    link.symlink_to(target)
    spool.sweep(tmp_path)
    assert target.is_dir()
