"""An HTTP proxy on 127.0.0.1 in front of a real server, which fails on request."""

from __future__ import annotations

import contextlib
import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, BinaryIO, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOOD = 256 << 20
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


def flood(file: BinaryIO, told: list[int]) -> None:
    """Write :data:`FLOOD` bytes, or as many as somebody takes; those are told."""
    with contextlib.suppress(OSError):
        for _ in range(FLOOD >> 20):
            file.write(bytes(1 << 20))
            told.append(1 << 20)


@dataclass
class Fault:
    """What goes wrong, for which requests and how often.

    Attributes:
        kind: ``cut-request`` passes half of the body on and hangs up; ``cut-response`` does so
            with the answer; ``status`` answers ``code`` itself; ``corrupt`` flips a bit of it;
            ``endless`` sends :data:`FLOOD` bytes after it.
        method, path: a request matches when its method is this and its path contains that.
        least: bytes of the body below which the fault does not strike.
        times: how often it strikes; -1 for ever.
    """

    kind: Literal["cut-request", "cut-response", "status", "corrupt", "endless"]
    method: str
    path: str
    times: int = 1
    least: int = 1000
    code: int = 500
    struck: int = field(default=0, init=False)


class Proxy(ThreadingHTTPServer):
    """Attributes:
        faults: what to do; may be changed at any time.
        log: (method, path, request body size, Range header) of every request.
        flooded: bytes that somebody took of what is endless.
    """

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int, str]] = []
        self.flooded: list[int] = []
        self.lock = threading.Lock()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def sent(self, method: str, path: str) -> int:
        """Bytes of request bodies that matching requests announced."""
        return sum(size for m, p, size, _ in self.log if m == method and path in p)

    def strike(self, method: str, path: str, size: int, kinds: set[str]) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if (fault.kind in kinds and fault.method == method and fault.path in path
                        and size >= fault.least and fault.struck != fault.times):
                    fault.struck += 1
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away are the point


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _pass(self) -> None:
        proxy = self.server
        size = int(self.headers.get("Content-Length") or 0)
        proxy.log.append((self.command, self.path, size, self.headers.get("Range", "")))
        fault = proxy.strike(self.command, self.path, size, {"cut-request"})
        connection = http.client.HTTPConnection(*proxy.upstream, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True,
                                  skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    connection.putheader(name, value)
            connection.endheaders()
            body = self.rfile.read(size // 2 if fault else size)
            if fault:
                connection.send(body)
                self.close_connection = True
                return None
            status = proxy.strike(self.command, self.path, 1 << 40, {"status"})
            if status:
                return self._send(status.code, {}, b"<html>oops</html>", None)
            connection.send(body)
            answer = connection.getresponse()
            data = answer.read()
            found = proxy.strike(self.command, self.path, len(data),
                                 {"cut-response", "corrupt", "endless"})
            if found and found.kind == "corrupt":
                data = data[:-1] + bytes([data[-1] ^ 1])
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
            length = int(answer.getheader("Content-Length") or len(data))
            length += FLOOD if found and found.kind == "endless" else 0
            self._send(answer.status, headers, data, found, length)
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None,
              length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if fault and fault.kind == "cut-response":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)
        if fault and fault.kind == "endless":
            flood(self.wfile, self.server.flooded)

    do_GET = _pass  # noqa: N815 - the names that the base class looks for
    do_HEAD = _pass  # noqa: N815
    do_PUT = _pass  # noqa: N815
    do_POST = _pass  # noqa: N815
    do_PATCH = _pass  # noqa: N815
    do_DELETE = _pass  # noqa: N815


@contextlib.contextmanager
def proxied(upstream: tuple[str, int]) -> Iterator[Proxy]:
    """Run a proxy for the time of a block."""
    proxy = Proxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
