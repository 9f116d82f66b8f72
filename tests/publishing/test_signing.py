"""Signatures: a bit, a name, a file more or less is refused before anything is parsed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from modelport import artifacts, destinations
from modelport.artifacts import release, signing, store
from modelport.cli import execute
from modelport.errors import DigestMismatch, PathEscape, SignatureRefused, UsageError
from modelport.pipeline import publishing
from modelport.pipeline.publishing import Gate, Signer, publish, pull

pytest.importorskip("model_signing", reason="model-signing is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
        )
        public = key.public_key().public_bytes(
            s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo
        )
        (directory / f"{name}.pem").write_bytes(private)
        (directory / f"{name}.pub").write_bytes(public)
    return directory


@pytest.fixture
def signed(proven: Path, tmp_path: Path, keys: Path) -> Path:
    publish(proven, f"file://{tmp_path}/repository", signer=Signer(keys / "ours.pem"))
    pull(f"file://{tmp_path}/repository", tmp_path / "signed", signer=keys / "ours.pub")
    return tmp_path / "signed"


def test_what_is_signed_verifies_with_its_key_alone(signed, keys, capsys):
    assert execute(["verify", str(signed), "--public-key", str(keys / "ours.pub")]) == 0
    assert "and signed" in capsys.readouterr().out
    assert execute(["verify", str(signed)]) == 0
    assert execute(["verify", str(signed), "--public-key", str(keys / "theirs.pub")]) == 4


def flip(root: Path, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    data[len(data) // 2] ^= 1
    (root / name).write_bytes(data)


def renamed(root: Path) -> None:
    (root / "config.json").rename(root / "config2.json")


def swapped_with_manifest(root: Path) -> None:
    """Another graph, and a manifest that names it: digests alone see nothing."""
    import dataclasses

    (root / "model.onnx").write_bytes(b"another graph")
    manifest = artifacts.read(root).manifest
    artifacts.write_manifest(root, dataclasses.replace(manifest, files=artifacts.collect(root)))


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda root, name=name: flip(root, name) for name in (
            "model.onnx", "model.safetensors", "manifest.json", "parity.json", "provenance.json",
            "signature.json")),
        lambda root: (root / "extra.bin").write_bytes(b"x"),
        lambda root: (root / ".gitignore").write_bytes(b"x"),
        lambda root: (root / "config.json").unlink(),
        renamed,
        swapped_with_manifest,
        lambda root: (root / "signature.json").unlink(),
        lambda root: (root / "signature.json").write_text("{}"),
        lambda root: (root / "signature.json").write_text("[" * 100_000),
    ],
)  # fmt: skip
def test_every_change_is_refused_before_anything_is_parsed(signed, keys, damage, monkeypatch):
    damage(signed)

    def parsed(*_):
        raise AssertionError("the manifest was parsed before the signature was checked")

    monkeypatch.setattr(store, "loads", parsed)
    with pytest.raises(SignatureRefused) as caught:
        publishing.verify(signed, signer=keys / "ours.pub")
    assert caught.value.exit_code == 4


def test_a_link_is_refused(signed, keys, tmp_path):
    shutil.move(signed / "config.json", tmp_path / "config.json")
    (signed / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(PathEscape):
        publishing.verify(signed, signer=keys / "ours.pub")


def test_pull_refuses_what_is_not_signed(proven, tmp_path, keys):
    publish(proven, f"file://{tmp_path}/plain")
    with pytest.raises(SignatureRefused, match="has no signature"):
        pull(f"file://{tmp_path}/plain", tmp_path / "pulled", signer=keys / "ours.pub")
    assert not (tmp_path / "pulled").exists()


def test_a_release_record_that_says_other_than_what_is_signed_is_refused(proven, tmp_path, keys):
    """The record is not signed: whoever serves it could leave out what was allowed."""
    url = f"file://{tmp_path}/r"
    artifacts.write_manifest(proven, dataclasses.replace(
        artifacts.read(proven).manifest, parity=None))
    publish(proven, url, Gate(allow_unproven=True), signer=Signer(keys / "ours.pem"))
    honest = pull(url, tmp_path / "honest", signer=keys / "ours.pub")
    assert honest.release.allowed == ("unproven",)
    repository = destinations.open_repository(destinations.Reference.parse(url))
    items = [destinations.Item(name, entry, tmp_path / "honest" / name)
             for name, entry in honest.release.files.items()]
    destinations.publish(repository, items, dataclasses.replace(honest.release, allowed=()))
    with pytest.raises(SignatureRefused, match=r"nothing was allowed.*signed says unproven"):
        pull(url, tmp_path / "pulled", signer=keys / "ours.pub")
    assert not (tmp_path / "pulled").exists()


def test_a_signature_is_carried_over_while_it_holds(signed, tmp_path, keys):
    publish(signed, f"file://{tmp_path}/second")
    pull(f"file://{tmp_path}/second", tmp_path / "again", signer=keys / "ours.pub")
    artifacts.with_report(artifacts.read(signed), artifacts.BENCHMARK, "{}")
    with pytest.raises(UsageError, match="not on the files"):
        publish(signed, f"file://{tmp_path}/second")


def test_a_relative_path_that_is_signed_again(proven, tmp_path, keys, monkeypatch):
    """As a user types it, and as a pipeline does at every release."""
    monkeypatch.chdir(tmp_path)
    for turn in ("v1", "v2"):
        command = ["publish", "proven", f"file://{tmp_path}/r:{turn}", "--private-key"]
        assert execute([*command, str(keys / "ours.pem")]) == 0
        (tmp_path / "proven" / release.PROVENANCE).write_text(turn)  # another, next time
        assert execute(["pull", f"file://{tmp_path}/r:{turn}", turn, "--public-key",
                        str(keys / "ours.pub")]) == 0
        assert execute(["verify", turn, "--public-key", str(keys / "ours.pub")]) == 0


LEFT = ("rejected.txt", ".parity.json.pending", ".provenance.json.tmp-7", ".signature.json.tmp-7",
        ".manifest.json.tmp-7", "..benchmark.json.pending.tmp-7")


def test_what_modelport_leaves_is_neither_signed_nor_in_the_way(proven, tmp_path, keys):
    """What says why it was rejected, and what a kill leaves of a write."""
    key = keys / "ours.pem"
    for name in LEFT:
        (proven / name).write_text("left")
    url = f"file://{tmp_path}/repository"
    command = ["publish", str(proven), url, "--allow-unproven", "--private-key", str(key)]
    assert execute(command) == 0
    public = ["--public-key", str(keys / "ours.pub")]
    assert execute(["verify", str(proven), *public]) == 0
    for name in LEFT:
        (proven / name).unlink()
    assert execute(["verify", str(proven), *public]) == 0
    (proven / LEFT[0]).write_text("left later")
    assert execute(["verify", str(proven), *public]) == 0
    assert execute(["pull", url, str(tmp_path / "pulled"), *public]) == 0
    assert not {p.name for p in (tmp_path / "pulled").iterdir()} & set(LEFT)


@pytest.mark.parametrize("problem", ["no key", "interrupted", "a file comes meanwhile"])
def test_signing_that_fails_leaves_what_was_there(
    signed, tmp_path, keys, monkeypatch, problem
):
    key, real = keys / "ours.pem", signing.sign
    if problem == "no key":
        key = keys / "ours.pub"

    def sign(root, private_key):
        if problem == "interrupted":
            raise KeyboardInterrupt
        if problem.startswith("a file"):
            (root / "late.bin").write_text("x")
        return real(root, private_key)

    monkeypatch.setattr(signing, "sign", sign)
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://host")  # so that the provenance is another
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "team/app/x.yml@v1")
    with pytest.raises((UsageError, KeyboardInterrupt, DigestMismatch)):
        publish(signed, f"file://{tmp_path}/second", signer=Signer(key))
    (signed / "late.bin").unlink(missing_ok=True)
    publishing.verify(signed, signer=keys / "ours.pub")


def test_what_is_no_key(proven, tmp_path, keys):
    url = f"file://{tmp_path}/repository"
    with pytest.raises(UsageError, match="private key"):
        publish(proven, url, signer=Signer(keys / "ours.pub"))
    publish(proven, url, signer=Signer(keys / "ours.pem"))
    with pytest.raises(UsageError, match="public key"):
        pull(url, tmp_path / "pulled", signer=keys / "ours.pem")


def test_keyless_says_what_it_needs(proven, monkeypatch):
    from modelport.errors import DestinationUnreachable

    class Config:
        def set_hashing_config(self, _):
            return self

        def use_sigstore_signer(self, *, use_ambient_credentials):
            assert use_ambient_credentials

        def sign(self, *_):
            raise RuntimeError("no ambient credentials")

    real = signing._module
    fake = type("signing", (), {"Config": Config})
    monkeypatch.setattr(signing, "_module", lambda n: fake if n == "signing" else real(n))
    with pytest.raises(DestinationUnreachable, match="no ambient credentials") as caught:
        signing.sign(proven, None)
    assert "--private-key" in caught.value.hint


def test_without_the_service_keyless_says_so(signed, monkeypatch):
    """The real library, whose fetching of the service's keys fails as without a network."""
    from modelport.errors import DestinationUnreachable
    from sigstore._internal import tuf

    def fails(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tuf.TrustUpdater, "__init__", fails)
    with pytest.raises(DestinationUnreachable, match="no network") as caught:
        signing.sign(signed, None)
    assert caught.value.exit_code == 6
    with pytest.raises(DestinationUnreachable, match="no network"):
        publishing.verify(signed, signer=signing.Identity("https://x", "https://y"))


