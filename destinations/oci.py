"""A repository in an OCI registry: ``oci://registry/name[:tag]``, in the ModelPack layout.

Each file is a layer of its own with its path as an annotation, so that other clients of the
ModelPack specification (CNCF model-spec v1) can pull it. Requests go through oras, which knows the
registries' ways to authenticate; its transfers are not used: it reads whole files into memory
when sending, and does not check digests when receiving.

The distribution specification has no compare-and-swap on tags. The tag is read right before it is
moved, and where the registry names an entity tag the move is made conditional on it (RFC 9110,
If-Match): a registry that honours that swaps in one step, the others ignore it. With an expectation
the tag is read again afterwards. Without one, the last of several publishers wins, with a complete
release.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit

from ..artifacts import MANIFEST
from ..artifacts.digest import open_regular
from ..artifacts.release import PROVENANCE, RELEASE, SIGNATURE, entry_of
from ..errors import (
    BackendUnavailable,
    DestinationUnreachable,
    DigestMismatch,
    StorageError,
    TagMoved,
    UsageError,
)
from . import retry
from .base import BLOCK, Head, Item, Reference, Repository, bounded, changed
from .retry import Transient, redacted, told, transient

if TYPE_CHECKING:
    from ..artifacts import FileEntry
    from ..artifacts.release import Release

# CNCF model-spec v1, docs/spec.md and docs/annotations.md
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE: Final = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE: Final = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE: Final = "application/vnd.cncf.model.doc.v1.raw"
FILE_PATH: Final = "org.cncf.model.filepath"
# OCI image-spec v1.1, manifest.md
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"

_WEIGHTS = (".onnx", ".safetensors", ".data", ".pt", ".pt2", ".plan", ".engine", ".bin", ".xml")
_RECORDS = frozenset({RELEASE, PROVENANCE, SIGNATURE, MANIFEST})
_MAX_MANIFEST = 4 << 20  # the specification's own lower bound for what registries must accept
_TIMEOUT = 60.0
_PIECE = 1 << 16  # received at a time: what a cut connection loses
_STALLS = 3  # attempts to send the same piece in one upload before starting another


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A manifest as the registry serves it; its entity tag, if it has one, is for a swap."""

    data: bytes
    digest: str
    etag: str


