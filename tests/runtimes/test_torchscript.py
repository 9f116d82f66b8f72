"""What the TorchScript runtime refuses, and that it refuses before anything is executed."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import hand_made
import numpy as np
import pytest
import torch
from modelport import artifacts, exporters, pipeline, runtimes
from modelport.errors import BackendUnavailable, DigestMismatch, SpecError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUNTIME = runtimes.get("torchscript")


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 1)

    def forward(self, ids: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.table(ids).squeeze(-1) * values,)


@pytest.fixture
def artifact(tmp_path: Path) -> artifacts.Artifact:
    torch.manual_seed(0)
    exporter = exporters.get("torchscript")
    model = hand_made.loaded(Scaled(), hand_made.spec(hand_made.IDS, hand_made.VALUES))
    return hand_made.written(
        exporter, model, tmp_path / "out", exporter.options_type(), "trace"
    )


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every call of ``torch.jit.load`` from here on."""
    seen: list[Any] = []
    original = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: seen.append(a) or original(*a, **k))
    return seen


def with_record(artifact: artifacts.Artifact, **changes: str) -> artifacts.Artifact:
    """The artifact with other claims in its archive, its digests in order."""
    path = artifact.root / "model.pt"
    with zipfile.ZipFile(path) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    name = next(n for n in entries if n.endswith("extra/modelport.json"))
    entries[name] = json.dumps({**json.loads(entries[name]), **changes}).encode()
    with zipfile.ZipFile(path, "w") as new:
        for entry, data in entries.items():
            new.writestr(entry, data)
    return resealed(artifact)


def resealed(artifact: artifacts.Artifact) -> artifacts.Artifact:
    import dataclasses

    (artifact.root / "manifest.json").unlink()
    manifest = dataclasses.replace(artifact.manifest, files=artifacts.collect(artifact.root))
    return artifacts.write_manifest(artifact.root, manifest)


def test_runs_at_any_size_in_the_range(artifact: artifacts.Artifact) -> None:
    with RUNTIME.open(artifact) as session:
        for batch, length in ((1, 1), (8, 16), (3, 7)):
            feeds = hand_made.feeds(artifact.spec, batch=batch, length=length)
            assert session.run(feeds)["y"].shape == (batch, length)


@pytest.mark.parametrize("layout", ["transposed", "read-only", "strided"])
def test_feeds_of_any_memory_layout(artifact: artifacts.Artifact, layout: str) -> None:
    feeds = hand_made.feeds(artifact.spec, batch=4, length=6)
    odd = dict(feeds)
    if layout == "transposed":
        odd["values"] = np.asfortranarray(feeds["values"])
    elif layout == "strided":
        odd["values"] = np.repeat(feeds["values"], 2, axis=1)[:, ::2]
    else:
        odd["values"] = feeds["values"].copy()
        odd["values"].flags.writeable = False
    with RUNTIME.open(artifact) as session:
        np.testing.assert_array_equal(session.run(odd)["y"], session.run(feeds)["y"])


def test_bad_feeds_are_refused_and_the_process_lives(artifact: artifacts.Artifact) -> None:
    good = hand_made.feeds(artifact.spec, batch=2, length=3)
    with RUNTIME.open(artifact) as session:
        for bad in (
            {"ids": good["ids"]},
            {**good, "more": good["ids"]},
            {**good, "ids": good["ids"].astype(np.int32)},
            {**good, "values": good["values"].astype(np.float64)},
            hand_made.feeds(artifact.spec, batch=2, length=17),
            {name: value[:0] for name, value in good.items()},
        ):
            with pytest.raises(SpecError):
                session.run(bad)
        session.run(good)


def test_a_changed_archive_is_refused_before_it_is_loaded(
    artifact: artifacts.Artifact, loads: list[Any]
) -> None:
    path = artifact.root / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch) as refused:
        pipeline.open_artifact(artifact.root)
    assert refused.value.exit_code == 4
    assert not loads


def test_an_archive_for_another_device(artifact: artifacts.Artifact, loads: list[Any]) -> None:
    other = with_record(artifact, device="cuda")
    with pytest.raises(UsageError, match="made for cuda and cannot run on cpu"):
        RUNTIME.open(other, "cpu")
    assert not loads


def test_an_archive_by_a_newer_torch(artifact: artifacts.Artifact, loads: list[Any]) -> None:
    newer = with_record(artifact, torch="99.1.0+cpu")
    with pytest.raises(BackendUnavailable, match=r"(?s)older than the 99\.1\.0.*99\.1\.0 or later"):
        RUNTIME.open(newer)
    assert not loads
    older = with_record(artifact, torch="2.11.0")
    with RUNTIME.open(older) as session:
        session.run(hand_made.feeds(artifact.spec, batch=2, length=2))


@pytest.mark.parametrize("damage", ["no zip", "no record", "record is a list"])
def test_what_is_no_archive(
    artifact: artifacts.Artifact, damage: str, loads: list[Any]
) -> None:
    path = artifact.root / "model.pt"
    if damage == "no zip":
        path.write_bytes(b"not a zip")
    else:
        name = "model/other" if damage == "no record" else "model/extra/modelport.json"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "[1]")
    with pytest.raises(UsageError, match=r"model\.pt"):
        RUNTIME.open(resealed(artifact))
    assert not loads


def test_the_spy_of_these_tests_sees_a_load(
    artifact: artifacts.Artifact, loads: list[Any]
) -> None:
    RUNTIME.open(artifact).close()
    assert len(loads) == 1


def test_python_without_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert "3.14" in str(RUNTIME.unavailable())
