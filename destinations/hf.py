"""A repository on the model hub: ``hf://owner/name[@revision]``, to read also ``:previous``.

One commit is one release: the hub swaps a branch only if it still is where it was
(``parent_commit``), and stores large files by their sha256, so those that it has are not sent
again. The token comes from ``HF_TOKEN`` or the hub client's own login.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..artifacts import MANIFEST
from ..artifacts import manifest as manifests
from ..artifacts.manifest import MAX_BYTES
from ..artifacts.release import RELEASE, loads
from ..errors import DestinationUnreachable, TagMoved, UsageError
from .base import BLOCK, PREVIOUS, Head, Item, Reference, Repository, bounded, changed
from .retry import told

if TYPE_CHECKING:
    from ..artifacts import FileEntry, Manifest
    from ..artifacts.release import Release

CARD = "README.md"
DEFAULT_REVISION = "main"
_TIMEOUT = 60.0
_PIECE = 1 << 16


class HubRepository(Repository):
    """Files of a model repository at a commit."""

    revisions = True
    default = DEFAULT_REVISION

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        previous = reference.tag == PREVIOUS and not reference.revision
        if reference.pin or (reference.tag and not previous):
            raise UsageError(
                f"{reference}: the hub has revisions",
                allowed=f"hf://owner/name@revision; to compare with, hf://owner/name:{PREVIOUS}",
            )
        if reference.place.count("/") != 1:
            raise UsageError(f"{reference} is no repository", allowed="hf://owner/name")
        self._revision = reference.revision or self.default
        self._commit = self._revision
        self._there = False
        self._items: dict[str, Item] = {}
        self._uploaded: dict[str, Any] = {}
        self._api = _api()

    def head(self, tag: str) -> Head | None:
        head = self._at(self._revision)
        self._there = head is not None
        if head is not None:
            self._commit = head.version
        return head

    def previous(self, tag: str) -> Head | None:
        self._revision = tag
        head = self.head(tag)
        if head is None or not head.release:  # a new branch
            self._revision = self.default
            head = self.head(tag)
        return head

    def _at(self, revision: str) -> Head | None:
        """The commit that a revision is at, with its release record; None where there is none."""
        from huggingface_hub import errors

        try:
            info = self._call(self._api.repo_info, self.reference.place, revision=revision)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None
        commit = str(info.sha)
        try:
            with self._translated():
                record = bounded(self._blocks(RELEASE, 0, commit), MAX_BYTES,
                                 f"the release record at {self.reference}")
        except errors.EntryNotFoundError:
            record = b""  # a new repository, or one that something else was committed to
        return Head(record, commit, commit)

    def has(self, item: Item) -> bool:
        self._items[item.name] = item
        return item.name in self._present([item], self._commit)

    def send(self, item: Item) -> None:
        self._call(self._api.create_repo, self.reference.place, exist_ok=True)
        self._items[item.name] = item
        operation = _addition(item)
        # Large files go now, by digest; small ones travel with the commit itself, and so does a
        # new branch: until its first commit it would show the release that it was branched from.
        self._call(
            self._api.preupload_lfs_files, self.reference.place, additions=[operation],
            revision=self._revision if self._there else DEFAULT_REVISION, free_memory=False,
        )
        self._uploaded[item.name] = operation

    def read(self, name: str, entry: FileEntry, start: int) -> Iterator[bytes]:
        with self._translated():
            yield from self._blocks(name, start, self._commit)

    def point(self, tag: str, release: Release, record: bytes, expected: Head | None) -> Head:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

        expected = expected or self._begin()
        at = expected.version if expected else None
        there = self._present(list(self._items.values()), at) if at else set()
        operations: list[Any] = [
            self._uploaded.get(name) or _addition(item)
            for name, item in sorted(self._items.items())
            if name not in there
        ]
        for operation in operations:  # the client has read the files itself
            item = self._items[operation.path_in_repo]
            if operation.upload_info.sha256.hex() != item.entry.sha256:
                raise changed(item.path)
        manifest = manifests.loads(self._items[MANIFEST].path.read_bytes())
        text = card(manifest, release, self.reference).encode()
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
            for name, data in ((RELEASE, record), (CARD, text))
        ]
        stale = _files(expected) - set(self._items) - {RELEASE}
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        try:
            done = self._call(
                self._api.create_commit, self.reference.place, operations=operations,
                commit_message=f"Publish {release.format} {release.artifact[:12]}",
                revision=self._revision, parent_commit=at,
            )
        except errors.HfHubHTTPError as error:
            if getattr(error.response, "status_code", 0) in (409, 412):
                raise TagMoved(f"{self.reference} moved") from None
            raise
        self._commit = str(done.oid)
        return Head(record, self._commit, self._commit)

    def _present(self, items: Sequence[Item], commit: str) -> set[str]:
        """Names of the items that are in a commit with these bytes."""
        from huggingface_hub import errors

        wanted = {item.name: item for item in items}
        try:
            found = self._call(
                self._api.get_paths_info, self.reference.place, list(wanted), revision=commit
            )
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return set()
        return {info.path for info in found if _same(info, wanted[info.path])}

    def _begin(self) -> Head | None:
        """Make the repository, and its branch where the default one is; what to commit on.

        Whoever made the branch, or committed to it, meanwhile: the commit's parent tells.
        """
        self._call(self._api.create_repo, self.reference.place, exist_ok=True)
        start = self._at(DEFAULT_REVISION)
        if self._revision != DEFAULT_REVISION:
            self._call(
                self._api.create_branch, self.reference.place, branch=self._revision,
                revision=start.version if start else None, exist_ok=True,
            )
        elif start and start.release:
            raise TagMoved(f"{self.reference} moved")
        return start

    def _blocks(self, name: str, start: int, commit: str) -> Iterator[bytes]:
        return _stream(self._api, self.reference.place, name, commit, start)

    def _call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        with self._translated():
            return method(*arguments, **options)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Tell what the client raises where its environment is to blame."""
        from huggingface_hub import errors

        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise DestinationUnreachable(
                "the hub client is offline", hint="unset HF_HUB_OFFLINE"
            ) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError):
                raise DestinationUnreachable(
                    f"{self.reference}: access was refused ({told(error)})",
                    hint="set HF_TOKEN to a token that may write",
                ) from None
            raise


