"""The model hub, against a double that keeps commits as the hub does: by parent, by sha256."""

from __future__ import annotations

import hashlib
import inspect
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from modelport import artifacts
from modelport.destinations import Reference, hf, open_repository, resolve
from modelport.errors import DestinationUnreachable, DigestMismatch, TagMoved, UsageError
from modelport.pipeline.publishing import Gate, publish, pull

ANY = Gate(allow_unproven=True)
LARGE = 10_000


def http_error(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://hub.invalid/x")
    return kind("no", response=httpx.Response(status, request=request))


class FakeHub:
    """Repositories as branches of commits; a commit is its files."""

    def __init__(self) -> None:
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.lfs: list[str] = []
        self.interfere: dict[str, bytes] = {}
        self.refused = False

    def _at(self, revision: str) -> str:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise http_error(errors.RevisionNotFoundError, 404)
        return commit

    def create_repo(self, repo_id, *, exist_ok):
        if self.refused:
            raise http_error(errors.HfHubHTTPError, 403)
        if not self.branches:  # the hub's own first commit
            self._commit("main", {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs\n"})

    def create_branch(self, repo_id, *, branch, revision, exist_ok):
        assert exist_ok
        self.branches.setdefault(branch, self._at(revision))

    def repo_info(self, repo_id, *, revision):
        return SimpleNamespace(sha=self._at(revision))

    def _stream(self, repo_id, filename, revision, start):
        files = self.commits[self._at(revision)]
        if filename not in files:
            raise http_error(errors.RemoteEntryNotFoundError, 404)
        yield files[filename][start:]

    def get_paths_info(self, repo_id, paths, *, revision):
        files = self.commits[self._at(revision)]
        return [self._info(p, files[p]) for p in paths if p in files]

    def _info(self, path, data):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
        return SimpleNamespace(
            path=path, size=len(data), blob_id=git, lfs=lfs if len(data) > LARGE else None
        )

    def preupload_lfs_files(self, repo_id, additions, *, revision, free_memory):
        self.lfs += [a.path_in_repo for a in additions if a.upload_info.size > LARGE]

    def create_commit(
        self, repo_id, operations, *, commit_message, revision, parent_commit
    ):
        if self.interfere:
            other = {**self.commits.get(self.branches.get(revision, ""), {}), **self.interfere}
            self.interfere = {}
            self._commit(revision, other)
        if parent_commit != self.branches.get(revision):
            raise http_error(errors.HfHubHTTPError, 412)
        files = dict(self.commits.get(parent_commit or "", {}))
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
        return SimpleNamespace(oid=self._commit(revision, files))

    def _commit(self, revision, files):
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[revision] = oid
        return oid


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hf, "_api", lambda: fake)
    monkeypatch.setattr(hf, "_stream", lambda _, *of: fake._stream(*of))
    return fake


def test_the_double_takes_what_the_real_client_takes():
    for name, method in vars(FakeHub).items():
        if not name.startswith("_"):
            ours = set(inspect.signature(method).parameters)
            assert ours <= set(inspect.signature(getattr(HfApi, name)).parameters), name


def test_publish_and_pull(hub, proven, tmp_path):
    done = publish(proven, "hf://team/tiny")
    assert done.digest == hub.branches["main"]
    found = pull("hf://team/tiny", tmp_path / "pulled")
    assert artifacts.verify(tmp_path / "pulled").manifest.proven
    assert found.digest == done.digest
    readme = hub.commits[done.digest]["README.md"].decode()
    assert readme.startswith("---\n")
    assert "parity with its source: pass" in readme
    assert not (tmp_path / "pulled" / "README.md").exists()


def test_a_new_repository_holds_no_release(hub, proven, variant, tmp_path):
    """The hub itself commits something to it first."""
    done = publish(proven, "hf://team/tiny", expected="none")
    assert ".gitattributes" in hub.commits[done.digest]
    assert done.reference == "hf://team/tiny", "the hub has no tags"
    assert pull(done.reference, tmp_path / "pulled").digest == done.digest
    with pytest.raises(TagMoved):
        publish(variant("b"), "hf://team/tiny", ANY, expected="none")
    hub._commit("empty", {"README.md": b"soon"})
    with pytest.raises(UsageError, match="nothing is published"):
        pull("hf://team/tiny@empty", tmp_path / "none")


def test_what_changes_while_it_is_published(hub, proven, monkeypatch):
    real = hf.HubRepository.send

    def send(self, item):
        if item.name == "model.onnx":
            item.path.write_bytes(b"x" * item.entry.size)
        real(self, item)

    monkeypatch.setattr(hf.HubRepository, "send", send)
    for small in (hf.BLOCK, 0):  # both by its bytes and by its path
        monkeypatch.setattr(hf, "BLOCK", small)
        before = (proven / "model.onnx").read_bytes()
        with pytest.raises(DigestMismatch, match=r"model\.onnx changed"):
            publish(proven, "hf://team/tiny")
        (proven / "model.onnx").write_bytes(before)
    assert len(hub.commits) == 1


def test_large_files_go_first_and_once(hub, proven, variant, tmp_path):
    first = publish(proven, "hf://team/tiny")
    assert set(hub.lfs) == {"model.onnx", "parity.json"}
    assert publish(proven, "hf://team/tiny").digest == first.digest, "no new commit"
    hub.lfs.clear()
    publish(variant("b"), "hf://team/tiny", ANY)
    assert hub.lfs == ["notes.txt"]
    publish(proven, "hf://team/tiny")
    assert "notes.txt" not in hub.commits[hub.branches["main"]], "what a release lacks is gone"
    assert pull(f"hf://team/tiny@{first.digest}", tmp_path / "old").digest == first.digest


def test_another_publisher_in_between(hub, proven, variant, tmp_path):
    publish(proven, "hf://team/tiny")
    hub.interfere = {"model.onnx": b"another's"}
    publish(variant("b"), "hf://team/tiny", ANY)
    assert pull("hf://team/tiny", tmp_path / "pulled").release.allowed == ("unproven",)
    with pytest.raises(TagMoved):
        publish(proven, "hf://team/tiny", expected="none")


def test_a_new_branch_is_not_the_release_it_was_branched_from(hub, proven, variant, tmp_path):
    main = publish(variant("b"), "hf://team/tiny", ANY)
    done = publish(proven, "hf://team/tiny@staging", expected="none")
    assert done.digest == hub.branches["staging"] != hub.branches["main"] == main.digest
    assert "notes.txt" not in hub.commits[done.digest], "nothing of the other release is left"
    for commit, place in ((main.digest, "team/tiny"), (done.digest, "team/tiny@staging")):
        assert f"modelport pull hf://{place} DIRECTORY" in hub.commits[commit]["README.md"].decode()
    assert pull("hf://team/tiny@staging", tmp_path / "pulled").release.allowed == ()
    with pytest.raises(TagMoved, match=done.digest):
        publish(proven, "hf://team/tiny@staging", ANY, expected="none")


def test_previous_is_what_the_branch_holds_and_of_a_new_one_what_the_default_holds(
    hub, proven, variant, tmp_path
):
    def previous(destination):
        repository = open_repository(Reference.parse("hf://team/tiny:previous"))
        head = resolve(repository, following=Reference.parse(destination))
        return head and head.digest

    assert previous("hf://team/tiny") is None
    main = publish(variant("b"), "hf://team/tiny", ANY).digest
    assert previous("hf://team/tiny@staging") == main
    staging = publish(proven, "hf://team/tiny@staging").digest
    assert previous("hf://team/tiny@staging") == staging
    assert previous("hf://team/tiny") == main
    assert pull("hf://team/tiny:previous", tmp_path / "pulled").digest == main
    with pytest.raises(UsageError, match="cannot be published to"):
        publish(proven, "hf://team/tiny:previous")
    for other in ("hf://team/tiny:latest", "hf://team/tiny:previous@staging"):
        with pytest.raises(UsageError, match="the hub has revisions"):
            open_repository(Reference.parse(other))


def test_a_branch_that_another_publisher_makes_at_the_same_moment(
    hub, proven, variant, monkeypatch
):
    publish(proven, "hf://team/tiny")
    real = FakeHub.create_branch

    def overtaken(self, repo_id, *, branch, revision, exist_ok):
        files = {**self.commits[self._at(revision)], "theirs.txt": b"x"}
        self._commit(branch, files)
        real(self, repo_id, branch=branch, revision=revision, exist_ok=exist_ok)

    monkeypatch.setattr(FakeHub, "create_branch", overtaken)
    with pytest.raises(TagMoved):
        publish(variant("b"), "hf://team/tiny@staging", ANY, expected="none")
    assert "theirs.txt" in hub.commits[hub.branches["staging"]]


def test_a_file_changed_on_the_hub_is_refused(hub, proven, tmp_path):
    done = publish(proven, "hf://team/tiny")
    hub.commits[done.digest]["model.onnx"] = b"x" * 39127
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        pull("hf://team/tiny", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_refusals(hub, proven, tmp_path):
    with pytest.raises(UsageError, match="nothing is published"):
        pull("hf://team/tiny", tmp_path / "pulled")
    with pytest.raises(UsageError, match="no repository"):
        publish(proven, "hf://tiny")
    hub.refused = True
    with pytest.raises(DestinationUnreachable, match="refused") as caught:
        publish(proven, "hf://team/tiny")
    assert "HF_TOKEN" in caught.value.hint
