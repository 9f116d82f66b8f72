"""The part of the model hub's HTTP interface that publishing uses, on 127.0.0.1.

Written after what ``huggingface_hub`` sends and expects; it keeps commits by parent and large files
by sha256, and refuses a commit whose parent is not the branch's head, as the hub does.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import faulty_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = 10_000
"""Bytes above which a file is stored by its sha256."""


@dataclass
class Hub:
    """Attributes:
        branches: head of each branch; commits: files of each commit; blobs: large files by sha256.
        uploads: sha256 of every large file that was sent.
        log: method and path of each request, with whether it carried the token.
        fail: answer that many requests that change something with 500 first.
        endless: name of a file that has no end; flooded: bytes that somebody took of it.
    """

    url: str = ""
    created: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    log: list[tuple[str, str, bool]] = field(default_factory=list)
    fail: int = 0
    endless: str = ""
    flooded: list[int] = field(default_factory=list)

    def at(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = repr((len(self.commits), sorted(files)))
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.server.hub
        body = self._body()
        path = unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization") == "Bearer hf_for_tests_only"
        hub.log.append((self.command, path, token))
        if hub.fail and (path.startswith("/lfs/") or "/commit/" in path):
            hub.fail -= 1
            return self._send(500, {"error": "oops"})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            known, hub.created = hub.created, True
            if not known:  # the hub's own first commit
                hub.commit("main", {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs\n"})
            return self._send(409 if known else 200, {"url": f"{hub.url}/team/tiny"})
        if path == "/api/validate-yaml":  # of the model card
            return self._send(200, {"errors": [], "warnings": []})
        if not hub.created:
            return self._send(404, {}, {"X-Error-Code": "RepoNotFound"})
        if parts[:2] == ["api", "models"]:
            return self._api(parts[4], "/".join(parts[5:]), body)
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "lfs":
            hub.blobs[parts[1]] = body
            hub.uploads.append(hashlib.sha256(body).hexdigest())
            return self._send(200, {})
        if len(parts) < 5 or parts[2] != "resolve":
            raise NotImplementedError(f"{self.command} {path}")
        return self._resolve(parts[3], "/".join(parts[4:]))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _api(self, what: str, revision: str, body: bytes) -> None:
        hub = self.server.hub
        if what == "preupload":
            files = [{"path": f["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if f["size"] > LARGE else "regular"}
                     for f in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        if what == "commit":
            return self._commit(revision, [json.loads(line) for line in body.splitlines()])
        if what == "branch":
            known = revision in hub.branches
            if not known:
                start = hub.at(json.loads(body)["startingPoint"])
                assert start is not None
                hub.branches[revision] = start
            return self._send(409 if known else 200, {})
        commit = hub.at(revision)
        if commit is None:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            return self._send(200, {"id": "team/tiny", "sha": commit, "siblings": []})
        assert what == "paths-info", what
        files_there = hub.commits[commit]
        wanted = parse_qs(body.decode())["paths"]
        return self._send(200, [self._info(n, files_there[n]) for n in wanted if n in files_there])

    @staticmethod
    def _info(name: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
        if len(data) > LARGE:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                            "pointerSize": 130}
        return found

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server.hub
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = hub.branches.get(branch)
        if header.get("parentCommit") not in (None, head):
            return self._send(412, {"error": "the branch has moved"})
        files = dict(hub.commits[head]) if head else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hub.commit(branch, files)
        url = f"{hub.url}/team/tiny/commit/{oid}"
        return self._send(200, {"success": True, "commitOid": oid, "commitUrl": url,
                                "hookOutput": ""})

    def _batch(self, asked: dict[str, Any]) -> None:
        hub = self.server.hub
        objects = []
        for item in asked["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.blobs:
                found["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
            objects.append(found)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, revision: str, name: str) -> None:
        commit = self.server.hub.at(revision)
        if commit is None:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        data = self.server.hub.commits[commit].get(name)
        if data is None:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        start = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
        if start:
            return self._send(206, data[int(start):], headers)
        more = faulty_proxy.FLOOD if name == self.server.hub.endless else 0
        self._send(200, data, headers, more=more)
        if more:
            faulty_proxy.flood(self.wfile, self.server.hub.flooded)
        return None

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None, *,
              more: int = 0) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + more))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = _answer  # noqa: N815 - the names that the base class looks for
    do_HEAD = _answer  # noqa: N815
    do_POST = _answer  # noqa: N815
    do_PUT = _answer  # noqa: N815


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub for the time of a block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
