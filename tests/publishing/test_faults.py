"""kill -9, a full disk, damaged stores: a pull gets a verified artifact or a clear error."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from modelport import artifacts
from modelport.errors import DigestMismatch, StorageError, UsageError
from modelport.pipeline.publishing import Gate, publish, pull

ANY = Gate(allow_unproven=True)

# Publishes each artifact in turn, for ever, in a process forked from one that imported everything.
RUNNER = """
import dataclasses, os, signal, sys, time, random
from pathlib import Path
from modelport import artifacts, pipeline
from modelport.pipeline.publishing import Gate, publish, pull
from modelport import destinations, validate
roots, url, rounds = [Path(r) for r in sys.argv[3:]], sys.argv[1], int(sys.argv[2])
random.seed(7)
span, seen = 0.01 if sys.argv[1].startswith('file') else 1.0, set()
for turn in range(5 * rounds):
    if turn >= rounds and len(seen) >= 2:  # on a busy machine it takes longer to have seen enough
        break
    pid = os.fork()
    if not pid:
        try:
            number = turn
            while True:  # something new each time, or all would be there already
                number += 1
                root = roots[number % len(roots)]
                (root / "notes.txt").write_text(f"{os.getpid()} {number} " * 20_000)
                manifest = artifacts.read(root).manifest
                artifacts.write_manifest(
                    root, dataclasses.replace(manifest, files=artifacts.collect(root)))
                publish(root, url, Gate(allow_unproven=True))
        finally:
            os._exit(3)
    time.sleep(random.uniform(0, span))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the publisher ended by itself"
    before = len(seen)
    try:
        seen.add(pull(url, roots[0].parent / "pulled", force=True).digest)
    except Exception as error:
        assert not seen and "nothing is published" in str(error), error
    span = min(span * (1.3 if len(seen) == before else 0.9), 10)