def card(manifest: Manifest, release: Release, reference: Reference) -> str:
    """The model card: what this is, what is proven, how to check it."""
    source, parity = manifest.source, manifest.parity
    words = ", ".join(release.allowed)
    allowed = f"\n**Published although: {words}.**\n" if words else ""
    base = "" if "/" not in source.model or source.model.startswith(("/", ".")) else (
        f"base_model: {source.model}\n"
    )
    verdict = "not validated" if parity is None else (
        f"{parity.verdict} ({parity.comparisons:,} comparisons with the original)"
    )
    random = " with **random weights**" if source.weights == "random" else ""
    files = "\n".join(
        f"| {path} | {entry.size:,} | `{entry.sha256}` |"
        for path, entry in sorted(release.files.items())
    )
    return (
        f"---\n{base}library_name: {manifest.format}\ntags:\n- modelport\n- {source.task}\n---\n\n"
        f"# {reference.place}\n\n"
        f"{source.model}{random} exported to {manifest.format} by modelport.\n{allowed}"
        f"\n- parity with its source: {verdict}\n- source sha256: `{source.digest}`\n"
        f"- artifact: `{release.artifact}`\n\n"
        f"    modelport pull {reference} DIRECTORY\n\n"
        f"| file | bytes | sha256 |\n| --- | --- | --- |\n{files}\n"
    )


def _same(info: Any, item: Item) -> bool:
    """Whether a file on the hub has an item's bytes: by sha256, or by git's digest if small."""
    if getattr(info, "size", None) != item.entry.size:
        return False
    lfs = getattr(info, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == item.entry.sha256)
    data = item.path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return bool(info.blob_id == git)


def _files(head: Head | None) -> set[str]:
    if head is None or not head.release:
        return set()
    try:
        return set(loads(head.release).files)
    except UsageError:
        return set()


def _addition(item: Item) -> Any:
    """An item as a part of a commit; a small one by its bytes, which nothing can change then."""
    from huggingface_hub import CommitOperationAdd

    small = item.entry.size <= BLOCK
    content: bytes | str = item.path.read_bytes() if small else str(item.path)
    return CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=content)


def _stream(api: Any, repository: str, name: str, commit: str, start: int) -> Iterator[bytes]:
    """A file's bytes from ``start`` as they arrive, so that the caller can stop at any.

    The client's own download writes whatever comes, and begins anew after a cut connection.
    """
    from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status

    url = hf_hub_url(repository, name, revision=commit, endpoint=api.endpoint)
    headers = {"Accept-Encoding": "identity"}
    if token := api.token or get_token():
        headers["Authorization"] = f"Bearer {token}"  # not passed on to where the hub redirects
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream(
        "GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
    ) as answer:
        hf_raise_for_status(answer)
        skip = start if answer.status_code == 200 else 0  # a server without ranges
        for block in answer.iter_bytes(_PIECE):
            yield block[skip:]
            skip = max(0, skip - len(block))


def _api() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the command line has its own, which -q silences
    return HfApi()


DESTINATION = HubRepository
