"""Each attack is refused with its error and exit code, and no loader sees a file before that."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import exploits
import onnxruntime
import pytest
from modelport import artifacts, destinations, pipeline
from modelport.artifacts import onnx_files, release
from modelport.artifacts.archives import check_archive
from modelport.artifacts.safetensors_header import read_header
from modelport.cli import execute
from modelport.errors import (
    CheckpointError,
    ModelportError,
    PickleRefused,
    UnsafeError,
    UsageError,
)

FROZEN = Path(__file__).parents[2] / "fixtures" / "artifact-schema-1"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FROZEN, tmp_path / "victim"))


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What tried to load a model; every loader fails the test's claim by appearing here."""
    called: list[str] = []

    def session(*_: object, **__: object) -> None:
        called.append("onnxruntime")
        raise RuntimeError("a loader was called")

    import torch

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(torch.jit, "load", session)
    monkeypatch.setattr(torch, "load", session)
    return called


BEFORE_ANY_LOADER = {
    "engine swapped under a good manifest": (exploits.swapped, 4),
    "file that the manifest does not name": (exploits.extra, 4),
    "symbolic link in the place of a file": (exploits.symlink, 4),
    "symbolic link to a directory": (exploits.linked_directory, 4),
    "hard link to a file outside": (exploits.hard_link, 4),
    "FIFO in the place of a file": (exploits.fifo, 4),
    "manifest is a link": (exploits.manifest_link, 4),
    "manifest names ../": (exploits.named("../secret"), 4),
    "manifest names an absolute path": (exploits.named("/etc/passwd"), 4),
    "manifest names a/../../b": (exploits.named("a/../../secret"), 4),
    "manifest names itself": (exploits.named("manifest.json"), 4),
    "manifest names a NUL": (exploits.named("model.onnx\0.txt"), 4),
    "manifest names a backslash": (exploits.named("..\\secret"), 4),
    "manifest with a key twice": (exploits.duplicate_keys, 2),
    "manifest of another schema": (exploits.edited(lambda d: d.update(schema=2)), 2),
    "manifest with an unknown key": (exploits.edited(lambda d: d.update(run="rm")), 2),
    "manifest with a negative size": (
        exploits.edited(lambda d: d["files"]["config.json"].update(size=-1)), 2),
    "manifest nested 200,000 deep": (exploits.deep, 2),
    "manifest of 2 GB": (exploits.huge, 2),
}


@pytest.mark.parametrize("name", BEFORE_ANY_LOADER)
def test_refused_before_any_loader(victim, loaders, name, capsys, tmp_path):
    attack, code = BEFORE_ANY_LOADER[name]
    attack(victim)
    assert execute(["verify", str(victim)]) == code
    assert execute(["run", str(victim), "--text", "x"]) == code
    assert execute(["publish", str(victim), f"file://{tmp_path}/r", "--allow-unproven"]) == code
    assert loaders == []
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_loaders_are_watched(victim, loaders):
    with pytest.raises(Exception, match="loader was called"):
        pipeline.open_artifact(victim)
    assert loaders == ["onnxruntime"]


EXTERNAL = {
    "..": exploits.external(location="../secret"),
    "absolute": exploits.absolute,
    "sub/../../secret": exploits.external(location="sub/../../secret"),
    "length past the end": exploits.external(length=str(10**15)),
    "offset past the end": exploits.external(offset=str(10**15)),
    "negative offset": exploits.external(offset="-8"),
    "NUL": exploits.external(location="model.safetensors\0.txt"),
    "not there": exploits.external(location="absent"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_of_an_honest_manifest(victim, name):
    """The digests hold, so the graph itself has to be refused."""
    EXTERNAL[name](victim)
    artifacts.verify(victim)
    with pytest.raises(ModelportError) as caught:
        onnx_files.check_external_data(victim)
    assert caught.value.exit_code in (2, 4)
    if name == "NUL":  # the runtime reads up to the NUL, which is a file of the artifact
        return
    with pytest.raises(Exception) as opened:  # noqa: PT011
        pipeline.open_artifact(victim)
    assert "loader was called" not in str(opened.value)


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (exploits.pickle_as_safetensors, PickleRefused),
        (exploits.zip_as_safetensors, PickleRefused),
        (exploits.header_bomb, CheckpointError),
        (exploits.header_twice, CheckpointError),
        (exploits.header_past_end, CheckpointError),
    ],
)
def test_weights_that_are_something_else(victim, tmp_path, attack, error):
    witness = tmp_path / "executed"
    file = attack(victim, witness)
    with pytest.raises(error):
        read_header(file)
    assert execute(["verify", str(victim)]) == 4
    assert not witness.exists()


