"""Real servers on 127.0.0.1, each a process of its own: an OCI registry, S3, GCS, Azure, SFTP."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REGISTRY = shutil.which("docker-registry")
AZURITE = shutil.which("azurite-blob")
NO_AZURITE = "azurite-blob is not installed (npm install --global azurite)"
NO_REGISTRY = "docker-registry is not installed (Debian: apt-get install docker-registry)"

_CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}", secret: for-tests-only}}
"""


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[tuple[str, int]]:
    """Debian's docker-registry with its files below a directory."""
    port = _free_port()
    config = directory / "registry.yml"
    config.write_text(_CONFIG.format(root=directory / "data", port=port))
    with _running([str(REGISTRY), "serve", str(config)], port, "/v2/"):
        yield "127.0.0.1", port


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, int]]:
    """moto's S3 server with a bucket named ``models``."""
    port = _free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1",
               "-p", str(port)]
    with _running(command, port, "/moto-api/"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/models", headers={"Content-Length": "0"})
        assert connection.getresponse().status == 200
        connection.close()
        yield "127.0.0.1", port


@contextlib.contextmanager
def gcs(directory: Path) -> Iterator[tuple[str, int]]:
    """A Google Cloud Storage emulator with a bucket named ``models``."""
    port = _free_port()
    command = [sys.executable, "-W", "ignore", "-m", "gcp_storage_emulator", "--data-dir",
               str(directory), "start", "--host", "127.0.0.1", "--port", str(port), "-q",
               "--default-bucket", "models"]
    with _running(command, port, "/storage/v1/b"):
        yield "127.0.0.1", port


@contextlib.contextmanager
def azure(directory: Path) -> Iterator[tuple[str, int]]:
    """Microsoft's emulator of Azure's blob storage."""
    port = _free_port()
    command = [str(AZURITE), "--location", str(directory), "--blobHost", "127.0.0.1", "--blobPort",
               str(port), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _running(command, port, "/"):
        yield "127.0.0.1", port


@contextlib.contextmanager
def sftp(directory: Path) -> Iterator[int]:
    """An SSH server whose root is ``files``; ``client`` and ``host.pub`` are keys. Its port."""
    port = _free_port()
    script = Path(__file__).with_name("sftp_server.py")
    with _running([sys.executable, str(script), str(port), str(directory)], port, None):
        yield port


@contextlib.contextmanager
def _running(command: list[str], port: int, path: str | None) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(process, port, path)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], port: int, path: str | None) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            if path is None:
                connection.connect()
            else:
                connection.request("GET", path)
                connection.getresponse().read()
        except OSError:
            time.sleep(0.05)
        else:
            return
        finally:
            connection.close()
    raise RuntimeError(f"{process.args} did not answer")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
