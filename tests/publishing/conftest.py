"""Artifacts to publish, and places to publish them to: a file tree, a registry, a bucket."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faulty_proxy
import pytest
import real_servers
from modelport import artifacts
from modelport.destinations import retry

FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"


@dataclass
class Place:
    """Somewhere to publish to.

    Attributes:
        kind: ``file``, ``oci`` or ``s3``.
        url: of a repository of this test's own.
        proxy: what stands between; None for a file tree.
        data: directory that holds a local one's files.
    """

    kind: str
    url: str
    proxy: faulty_proxy.Proxy | None = None
    data: Path | None = None


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.002)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody's credentials


@pytest.fixture
def proven(tmp_path: Path) -> Path:
    """A proven artifact that may be changed."""
    return Path(shutil.copytree(FROZEN, tmp_path / "proven"))


@pytest.fixture
def variant(proven: Path) -> Callable[[str], Path]:
    """``variant("a")`` → another unproven artifact, with a file of its own of 40 kB."""

    def make(name: str) -> Path:
        root = Path(shutil.copytree(proven, proven.with_name(f"variant-{name}")))
        (root / "notes.txt").write_text(name * (40_000 // len(name)))
        manifest = artifacts.read(root).manifest
        artifacts.write_manifest(
            root, dataclasses.replace(manifest, files=artifacts.collect(root))
        )
        return root

    return make


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    if real_servers.REGISTRY is None:
        pytest.skip(real_servers.NO_REGISTRY)
    pytest.importorskip("oras")
    with real_servers.registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="session")
def bucket() -> Iterator[tuple[str, int]]:
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with real_servers.s3() as address:
        yield address


@pytest.fixture(params=["file", "oci", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """Each kind of repository, empty; the remote ones behind a proxy that can fail."""
    name = secrets.token_hex(8)
    if request.param == "file":
        yield Place("file", f"file://{tmp_path}/repository", data=tmp_path / "repository")
        return
    server = "registry" if request.param == "oci" else "bucket"
    with faulty_proxy.proxied(request.getfixturevalue(server)) as proxy:
        if request.param == "oci":
            yield Place("oci", f"oci://{proxy.netloc}/tests/{name}", proxy)
            return
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "for-tests-only")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.netloc}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield Place("s3", f"s3://models/{name}", proxy)
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def tags(registry: tuple[str, int]) -> Iterator[Place]:
    """A registry's repository, for what only registries do."""
    with faulty_proxy.proxied(registry) as proxy:
        yield Place("oci", f"oci://{proxy.netloc}/tests/{secrets.token_hex(8)}", proxy)
