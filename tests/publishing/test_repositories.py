"""What every repository does, the same tests for a file tree, a registry and a bucket."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import faulty_proxy
import pytest
from faulty_proxy import Fault
from modelport import artifacts
from modelport.artifacts import release
from modelport.destinations import Reference, open_repository
from modelport.errors import (
    DestinationUnreachable,
    DigestMismatch,
    StorageError,
    TagMoved,
    UsageError,
)
from modelport.pipeline import publishing
from modelport.pipeline.publishing import Gate, publish, pull

ANY = Gate(allow_unproven=True)


def test_what_is_published_is_pulled(place, proven, tmp_path):
    done = publish(proven, f"{place.url}:v1")
    assert done.digest.startswith("sha256:")
    assert done.sent > 55_000
    found = pull(f"{place.url}:v1", tmp_path / "pulled")
    assert found.digest == done.digest
    assert found.artifact.manifest == artifacts.read(proven).manifest
    for name in found.artifact.manifest.files:
        assert (tmp_path / "pulled" / name).read_bytes() == (proven / name).read_bytes()
    assert artifacts.verify(tmp_path / "pulled").manifest.proven
    statement = json.loads((tmp_path / "pulled" / release.PROVENANCE).read_bytes())
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"


def test_unchanged_files_are_not_sent_again(place, proven, variant):
    first = publish(proven, f"{place.url}:v1")
    assert publish(proven, f"{place.url}:v1").sent == 0
    assert publish(proven, f"{place.url}:v2").sent == 0
    other = publish(variant("b"), f"{place.url}:v1", ANY)
    assert 40_000 < other.sent < first.sent, "only notes.txt, the manifest and the provenance"
    if place.kind == "oci":
        assert place.proxy.sent("PATCH", "uploads") < first.sent + other.sent + 20_000


def test_a_release_is_pulled_by_digest_whatever_becomes_of_the_tag(
    place, proven, variant, tmp_path
):
    first = publish(proven, place.url)
    second = publish(variant("b"), place.url, ANY)
    assert pull(place.url, tmp_path / "new").digest == second.digest
    old = pull(f"{place.url}@{first.digest}", tmp_path / "old")
    assert old.artifact.manifest.identity == artifacts.read(proven).manifest.identity
    assert old.release.allowed == ()
    assert pull(place.url, tmp_path / "again").release.allowed == ("unproven",)


def test_nothing_there(place, tmp_path):
    with pytest.raises(UsageError, match="nothing is published"):
        pull(f"{place.url}:absent", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_compare_and_swap(place, proven, variant):
    first = publish(proven, place.url, expected="none")
    with pytest.raises(TagMoved, match="points at") as caught:
        publish(variant("b"), place.url, ANY, expected="none")
    assert caught.value.exit_code == 2
    second = publish(variant("c"), place.url, ANY, expected=first.digest)
    assert second.digest != first.digest
    with pytest.raises(TagMoved):
        publish(proven, place.url, expected=first.digest)


def test_sixteen_publishers_end_in_one_consistent_state(place, variant, tmp_path):
    roots = [variant(f"n{i}") for i in range(16)]
    failures: list[BaseException] = []
    digests: list[str] = []

    def one(root: Path) -> None:
        try:
            digests.append(publish(root, f"{place.url}:shared", ANY).digest)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=one, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    final = pull(f"{place.url}:shared", tmp_path / "pulled")
    assert final.digest in digests
    if place.kind == "file":
        entries = sorted(p.name for p in (place.data / "tags" / "shared").iterdir())
        assert entries == [f"{i:08}" for i in range(1, 17)], "each moved the tag exactly once"


def test_sixteen_publishers_that_expect_nothing_there(place, variant, tmp_path):
    roots = [variant(f"n{i}") for i in range(16)]
    lost: list[BaseException] = []
    won: list[str] = []

    def one(root: Path) -> None:
        try:
            won.append(publish(root, f"{place.url}:shared", ANY, expected="none").digest)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            lost.append(error)

    threads = [threading.Thread(target=one, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(error) for error in lost} == {TagMoved}
    assert pull(f"{place.url}:shared", tmp_path / "pulled").digest in won
    if place.kind != "oci":  # where the swap is one step; a registry can be overtaken unseen
        assert len(won) == 1


def test_an_answer_that_was_lost_is_no_conflict(place, proven, monkeypatch):
    """The tag was moved, but the connection broke before that was told."""
    repository = type(open_repository(Reference.parse(place.url)))
    real, told = repository.point, []

    def point(self, *arguments):
        head = real(self, *arguments)
        if not told:
            told.append(head)
            raise ConnectionResetError
        return head

    monkeypatch.setattr(repository, "point", point)
    assert publish(proven, place.url, expected="none").digest == told[0].digest


def test_a_registry_is_asked_to_swap(tags, proven, variant, monkeypatch):
    """Debian's registry ignores the condition; one that honours it answers 412."""
    seen: list[tuple[str, str]] = []
    real = open_repository(Reference.parse(tags.url))
    put = type(real)._put

    def watched(self, name, manifest, condition):
        seen.extend(condition.items())
        put(self, name, manifest, condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(real), "_put", watched)
        first = publish(proven, tags.url)
        publish(variant("b"), tags.url, ANY)
    assert seen == [("If-None-Match", "*"), ("If-Match", f'"{first.digest}"')]
    lost = Fault("status", "PUT", "manifests/latest", times=1, code=412)
    tags.proxy.faults = [lost]
    publish(variant("c"), tags.url, ANY)
    assert lost.struck == 1, "tried again from where the tag is now"
    tags.proxy.faults = [Fault("status", "PUT", "manifests/latest", times=-1, code=412)]
    monkeypatch.setattr("modelport.destinations.transfer._RACES", 3)
    at = pull(tags.url, proven.parent / "at").digest
    with pytest.raises(TagMoved, match="kept moving"):
        publish(variant("d"), tags.url, ANY, expected=at)


