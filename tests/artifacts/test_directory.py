"""stage: a directory appears whole or not at all, and nothing of the user's is ever lost."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from modelport.artifacts import _rename, directory, stage, verify
from modelport.errors import DestinationExists, StorageError, UsageError


def _artifact(root: Path, text: str) -> None:
    (root / "manifest.json").write_text('{"schema": 1, "format": "onnx", "files": {}}')
    (root / "sub").mkdir()
    (root / "sub" / "weights").write_text(text)


def _text(root: Path) -> str:
    return (root / "sub" / "weights").read_text()


def _only(parent: Path, *names: str) -> None:
    assert sorted(p.name for p in parent.iterdir()) == sorted(names)


@pytest.fixture(params=["exchange", "aside"])
def replacement(request, monkeypatch):
    """Both ways to replace a directory: in one step, and, where that is unknown, by two renames."""
    if request.param == "aside":
        monkeypatch.setattr(directory, "exchange", lambda *_: False)
    return request.param


def test_this_system_can_exchange(tmp_path: Path):
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is Linux")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert _rename.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_file()
    with pytest.raises(FileNotFoundError):
        _rename.exchange(tmp_path / "a", tmp_path / "absent")


def test_commit_places_everything_and_leaves_nothing_else(tmp_path: Path):
    destination = tmp_path / "new" / "out"
    with stage(destination) as staging:
        assert staging.root.parent == destination.parent
        _artifact(staging.root, "one")
        assert not destination.exists()
        assert staging.commit() == destination
    assert _text(destination) == "one"
    _only(destination.parent, "out")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path):
    before = os.umask(0o022)
    try:
        with stage(tmp_path / "out") as staging:
            _artifact(staging.root, "one")
            staging.commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, None])
def test_any_other_way_out_leaves_the_destination_as_it_was(tmp_path: Path, error):
    with stage(tmp_path / "out") as staging:
        _artifact(staging.root, "one")
        staging.commit()

    def interrupted() -> None:
        with stage(tmp_path / "out", force=True) as staging:
            _artifact(staging.root, "two")
            if error is not None:
                raise error

    if error is None:
        interrupted()
    else:
        with pytest.raises(error):
            interrupted()
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out")


def test_an_existing_destination_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DestinationExists) as caught, stage(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.hint
    _only(tmp_path, "out")


def test_force_replaces_an_artifact(tmp_path: Path, replacement):
    for text in ("one", "two", "three"):
        with stage(tmp_path / "out", force=True) as staging:
            _artifact(staging.root, text)
            staging.commit()
        assert _text(tmp_path / "out") == text
        _only(tmp_path, "out")


def test_force_takes_an_empty_directory(tmp_path: Path, replacement):
    (tmp_path / "out").mkdir()
    with stage(tmp_path / "out", force=True) as staging:
        _artifact(staging.root, "one")
        staging.commit()
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out")


def _file(path: Path) -> None:
    path.write_text("mine")


def _other_data(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _link(path: Path) -> None:
    (path.parent / "real").mkdir()
    _artifact(path.parent / "real", "one")
    path.symlink_to(path.parent / "real")


def _extension(path: Path) -> None:
    """Of a browser: its manifest has the same name."""
    path.mkdir()
    (path / "manifest.json").write_text('{"manifest_version": 3, "name": "mine", "version": "1"}')


def _torn(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"schema": 1, "format": "onnx", "files"')


@pytest.mark.parametrize("make", [_file, _other_data, _link, _extension, _torn])
def test_force_never_replaces_what_is_no_artifact(tmp_path: Path, make):
    make(tmp_path / "out")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(DestinationExists), stage(tmp_path / "out", force=True):
        pytest.fail("the block must not run")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_writing_is_not_replaced(tmp_path: Path, force):
    with stage(tmp_path / "out", force=force) as staging:
        _artifact(staging.root, "one")
        _other_data(tmp_path / "out")
        with pytest.raises(DestinationExists):
            staging.commit()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    _only(tmp_path, "out")


def test_the_root_directory_is_no_destination():
    with pytest.raises(DestinationExists), stage(Path("/"), force=True):
        pytest.fail("the block must not run")


def test_reject_keeps_the_latest_with_its_reason(tmp_path: Path, replacement):
    for text in ("one", "two"):
        with stage(tmp_path / "out") as staging:
            _artifact(staging.root, text)
            where = staging.reject(f"parity of {text}")
    assert where == tmp_path / "out.rejected"
    assert _text(where) == "two"
    assert (where / "rejected.txt").read_text() == "parity of two\n"
    _only(tmp_path, "out.rejected")


def test_reject_spares_a_directory_of_that_name_that_is_not_ours(tmp_path: Path):
    _other_data(tmp_path / "out.rejected")
    with stage(tmp_path / "out") as staging:
        _artifact(staging.root, "one")
        assert staging.reject("parity") == tmp_path / "out.rejected-2"
    assert (tmp_path / "out.rejected" / "thesis.tex").exists()


def test_a_rejected_artifact_verifies(tmp_path: Path, artifact):
    with stage(tmp_path / "other") as staging:
        staging.root.rmdir()
        artifact.root.rename(staging.root)
        where = staging.reject("parity")
    assert verify(where).manifest == artifact.manifest


def test_a_staging_directory_is_used_once(tmp_path: Path):
    with stage(tmp_path / "out") as staging:
        staging.commit()
        with pytest.raises(UsageError):
            staging.commit()
        with pytest.raises(UsageError):
            staging.reject("late")


def test_leftovers_of_dead_writers_are_swept(tmp_path: Path):
    dead = tmp_path / ".out.partial-1-0123abcd"  # pid 1 lives: the lock, not the pid, tells
    dead.mkdir()
    (dead / "half").touch()
    mine = tmp_path / ".out.partial-notes"
    mine.mkdir()
    other = tmp_path / ".other.partial-1-0123abcd"
    other.mkdir()
    with stage(tmp_path / "out") as staging:
        assert not dead.exists()
        staging.commit()
    _only(tmp_path, "out", mine.name, other.name)


def test_without_locks_writing_works_and_nothing_is_swept(tmp_path: Path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    alive = tmp_path / ".out.partial-1-0123abcd"
    alive.mkdir()
    with stage(tmp_path / "out") as staging:
        _artifact(staging.root, "one")
        staging.commit()
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out", alive.name)


def test_a_destination_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for destination in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(DestinationExists, match="not a directory"), stage(destination):
            pytest.fail("the block must not run")
    with pytest.raises(StorageError, match="too long"), stage(tmp_path / ("x" * 300)):
        pytest.fail("the block must not run")


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path: Path):
    aside = tmp_path / ".out.old-1-0123abcd"
    aside.mkdir()
    _artifact(aside, "one")
    with pytest.raises(DestinationExists), stage(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out")


def test_a_failed_second_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(directory, "exchange", lambda *_: False)
    with stage(tmp_path / "out") as staging:
        _artifact(staging.root, "one")
        staging.commit()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "broken", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with stage(tmp_path / "out", force=True) as staging:
        _artifact(staging.root, "two")
        with pytest.raises(StorageError):
            staging.commit()
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out")


def test_a_second_writer_is_refused_and_the_first_finishes(tmp_path: Path):
    with stage(tmp_path / "out", force=True) as first:
        _artifact(first.root, "one")
        second = stage(tmp_path / "out", force=True)
        with pytest.raises(DestinationExists, match="another process") as caught, second:
            pytest.fail("the block must not run")
        assert str(os.getpid()) in caught.value.found
        assert first.root.exists()
        first.commit()
    assert _text(tmp_path / "out") == "one"
    _only(tmp_path, "out")


def test_many_writers_at_once_never_mix(tmp_path: Path):
    refused = []

    def writer(number: int) -> None:
        for turn in range(10):
            try:
                with stage(tmp_path / "out", force=True) as staging:
                    text = f"{number}-{turn}"
                    _artifact(staging.root, text)
                    (staging.root / "again").write_text(text)
                    staging.commit()
            except DestinationExists:
                refused.append(number)

    threads = [threading.Thread(target=writer, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _text(tmp_path / "out") == (tmp_path / "out" / "again").read_text()
    _only(tmp_path, "out")


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO]
)
def test_a_refusing_disk_says_what_to_do(tmp_path: Path, code):
    with pytest.raises(StorageError) as caught, stage(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint
    assert caught.value.exit_code == 6
    _only(tmp_path)


def test_a_missing_permission_counts_only_where_we_write(tmp_path: Path):
    with pytest.raises(StorageError), stage(tmp_path / "out") as staging:
        raise PermissionError(errno.EACCES, "no", str(staging.root / "x"))
    with pytest.raises(PermissionError), stage(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere/model.safetensors")
    with pytest.raises(FileNotFoundError), stage(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "no", "x")
    _only(tmp_path)


def test_fsync_that_fails_means_no_commit(tmp_path: Path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with stage(tmp_path / "out") as staging:
        _artifact(staging.root, "one")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            staging.commit()
    _only(tmp_path)


LIMITED = """
import resource, sys
from pathlib import Path
from modelport.artifacts import stage
from modelport.artifacts.weights import write_safetensors
from modelport.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with stage(Path(sys.argv[1]) / "out") as staging:
        chunks = lambda: (bytes(1 << 16) for _ in range(32))
        write_safetensors(staging.root / "w", [("w", "uint8", (1 << 21,), chunks)])
        staging.commit()
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_real_refusal_by_the_kernel_leaves_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "size limit" in done.stdout
    _only(tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20


def test_what_is_set_aside_comes_back_or_goes_with_the_block(tmp_path: Path):
    with stage(tmp_path / "out") as staging:
        for text in ("one", "two"):
            _artifact(staging.root, text)
            staging.set_aside()
            assert not list(staging.root.iterdir())
        (staging.root / "half").touch()
        staging.restore()
        assert _text(staging.root) == "two"
        assert not (staging.root / "half").exists()
        staging.set_aside()
        _artifact(staging.root, "three")
        staging.commit()
    assert _text(tmp_path / "out") == "three"
    _only(tmp_path, "out")
    (tmp_path / ".out.aside-1-0123abcd").mkdir()  # of a writer that was killed
    with stage(tmp_path / "out", force=True):
        pass
    _only(tmp_path, "out")