ARCHIVES = {
    "..": exploits.archive(("m/../../escaped", b"x")),
    "absolute": exploits.archive(("/escaped-of-modelport", b"x")),
    "a drive": exploits.archive(("C:/escaped", b"x")),
    "backslashes": exploits.archive(("..\\escaped", b"x")),
    "NUL": exploits.archive(("m/model.so\0.txt", b"x")),
    "symbolic link": exploits.archive(("m/a", b"/etc/passwd"), mode=0o120777),
    "FIFO": exploits.archive(("m/a", b""), mode=0o010644),
    "device": exploits.archive(("m/a", b""), mode=0o020644),
    "bomb": exploits.zip_bomb,
    "overlapping members": exploits.overlapping,
    "one name twice": exploits.archive(("m/a", b"x"), ("m/a", b"y")),
    "encrypted": exploits.encrypted,
    "something before it": exploits.archive(("m/a", b"x"), before=b"#!/bin/sh"),
    "a comment": exploits.archive(("m/a", b"x"), comment=b"PK"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("format_", "file"), [("torchscript", "model.pt"),
                                               ("aotinductor", "model.pt2")])
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_of_an_honest_manifest(victim, loaders, name, format_, file, monkeypatch):
    """The digests hold, so the archive itself has to be refused, before torch sees it."""
    import torch._inductor

    def load(*_: object) -> None:
        loaders.append("aotinductor")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    ARCHIVES[name](victim / file)
    exploits.honest(victim)
    manifest = artifacts.read(victim).manifest
    artifacts.write_manifest(victim, dataclasses.replace(manifest, format=format_))
    before = {p.name for p in victim.parent.iterdir()}
    with pytest.raises(UnsafeError) as caught:
        pipeline.open_artifact(victim)
    assert caught.value.exit_code == 4
    assert "archive" in str(caught.value) or "member" in str(caught.value) or file in str(
        caught.value)
    assert loaders == []
    assert {p.name for p in victim.parent.iterdir()} == before


def test_a_truncated_archive(tmp_path):
    exploits.archive(("m/a", b"x" * 100))(tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "model.pt").write_bytes(data[:end])
        with pytest.raises(UsageError, match=r"no zip archive|truncated"):
            check_archive(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["..", "bomb", "symbolic link"])
def test_a_pickle_checkpoint_that_is_a_hostile_archive(tmp_path, name, monkeypatch):
    """--allow-pickle allows torch's restricted unpickler, not this."""
    from modelport.checkpoints import build

    ARCHIVES[name](tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(build, "run", lambda *_: pytest.fail("the unpickler was started"))
    with pytest.raises(UnsafeError):
        build.from_pickle(tmp_path)


def published(root: Path, tmp_path: Path, change: object) -> str:
    """A release record written by an attacker, in a repository of his own."""
    entries = {p.name: artifacts.digest.digest(p) for p in root.iterdir()}
    record = json.loads(
        release.dumps(release.release_of(artifacts.read(root).manifest, entries))
    )
    change(record)  # type: ignore[operator]
    repository = destinations.open_repository(
        destinations.Reference.parse(f"file://{tmp_path}/hostile")
    )
    for path in root.iterdir():
        repository.send(destinations.Item(path.name, entries[path.name], path))
    repository.point("latest", None, json.dumps(record).encode(), None)
    return f"file://{tmp_path}/hostile"


def _rename(record: dict, name: str) -> None:
    record["files"][name] = record["files"].pop("config.json")


RECORDS = {
    "names ../": (lambda r: _rename(r, "../escaped"), 4),
    "names an absolute path": (lambda r: _rename(r, "/escaped-of-modelport"), 4),
    "names a NUL": (lambda r: _rename(r, "a\0b"), 4),
    "names itself": (lambda r: _rename(r, "publication.json"), 2),
    "a file below a file": (lambda r: _rename(r, "model.onnx/x"), 2),
    "lacks the manifest": (lambda r: r["files"].pop("manifest.json"), 2),
    "a size too small": (lambda r: r["files"]["model.onnx"].update(size=10), 4),
    "a size of 2^62": (lambda r: r["files"]["model.onnx"].update(size=1 << 62), 6),
    "a digest that is a path": (
        lambda r: r["files"]["config.json"].update(sha256="../../../etc/passwd"), 2),
    "lacks a file of the manifest": (lambda r: r["files"].pop("config.json"), 4),
    "brings a file along": (
        lambda r: r["files"].update({"sitecustomize.py": r["files"]["config.json"]}), 4),
    "names another artifact": (lambda r: r.update(artifact="0" * 64), 4),
    "another schema": (lambda r: r.update(schema=2), 2),
    "an unknown key": (lambda r: r.update(hook="rm"), 2),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_release_is_not_placed(victim, tmp_path, name, loaders, capsys):
    change, code = RECORDS[name]
    url = published(victim, tmp_path, change)
    before = {p.name for p in tmp_path.iterdir()}
    assert execute(["pull", url, str(tmp_path / "pulled")]) == code, capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == before
    assert not Path("/escaped-of-modelport").exists()
    assert loaders == []


def test_an_honest_release_of_the_same_making_is_placed(victim, tmp_path):
    url = published(victim, tmp_path, lambda record: None)
    assert execute(["pull", url, str(tmp_path / "pulled")]) == 0
