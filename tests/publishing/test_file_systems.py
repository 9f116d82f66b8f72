"""Every other file system: memory, an SSH server, and the emulators of two clouds."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_proxy
import pytest
import real_servers
from faulty_proxy import Fault
from modelport.destinations import Reference, open_repository
from modelport.errors import DestinationUnreachable, TagMoved, UnsafeError, UsageError
from modelport.pipeline.publishing import Gate, publish, pull

ANY = Gate(allow_unproven=True)
AZURITE_KEY = (  # public: in the emulator's documentation, the same for everyone
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    pytest.importorskip("asyncssh", reason="asyncssh is not installed")
    pytest.importorskip("paramiko", reason="paramiko is not installed")
    directory = tmp_path_factory.mktemp("ssh")
    with real_servers.sftp(directory) as port:
        yield port, directory


@pytest.fixture
def sftp(ssh: tuple[int, Path], tmp_path: Path) -> str:
    """A place on the server, with this user's key and the server's known."""
    port, directory = ssh
    configuration = tmp_path / "home" / ".ssh"
    configuration.mkdir(parents=True)
    shutil.copy(directory / "client", configuration / "id_ed25519")
    key = (directory / "host.pub").read_text()
    (configuration / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    return f"sftp://me@127.0.0.1:{port}/{secrets.token_hex(8)}"


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with real_servers.gcs(tmp_path_factory.mktemp("gcs")) as address:
        yield address


@pytest.fixture
def gcs(
    gcs_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[faulty_proxy.Proxy]:
    import gcsfs

    with faulty_proxy.proxied(gcs_server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{proxy.netloc}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield proxy
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    if real_servers.AZURITE is None:
        pytest.skip(real_servers.NO_AZURITE)
    pytest.importorskip("adlfs", reason="adlfs is not installed")
    with real_servers.azure(tmp_path_factory.mktemp("azure")) as address:
        yield address


@pytest.fixture
def azure(azure_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import adlfs

    host, port = azure_server
    account = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};"
        f"BlobEndpoint=http://{host}:{port}/devstoreaccount1;"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    files = adlfs.AzureBlobFileSystem(connection_string=account, skip_instance_cache=True)
    with contextlib.suppress(FileExistsError):
        files.mkdir("models")
    yield
    adlfs.AzureBlobFileSystem.clear_instance_cache()


@pytest.fixture(params=["memory", "sftp", "gs", "az"])
def url(request: pytest.FixtureRequest) -> str:
    name = secrets.token_hex(8)
    if request.param == "memory":
        return f"memory://{name}/models"
    if request.param == "sftp":
        return str(request.getfixturevalue("sftp"))
    request.getfixturevalue("gcs" if request.param == "gs" else "azure")
    return f"{request.param}://models/{name}"


def test_published_once_and_pulled(url: str, proven: Path, variant: Callable[[str], Path],
                                   tmp_path: Path) -> None:
    first = publish(proven, f"{url}:v1", expected="none")
    assert pull(f"{url}:v1", tmp_path / "a").digest == first.digest
    assert publish(proven, f"{url}:v2").sent == 0, "what is there is not sent again"
    with pytest.raises(TagMoved):
        publish(variant("b"), f"{url}:v1", ANY, expected="none")
    second = publish(variant("c"), f"{url}:v1", ANY, expected=first.digest)
    assert pull(f"{url}:v1", tmp_path / "b").digest == second.digest
    assert pull(f"{url}@{first.digest}", tmp_path / "c").digest == first.digest
    with pytest.raises(UsageError, match="nothing is published"):
        pull(f"{url}:absent", tmp_path / "d")


def test_several_publishers_end_in_one_consistent_state(
    url: str, variant: Callable[[str], Path], tmp_path: Path
) -> None:
    done: list[str] = []
    failures: list[BaseException] = []

    def one(root: Path) -> None:
        try:
            done.append(publish(root, url, ANY).digest)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=one, args=(variant(f"n{i}"),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(done) == 6
    assert pull(url, tmp_path / "pulled").digest in done


def test_a_name_is_given_to_one_publisher_only(url: str) -> None:
    repository = open_repository(Reference.parse(url))
    repository.create("tags/latest/00000001", b"first")
    if url.startswith("gs:"):
        pytest.skip("the emulator lacks ifGenerationMatch; see the test of what is asked for")
    with pytest.raises(FileExistsError):
        repository.create("tags/latest/00000001", b"second")
    assert repository.load("tags/latest/00000001", 99) == b"first"


def test_a_bucket_of_gcs_is_asked_for_exclusive_creation(
    gcs: faulty_proxy.Proxy, proven: Path
) -> None:
    url = f"gs://models/{secrets.token_hex(8)}"
    publish(proven, url)
    asked = [path for method, path, *_ in gcs.log if "ifGenerationMatch=0" in path]
    assert len(asked) == 1, "for the tag, and for nothing else"
    lost = Fault("status", "POST", "ifGenerationMatch=0", times=3, least=0, code=412)
    gcs.faults = [lost]
    publish(proven, f"{url}:other")
    assert lost.struck == 3, "a swap that another won is tried again"
    gcs.faults = [Fault("status", "POST", "ifGenerationMatch=0", least=0, code=412)]
    repository = open_repository(Reference.parse(url))
    with pytest.raises(FileExistsError):
        repository.create("tags/latest/00000009", b"x")


def test_a_connection_that_is_cut_is_made_again(
    sftp: str, proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramiko

    cuts = []

    def cutting(method: str) -> None:
        real = getattr(paramiko.SFTPFile, method)

        def cut(self: paramiko.SFTPFile, *arguments: object) -> object:
            if len(cuts) < 2:
                cuts.append(method)
                self.sftp.get_channel().get_transport().close()
            return real(self, *arguments)

        monkeypatch.setattr(paramiko.SFTPFile, method, cut)

    cutting("write")
    publish(proven, sftp)
    assert cuts == ["write", "write"]
    cuts.clear()
    cutting("read")
    pull(sftp, tmp_path / "pulled")
    assert cuts == ["read", "read"]


def test_a_server_with_another_key_is_refused(sftp: str, proven: Path, tmp_path: Path) -> None:
    known = tmp_path / "home" / ".ssh" / "known_hosts"
    name, kind, _ = known.read_text().split()[:3]
    other = (tmp_path / "home" / ".ssh" / "other")
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_public_key(other)
    for text in ("", f"{name} {kind} {other.read_text().split()[1]}\n"):
        known.write_text(text)
        with pytest.raises(UnsafeError, match="known_hosts") as caught:
            publish(proven, sftp)
        assert caught.value.exit_code == 4


def test_a_key_that_the_server_does_not_know(sftp: str, proven: Path, tmp_path: Path) -> None:
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    with pytest.raises(DestinationUnreachable, match="access was refused") as caught:
        publish(proven, sftp)
    assert caught.value.exit_code == 6


def test_ssh_is_the_same_as_sftp(sftp: str, proven: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / ".ssh" / "known_hosts").unlink()
    with pytest.raises(UnsafeError, match="known_hosts"):
        publish(proven, sftp.replace("sftp:", "ssh:"))


def test_nobody_answers(proven: Path) -> None:
    pytest.importorskip("paramiko")
    with pytest.raises(DestinationUnreachable, match="failed 6 times"):
        publish(proven, f"sftp://me@127.0.0.1:{real_servers._free_port()}/models")
