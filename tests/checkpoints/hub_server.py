"""A model hub on 127.0.0.1 with the few endpoints that a download uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one directory as the repository ``name``; ``requests`` are the paths asked for."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.files = {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(path)
        api, plain = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            listing = [{"rfilename": n} for n in hub.files]
            self._json({"id": hub.name, "sha": COMMIT, "siblings": listing}, body)
        elif path.startswith(f"{api}/tree/"):
            self._json([{"type": "file", "path": n, "size": len(data),
                         "oid": hashlib.sha1(data).hexdigest()}
                        for n, data in hub.files.items()], body)
        elif path.startswith(plain) and path.rpartition("/")[2] in hub.files:
            self._send(200, hub.files[path.rpartition("/")[2]], body)
        else:
            code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
            self._send(404, b"{}", body, {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serve(name: str, directory: Path) -> Iterator[Hub]:
    """Run a hub for the time of a block."""
    hub = Hub(name, directory)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