class Registry(Repository):
    """Blobs by digest and a manifest by tag, each request checked."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        host, _, name = reference.place.partition("/")
        if not host or not name:
            raise UsageError(f"{reference} names no repository", allowed="oci://registry/name:tag")
        if name != name.lower():  # OCI distribution-spec, "Pulling manifests"
            raise UsageError(f"{reference} has capital letters, which no repository's name has",
                             hint=f"oci://{host}/{name.lower()}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from oras.provider import Registry as Client
        except ImportError as error:
            raise BackendUnavailable(
                f"oci: needs oras, and {error.name or error} is not installed",
                hint='pip install "modelport[publish]"',
            ) from error
        local = (urlsplit(f"//{host}").hostname or "") in ("localhost", "127.0.0.1", "::1")
        self._client = Client(hostname=host, insecure=local)
        # Without oras's own repetition, which sleeps for two minutes at every 500.
        self._request = functools.partial(inspect.unwrap(Client.do_request), self._client)
        session = self._client.session
        # oras sets no time limit, and a compressed answer could not be resumed by its offset.
        session.request = functools.partial(session.request, timeout=_TIMEOUT)
        session.headers["Accept-Encoding"] = "identity"
        self._moving = 0.0  # seconds that the last move of a tag took
        self._url = f"{'http' if local else 'https'}://{host}/v2/{name}/"
        # Loads the user's stored credentials for this registry, as the usual tools write them.
        self._client.auth.load_configs(self._client.get_container(f"{host}/{name}"))

    def head(self, tag: str) -> Head | None:
        found = self._manifest(tag)
        if found is None:
            return None
        digest = found.digest
        try:
            layers = json.loads(found.data)["layers"]
            named = {layer["annotations"][FILE_PATH]: layer for layer in layers}
            record = named[RELEASE]
            sha, size = record["digest"].removeprefix("sha256:"), int(record["size"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{self.reference} is no release of modelport's", hint="check the reference"
            ) from None
        if size > _MAX_MANIFEST:
            raise UsageError(f"the release record at {self.reference} has {size} bytes")
        release = bounded(self._blob(sha, 0, size), size, f"the release record at {self.reference}")
        if entry_of(release).sha256 != sha:
            raise DigestMismatch(
                f"{self.reference} serves a damaged release record", allowed=f"sha256 {sha}",
                hint="publish again with --resend",
            )
        return Head(release, digest, digest)

    def has(self, item: Item) -> bool:
        with self._ask("HEAD", f"blobs/sha256:{item.entry.sha256}", (200, 404)) as answer:
            return answer.status_code == 200 and self._length(answer) in (None, item.entry.size)

    def send(self, item: Item) -> None:
        with os.fdopen(open_regular(item.path), "rb") as file:
            self._upload(file, item.entry, item.path)

    def read(self, name: str, entry: FileEntry, start: int) -> Iterator[bytes]:
        try:
            yield from self._blob(entry.sha256, start, entry.size)
        except FileNotFoundError:
            raise DigestMismatch(
                f"{self.reference} lacks {name} (sha256 {entry.sha256})", hint="publish it again"
            ) from None

    def mend(self, record: bytes) -> None:
        self._upload_bytes(record)

    def point(self, tag: str, release: Release, record: bytes, expected: Head | None) -> Head:
        config = _config(release)
        for data in (record, config):
            self._upload_bytes(data)
        manifest = _manifest_of(release, record, config)
        digest = f"sha256:{entry_of(manifest).sha256}"
        # By digest first: even where another publisher takes the tag, this release can be pulled.
        self._put(digest, manifest, {})
        start = time.monotonic()
        found = self._manifest(tag)
        if (found.digest if found else None) != (expected.digest if expected else None):
            raise TagMoved(f"the tag {tag} moved")
        if found is None:
            condition = {"If-None-Match": "*"}
        else:
            condition = {"If-Match": found.etag} if found.etag else {}
        self._put(tag, manifest, condition)
        self._moving = time.monotonic() - start
        return Head(record, digest, digest)

    def settle(self, tag: str, head: Head) -> None:
        # Who read the tag before it was moved here will have moved it by then, if no slower.
        time.sleep(self._moving)
        found = self._manifest(tag)
        at = found.digest if found else "none"
        if at != head.digest:
            raise TagMoved(
                f"{self.reference} points at {at}: another publisher moved it at the same moment",
                allowed=head.digest,
                hint=f"the release is complete and can be pulled as @{head.digest}; "
                "pull what is there now, decide, and publish with --expect of it",
            )

    def _put(self, name: str, manifest: bytes, condition: Mapping[str, str]) -> None:
        with self._ask("PUT", f"manifests/{name}", (200, 201, 412), data=manifest,
                       headers={"Content-Type": MANIFEST_TYPE, **condition}) as answer:
            if answer.status_code == 412:
                raise TagMoved(f"the tag {name} moved")

    def _manifest(self, name: str) -> _Manifest | None:
        with self._ask("GET", f"manifests/{name}", (200, 404),
                       headers={"Accept": MANIFEST_TYPE}, stream=True) as answer:
            if answer.status_code == 404:
                return None
            data = bounded(answer.iter_content(_PIECE), _MAX_MANIFEST, "the registry's manifest")
        digest = f"sha256:{entry_of(data).sha256}"
        claimed = answer.headers.get("Docker-Content-Digest", digest)
        if claimed != digest or (name.startswith("sha256:") and name != digest):
            raise Transient(f"the manifest {name} arrived damaged")
        etag = answer.headers.get("ETag", "")
        # One that something in between made up would never match again.
        return _Manifest(data, digest, etag if etag == f'"{digest}"' else "")

    def _blob(self, sha: str, start: int, size: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-{size - 1}"} if start else {}
        if start >= size:
            return
        with self._ask("GET", f"blobs/sha256:{sha}", (200, 206, 404), headers=headers,
                       stream=True) as answer:
            if answer.status_code == 404:
                raise FileNotFoundError(sha)
            skip = start if answer.status_code == 200 else 0  # a registry without ranges
            for block in answer.iter_content(_PIECE):
                yield block[skip:]
                skip = max(0, skip - len(block))

    def _upload_bytes(self, data: bytes) -> None:
        import io

        self._upload(io.BytesIO(data), entry_of(data), Path("bytes in memory"))

    def _upload(self, file: Any, entry: FileEntry, path: Path) -> None:
        """Send in pieces; after a cut connection the registry says how far it came."""
        with self._ask("POST", "blobs/uploads/", (202,)) as answer:
            where = self._location(answer)
        sha, done, stalls = hashlib.sha256(), 0, 0
        while done < entry.size:
            file.seek(done)
            block = file.read(BLOCK)
            if not block:
                break
            headers = {"Content-Type": "application/octet-stream",
                       "Content-Range": f"{done}-{done + len(block) - 1}"}
            try:
                with self._ask("PATCH", where, (202, 204), data=block, headers=headers) as answer:
                    where = self._location(answer)
                arrived = done + len(block)
            except (OSError, Transient) as error:
                if transient(error) and stalls < _STALLS:
                    time.sleep(retry.FIRST_PAUSE * 2**stalls)
                else:
                    raise
                arrived, where = self._progress(where, done, len(block))
            stalls = stalls + 1 if arrived == done else 0
            sha.update(block[: arrived - done])
            done = arrived
        if sha.hexdigest() != entry.sha256:
            raise changed(path)
        joint = "&" if "?" in where else "?"
        with self._ask("PUT", f"{where}{joint}digest=sha256:{entry.sha256}", (201, 204)):
            pass

    def _progress(self, where: str, done: int, sent: int) -> tuple[int, str]:
        """How many bytes have arrived, after an attempt to send ``sent`` more than ``done``."""
        with self._ask("GET", where, (204,)) as answer:
            last = answer.headers.get("Range", "").rpartition("-")[2]
            arrived = int(last) + 1 if last.isdecimal() and last != "0" else done
            where = self._location(answer)
        if not done <= arrived <= done + sent:
            raise Transient("the registry lost part of the upload")
        return arrived, where

    def _location(self, answer: Any) -> str:
        where = answer.headers.get("Location")
        if not where:
            raise Transient("the registry gave no place to upload to")
        return urljoin(str(answer.url), str(where))

    @staticmethod
    def _length(answer: Any) -> int | None:
        text = answer.headers.get("Content-Length", "")
        return int(text) if text.isdecimal() else None

    def _ask(
        self, method: str, path: str, expected: tuple[int, ...], *, data: bytes | None = None,
        headers: Mapping[str, str] | None = None, stream: bool = False,
    ) -> Any:
        """One request; the answer is to be used as a context.

        Raises:
            Transient: a 5xx, 408, 425 or 429.
            StorageError: 507 or 413: the registry has no room.
            DestinationUnreachable: any other status that was not expected.
        """
        url = urljoin(self._url, path)
        _require_same_host(url, self._url)
        try:
            answer = self._request(
                url, method, data=data, headers=dict(headers or {}), stream=stream
            )
        except Exception as error:
            if type(error).__name__ != "AuthenticationException":
                raise
            raise self._refused(told(error)) from None
        status = answer.status_code
        if status in expected:
            return answer
        start = next(answer.iter_content(200), b"").decode("utf-8", "replace")
        text = redacted(start.strip().replace("\n", " "))
        answer.close()
        if status in (413, 507):
            raise StorageError(f"the registry has no room: {status} {text}")
        if status in (401, 403):
            raise self._refused(str(status))
        # 416 and 404 on an upload: the session is gone or out of step, a new one will do.
        lost = status in (404, 416) and "uploads" in path
        if status >= 500 or status in (408, 425, 429) or lost:
            raise Transient(f"{method} was answered by {status} {text}")
        raise DestinationUnreachable(f"{self.reference}: {method} was answered by {status} {text}")

    def _refused(self, why: str) -> DestinationUnreachable:
        return DestinationUnreachable(
            f"{self.reference}: access was refused ({why})",
            hint="log in to the registry with its usual tool, such as `oras login`",
        )


def _require_same_host(url: str, base: str) -> None:
    """A token must not follow a location to another machine without encryption."""
    there, here = urlsplit(url), urlsplit(base)
    if there.scheme == "http" and (here.scheme != "http" or there.hostname != here.hostname):
        raise DestinationUnreachable(
            f"the registry sends uploads to {there.hostname} without encryption",
            allowed="https, or the registry itself",
        )


def _config(release: Release) -> bytes:
    """The ModelPack config: what kind of model this is, without a date."""
    document = {
        "descriptor": {"name": release.artifact[:12]},
        "config": {"format": release.format},
        "modelfs": {
            "type": "layers",
            "diffIds": [f"sha256:{e.sha256}" for _, e in sorted(release.files.items())],
        },
    }
    return json.dumps(document, sort_keys=True).encode()


def _manifest_of(release: Release, record: bytes, config: bytes) -> bytes:
    files = {**release.files, RELEASE: entry_of(record)}
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor(CONFIG_TYPE, entry_of(config)),
        "layers": [
            {**_descriptor(_media_type(name), entry), "annotations": {FILE_PATH: name}}
            for name, entry in sorted(files.items())
        ],
        "annotations": {"modelport.allowed": ",".join(release.allowed)},
    }
    return json.dumps(document, sort_keys=True).encode()


def _descriptor(media_type: str, entry: FileEntry) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{entry.sha256}", "size": entry.size}


def _media_type(name: str) -> str:
    if name in _RECORDS or name.endswith((".md", ".txt")):
        return DOC_TYPE
    return WEIGHT_TYPE if name.endswith(_WEIGHTS) else WEIGHT_CONFIG_TYPE


DESTINATION = Registry