def test_keyless_is_asked_for_on_the_command_line(proven, tmp_path, monkeypatch, keys):
    """The options reach OpenSSF model signing as its own, which its signatures confirm."""
    import inspect

    from model_signing import signing as theirs_s
    from model_signing import verifying as theirs_v

    asked: list[object] = []
    monkeypatch.setattr(theirs_s.Config, "sign", lambda self, root, to: to.write_text("{}"))
    monkeypatch.setattr(
        theirs_s.Config, "use_sigstore_signer",
        lambda self, **options: asked.append(options) or self)
    monkeypatch.setattr(signing, "covers", lambda *_: True)
    url = f"file://{tmp_path}/repository"
    assert execute(["publish", str(proven), url, "--keyless"]) == 0
    assert asked == [{"use_ambient_credentials": True}]
    (proven / release.SIGNATURE).unlink()
    both = ["--keyless", "--private-key", str(keys / "ours.pem")]
    assert execute(["publish", str(proven), url, *both]) == 2
    asked.clear()
    monkeypatch.setattr(theirs_v.Config, "verify", lambda *_: None)
    monkeypatch.setattr(
        theirs_v.Config, "use_sigstore_verifier",
        lambda self, **options: asked.append(options) or self)
    name, issuer = "https://host/team/app/.github/workflows/x.yml@refs/tags/v1", "https://issuer"
    assert execute(["pull", url, str(tmp_path / "a"), "--identity", name, "--issuer", issuer]) == 0
    assert asked == [{"identity": name, "oidc_issuer": issuer}]
    assert execute(["pull", url, str(tmp_path / "b"), "--identity", name]) == 2
    monkeypatch.undo()
    for method, words in ((theirs_s.Config.use_sigstore_signer, {"use_ambient_credentials"}),
                          (theirs_v.Config.use_sigstore_verifier, {"identity", "oidc_issuer"})):
        assert words <= set(inspect.signature(method).parameters)


def test_provenance_says_where_it_came_from(signed):
    statement = json.loads((signed / release.PROVENANCE).read_bytes())
    manifest = artifacts.read(signed).manifest
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    digests = {s["name"]: s["digest"]["sha256"] for s in statement["subject"]}
    assert digests["model.onnx"] == manifest.files["model.onnx"].sha256
    build = statement["predicate"]["buildDefinition"]
    assert build["externalParameters"]["options"]["opset"] == 17
    assert build["resolvedDependencies"][0]["digest"]["sha256"] == manifest.source.digest
    builder = statement["predicate"]["runDetails"]["builder"]
    assert builder["version"]["torch"] == manifest.tools["torch"]
    assert builder["host"]["machine"]


def test_without_the_package_the_error_names_the_extra(proven, tmp_path):
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from modelport.cli import execute\n"
        f"sys.exit(execute(['publish', {str(proven)!r}, 'file://{tmp_path}/r', '--keyless']))"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "modelport[publish]" in done.stderr