def test_a_tag_of_a_registry_that_is_taken_at_the_same_moment(tags, proven, variant, tmp_path):
    """Both saw the tag where they expected it; who wrote first is told."""
    first = publish(proven, tags.url)
    other = publish(variant("b"), f"{tags.url}:other", ANY)
    kind = type(open_repository(Reference.parse(tags.url)))
    put = kind._put

    def overtaken(self, name, manifest, condition):
        put(self, name, manifest, condition)
        if name == "latest":
            put(self, name, theirs, {})

    theirs = open_repository(Reference.parse(tags.url))._manifest("other").data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_put", overtaken)
        with pytest.raises(TagMoved, match="at the same moment") as caught:
            publish(variant("c"), tags.url, ANY, expected=first.digest)
    assert pull(tags.url, tmp_path / "theirs").digest == other.digest
    ours = caught.value.allowed
    assert pull(f"{tags.url}@{ours}", tmp_path / "ours").digest == ours


def test_a_registry_without_room(tags, proven, variant, tmp_path):
    first = publish(proven, tags.url)
    full = Fault("status", "PATCH", "uploads", times=-1, code=507)
    tags.proxy.faults = [full]
    with pytest.raises(StorageError, match="no room") as caught:
        publish(variant("b"), tags.url, ANY)
    assert caught.value.exit_code == 6
    assert full.struck == 1, "asking again does not make room"
    assert pull(tags.url, tmp_path / "pulled").digest == first.digest


@pytest.mark.parametrize("what", ["tag", "record", "model.onnx"])
def test_a_registry_without_end(tags, proven, tmp_path, what):
    """Nothing is read past what was announced, or what such a thing may have."""
    publish(proven, tags.url)
    first = pull(tags.url, tmp_path / "first")
    path = {
        "tag": "manifests/latest",
        "record": release.entry_of(release.dumps(first.release)).sha256,
        "model.onnx": first.release.files["model.onnx"].sha256,
    }[what]
    tags.proxy.faults = [Fault("endless", "GET", path, times=-1, least=0)]
    with pytest.raises((UsageError, DigestMismatch)):
        pull(tags.url, tmp_path / "pulled")
    assert sum(tags.proxy.flooded) < faulty_proxy.FLOOD / 2


def test_files_that_were_blown_up(proven, tmp_path):
    """Far larger than memory; as much is read as was announced."""
    url = f"file://{tmp_path}/repository"
    done = publish(proven, url)
    repository = tmp_path / "repository"
    os.truncate(repository / "blobs" / "sha256" / done.digest.removeprefix("sha256:"), 1 << 42)
    assert pull(url, tmp_path / "pulled").digest == done.digest
    with pytest.raises(DigestMismatch):
        pull(f"{url}@{done.digest}", tmp_path / "pinned")
    os.truncate(repository / "tags" / "latest" / "00000001", 1 << 42)
    with pytest.raises(UsageError, match="nothing is published"):
        pull(url, tmp_path / "again")


