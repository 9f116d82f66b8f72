"""The hub's own client against a server that speaks its interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faulty_proxy
import hub_server
import pytest
from huggingface_hub import HfApi, constants
from modelport import artifacts
from modelport.destinations import hf
from modelport.errors import DigestMismatch, TagMoved, UsageError
from modelport.pipeline.publishing import Gate, publish, pull

# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ANY = Gate(allow_unproven=True)
URL = "hf://team/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server.serving() as running:
        monkeypatch.setattr(hf, "_api", lambda: HfApi(running.url, token="hf_for_tests_only"))
        yield running


def test_published_and_pulled(hub, proven, variant, tmp_path):
    with pytest.raises(UsageError, match="nothing is published"):
        pull(URL, tmp_path / "pulled")
    first = publish(proven, URL, expected="none")  # on top of the hub's own first commit
    assert first.digest == hub.branches["main"]
    assert len(hub.uploads) == 2, "model.onnx and parity.json; the others travel in the commit"
    assert pull(URL, tmp_path / "pulled").digest == first.digest
    assert artifacts.verify(tmp_path / "pulled").manifest.proven
    assert hub.commits[first.digest]["README.md"].startswith(b"---\n")
    assert publish(proven, URL).digest == first.digest, "no new commit"
    second = publish(variant("b"), URL, ANY, expected=first.digest)
    assert len(hub.uploads) == 3, "only what is not there is sent"
    assert pull(f"{URL}@{first.digest}", tmp_path / "old").digest == first.digest
    with pytest.raises(TagMoved):
        publish(proven, URL, expected=first.digest)
    assert hub.branches["main"] == second.digest
    assert all(token for _, path, token in hub.log if path.startswith("/api/"))


def test_a_new_branch(hub, proven, variant, tmp_path):
    main = publish(variant("b"), URL, ANY)
    done = publish(proven, f"{URL}@staging", expected="none")
    assert done.digest == hub.branches["staging"]
    assert hub.branches["main"] == main.digest
    assert "notes.txt" not in hub.commits[done.digest]
    assert pull(f"{URL}@staging", tmp_path / "pulled").digest == done.digest


def test_another_commit_in_between(hub, proven, variant, tmp_path, monkeypatch):
    publish(proven, URL)
    real = hub_server._Handler._commit
    theirs: list[str] = []

    def overtaken(handler, branch, lines):
        if not theirs:
            files = {**hub.commits[hub.branches[branch]], "model.onnx": b"another's"}
            theirs.append(hub.commit(branch, files))
        real(handler, branch, lines)

    monkeypatch.setattr(hub_server._Handler, "_commit", overtaken)
    done = publish(variant("b"), URL, ANY)
    assert done.digest == hub.branches["main"]
    assert pull(URL, tmp_path / "pulled").digest == done.digest


def test_a_server_that_fails_and_recovers(hub, proven, tmp_path):
    hub.fail = 2
    publish(proven, URL)
    assert hub.fail == 0
    pull(URL, tmp_path / "pulled")


def test_a_file_changed_on_the_server_is_refused(hub, proven, tmp_path):
    done = publish(proven, URL)
    size = len(hub.commits[done.digest]["model.onnx"])
    hub.commits[done.digest]["model.onnx"] = b"x" * size
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        pull(URL, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("name", ["publication.json", "model.onnx"])
def test_a_server_without_end(hub, proven, tmp_path, name):
    publish(proven, URL)
    hub.endless = name
    with pytest.raises(UsageError if name == "publication.json" else DigestMismatch):
        pull(URL, tmp_path / "pulled")
    assert sum(hub.flooded) < faulty_proxy.FLOOD / 2


def test_a_connection_cut_while_fetching_goes_on_where_it_was_cut(
    hub, proven, tmp_path, monkeypatch
):
    publish(proven, URL)
    real, cut = hf._stream, []

    def stream(api, repository, name, commit, start):
        for block in real(api, repository, name, commit, start):
            if name == "model.onnx" and not cut:
                cut.append(block[:1000])
                yield cut[0]
                raise ConnectionResetError
            yield block

    monkeypatch.setattr(hf, "_stream", stream)
    pull(URL, tmp_path / "pulled")
    assert cut