print(len(seen))
"""


def test_publishers_killed_at_random_moments(place, variant, tmp_path):
    roots = [str(variant(name)) for name in "abc"]
    rounds = 30 if place.kind == "file" else 10
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, place.url, str(rounds), *roots],
        capture_output=True, text=True, check=False, timeout=480,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2, "the kills came too early to test anything"
    last = publish(variant("d"), place.url, ANY)
    assert pull(place.url, tmp_path / "last").digest == last.digest


def test_the_tag_moves_after_everything_else(variant, tmp_path, monkeypatch):
    from modelport.destinations.file import LocalRepository

    written: list[str] = []
    real = LocalRepository._write

    def write(self, path, *arguments, **options):
        real(self, path, *arguments, **options)
        written.append(path.partition("/")[0])

    monkeypatch.setattr(LocalRepository, "_write", write)
    for name in "ab":
        written.clear()
        publish(variant(name), f"file://{tmp_path}/repository", ANY)
        assert written[-1] == "tags"
        assert set(written[:-1]) == {"blobs"}


def test_a_registry_after_a_publisher_was_killed(registry, variant, tmp_path):
    root = variant("a")
    url = f"oci://{registry[0]}:{registry[1]}/killed/{tmp_path.parent.name}"
    code = ("import sys; from modelport.cli import execute\n"
            f"sys.exit(execute(['publish', {str(root)!r}, {url!r}, '--allow-unproven', '-v']))")
    random.seed(3)
    for steps in (1, 3, 6):  # killed once that many files were on their way
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        told = 0
        for line in process.stderr or ():
            told += "sending" in line or "publishing" in line
            if told >= steps:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        try:
            pull(url, tmp_path / "pulled", force=True)
        except UsageError as error:
            assert "nothing is published" in str(error)  # noqa: PT017
    publish(root, url, ANY)
    pull(url, tmp_path / "pulled", force=True)


def test_a_pull_that_is_killed_leaves_nothing(proven, tmp_path):
    url = f"file://{tmp_path}/repository"
    publish(proven, url)
    code = ("import os, signal, sys\nfrom modelport.destinations import transfer\n"
            "real = transfer._fetch_file\n"
            "def fetch(repository, name, entry, path):\n"
            "    real(repository, name, entry, path)\n"
            "    if name == 'model.onnx': os.kill(os.getpid(), signal.SIGKILL)\n"
            "transfer._fetch_file = fetch\nfrom modelport.cli import execute\n"
            f"sys.exit(execute(['pull', {url!r}, {str(tmp_path / 'pulled')!r}]))")
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "pulled").exists()
    pull(url, tmp_path / "pulled")
    assert sorted(p.name for p in tmp_path.iterdir() if "pulled" in p.name) == ["pulled"]


def test_a_disk_that_is_full_while_publishing(proven, variant, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/repository"
    first = publish(proven, url)
    real = os.fsync
    count = 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError) as caught:
            publish(variant("b"), url, ANY)
    assert caught.value.exit_code == 6
    assert pull(url, tmp_path / "pulled").digest == first.digest
    assert not list((tmp_path / "repository").rglob(".*"))


def test_a_file_size_limit_while_pulling(proven, tmp_path):
    """A refusal by the kernel itself: files may not grow past 20 kB."""
    url = f"file://{tmp_path}/repository"
    publish(proven, url)
    code = ("import sys; from modelport.cli import execute\n"
            f"sys.exit(execute(['pull', {url!r}, {str(tmp_path / 'pulled')!r}]))")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert "size limit" in done.stderr
    assert not [p for p in tmp_path.iterdir() if "pulled" in p.name]


def test_no_room_is_noticed_before_anything_is_fetched(proven, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/repository"
    publish(proven, url)
    real = os.statvfs
    fields = list(real(tmp_path))
    fields[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(StorageError, match="are needed"):
        pull(url, tmp_path / "pulled")


def _blob(tmp_path: Path, artifact: Path, name: str) -> Path:
    entry = artifacts.read(artifact).manifest.files[name]
    return tmp_path / "repository" / "blobs" / "sha256" / entry.sha256


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove", "link", "fifo"])
def test_a_damaged_file_in_the_store_is_refused_and_mended(proven, tmp_path, damage):
    url = f"file://{tmp_path}/repository"
    publish(proven, url)
    blob = _blob(tmp_path, proven, "model.onnx")
    data = blob.read_bytes()
    blob.unlink()
    if damage == "flip":
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        blob.write_bytes(data[:-1])
    elif damage == "grow":
        blob.write_bytes(data + b"0" * 10_000_000)
    elif damage == "link":
        blob.symlink_to(proven / "model.onnx")
    elif damage == "fifo":
        os.mkfifo(blob)
    start = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each damage has its own error
        pull(url, tmp_path / "pulled")
    assert time.monotonic() - start < 20
    assert getattr(caught.value, "exit_code", 1) in (4, 6)
    assert not (tmp_path / "pulled").exists()
    publish(proven, url, resend=True)
    pull(url, tmp_path / "pulled")


def test_a_damaged_record_is_refused_and_mended(proven, tmp_path):
    url = f"file://{tmp_path}/repository"
    done = publish(proven, url)
    record = tmp_path / "repository" / "blobs" / "sha256" / done.digest.removeprefix("sha256:")
    record.write_bytes(record.read_bytes().replace(b"onnx", b"xxxx"))
    with pytest.raises(DigestMismatch):
        pull(url, tmp_path / "pulled")
    publish(proven, url, resend=True)
    pull(url, tmp_path / "pulled")


def test_a_tag_entry_that_was_cut_short_is_passed_over(proven, variant, tmp_path):
    url = f"file://{tmp_path}/repository"
    first = publish(proven, url)
    (tmp_path / "repository" / "tags" / "latest" / "00000002").write_text('{"release": "ab')
    assert pull(url, tmp_path / "a").digest == first.digest
    second = publish(variant("b"), url, ANY)
    assert pull(url, tmp_path / "b").digest == second.digest