def test_a_report_that_is_added_meanwhile(place, proven, tmp_path, monkeypatch):
    """What was verified is published, or nothing: not the new manifest with the old files."""
    real = publishing.permissions

    def overtaken(artifact, gate):
        artifacts.with_report(artifacts.read(proven), artifacts.BENCHMARK, "{}")
        return real(artifact, gate)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "permissions", overtaken)
        with pytest.raises(DigestMismatch, match=r"manifest\.json changed") as caught:
            publish(proven, place.url)
    assert "run the same command again" in caught.value.hint
    with pytest.raises(UsageError, match="nothing is published"):
        pull(place.url, tmp_path / "pulled")
    done = publish(proven, place.url)
    assert artifacts.BENCHMARK in pull(place.url, tmp_path / "pulled").release.files
    assert artifacts.BENCHMARK in done.release.files


@pytest.fixture
def remote(place):
    if place.proxy is None:
        pytest.skip("a file tree has no connection")
    return place


def _sending(place) -> tuple[str, str]:
    return ("PATCH", "uploads") if place.kind == "oci" else ("PUT", "blobs/sha256")


def test_a_connection_cut_while_sending(remote, proven, tmp_path):
    method, path = _sending(remote)
    fault = Fault("cut-request", method, path, times=2, least=30_000)
    remote.proxy.faults = [fault]
    publish(proven, remote.url)
    assert fault.struck == 2
    pull(remote.url, tmp_path / "pulled")


def test_a_connection_cut_while_fetching_goes_on_where_it_was_cut(
    remote, proven, tmp_path, monkeypatch
):
    monkeypatch.setattr("modelport.destinations.oci._PIECE", 4096)
    publish(proven, remote.url)
    path = "/blobs/sha256" if remote.kind == "oci" else "blobs/sha256"
    fault = Fault("cut-response", "GET", path, times=2, least=30_000)
    remote.proxy.faults = [fault]
    remote.proxy.log.clear()
    pull(remote.url, tmp_path / "pulled")
    assert fault.struck >= 1
    if remote.kind == "oci":
        ranges = [r for m, _, _, r in remote.proxy.log if m == "GET" and r]
        assert ranges, "it was fetched from the start again"


@pytest.mark.parametrize("times", [2, -1])
def test_answers_of_500(remote, proven, tmp_path, times):
    method, path = _sending(remote)
    remote.proxy.faults = [Fault("status", method, path, times=times)]
    if times == 2:
        publish(proven, remote.url)
        pull(remote.url, tmp_path / "pulled")
        return
    with pytest.raises(DestinationUnreachable, match="failed 6 times") as caught:
        publish(proven, remote.url)
    assert caught.value.exit_code == 6
    with pytest.raises(UsageError, match="nothing is published"):
        pull(remote.url, tmp_path / "pulled")
    remote.proxy.faults = []
    publish(proven, remote.url)
    pull(remote.url, tmp_path / "pulled")


def test_500_when_the_tag_is_moved_leaves_the_tag(remote, proven, variant, tmp_path):
    first = publish(proven, remote.url)
    path = "manifests/latest" if remote.kind == "oci" else "tags/latest"
    remote.proxy.faults = [Fault("status", "PUT", path, times=-1)]
    with pytest.raises(DestinationUnreachable):
        publish(variant("b"), remote.url, ANY)
    assert pull(remote.url, tmp_path / "pulled").digest == first.digest


def test_a_corrupt_file_is_fetched_again_and_then_refused(remote, proven, tmp_path):
    publish(proven, remote.url)
    path = "/blobs/sha256" if remote.kind == "oci" else "blobs/sha256"
    remote.proxy.faults = [Fault("corrupt", "GET", path, times=1, least=30_000)]
    pull(remote.url, tmp_path / "mended")
    remote.proxy.faults = [Fault("corrupt", "GET", path, times=-1, least=30_000)]
    with pytest.raises(DigestMismatch, match=r"model\.onnx") as caught:
        pull(remote.url, tmp_path / "pulled")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "pulled").exists()
    assert not list(tmp_path.glob(".pulled*"))


def test_a_corrupt_release_record_is_refused(remote, proven, tmp_path):
    publish(proven, remote.url)
    record = release.dumps(pull(remote.url, tmp_path / "first").release)
    path = release.entry_of(record).sha256
    remote.proxy.faults = [Fault("corrupt", "GET", path, times=-1, least=100)]
    with pytest.raises(DigestMismatch, match=r"record|damaged"):
        pull(remote.url, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
