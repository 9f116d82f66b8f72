"""Outputs on disk for the duration of one validation, and what killed ones left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "modelport-truth-"


@contextmanager
def spool_directory() -> Iterator[Path]:
    """A directory named after this process, removed at the end.

    A process that is killed cannot remove its own (gigabytes of float64 outputs), so those of
    processes that are gone are removed first.
    """
    sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as name:
        yield Path(name)


def sweep(parent: Path) -> None:
    """Remove directories of this user's processes that no longer run."""
    import psutil

    for found in parent.glob(f"{PREFIX}*-*"):
        owner = found.name.removeprefix(PREFIX).split("-")[0]
        try:
            ours = found.lstat().st_uid == os.getuid()
        except OSError:
            continue
        gone = owner.isdigit() and not psutil.pid_exists(int(owner))
        if gone and ours and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
