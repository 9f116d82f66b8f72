"""The AOTInductor runtime: nothing that would end the process reaches the package."""

from __future__ import annotations

import json
import shutil
import zipfile
from typing import TYPE_CHECKING, Any

import hand_made
import numpy as np
import pytest
import torch
from modelport import artifacts, exporters, pipeline, runtimes
from modelport.errors import BackendUnavailable, DigestMismatch, SpecError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

RUNTIME = runtimes.get("aotinductor")
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"
)


class Summed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 1)

    def forward(self, ids: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.table(ids).squeeze(-1) * values.cumsum(-1),)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> artifacts.Artifact:
    torch.manual_seed(0)
    exporter = exporters.get("aotinductor")
    model = hand_made.loaded(Summed(), hand_made.spec(hand_made.IDS, hand_made.VALUES))
    out = tmp_path_factory.mktemp("aotinductor") / "out"
    return hand_made.written(exporter, model, out, exporter.options_type(), "export")


@pytest.fixture
def artifact(compiled: artifacts.Artifact, tmp_path: Path) -> artifacts.Artifact:
    """A copy that a test may damage."""
    return artifacts.read(shutil.copytree(compiled.root, tmp_path / "copy"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Packages loaded from here on."""
    import torch._inductor

    seen: list[Any] = []
    original = torch._inductor.aoti_load_package
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path: seen.append(path) or original(path)
    )
    return seen


def with_metadata(artifact: artifacts.Artifact, **changes: Any) -> artifacts.Artifact:
    """The artifact with other metadata in its package."""
    path = artifact.root / "model.pt2"
    with zipfile.ZipFile(path) as old:
        entries = {n: old.read(n) for n in old.namelist()}
    record = changes.pop("record", {})
    for name, data in entries.items():
        if name.endswith("metadata.json"):
            found = json.loads(data)
            inner = {**json.loads(found["modelport"]), **record}
            found |= {"modelport": json.dumps(inner), **changes}
            entries[name] = json.dumps(found).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return artifact


@pytest.mark.timeout(600)
def test_bad_feeds_never_reach_the_package(artifact: artifacts.Artifact) -> None:
    good = hand_made.feeds(artifact.spec, batch=2, length=3)
    with RUNTIME.open(artifact) as session:
        before = session.run(good)["y"]
        for bad in (
            {"ids": good["ids"]},
            {**good, "more": good["ids"]},
            {**good, "ids": good["ids"].astype(np.int32)},
            {**good, "values": good["values"].astype(np.float16)},
            {**good, "values": good["values"][0]},
            hand_made.feeds(artifact.spec, batch=2, length=17),
            hand_made.feeds(artifact.spec, batch=9, length=3),
            {name: value[:0] for name, value in good.items()},
            {**good, "values": good["values"][:, :2]},
        ):
            with pytest.raises(SpecError):
                session.run(bad)
            with pytest.raises(SpecError):
                session.bind(bad)
        np.testing.assert_array_equal(session.run(good)["y"], before)


@pytest.mark.timeout(600)
def test_the_ends_of_every_range_work(artifact: artifacts.Artifact) -> None:
    torch.manual_seed(0)
    module = Summed().eval()
    with RUNTIME.open(artifact) as session, torch.no_grad():
        for batch, length in ((1, 1), (1, 16), (8, 1), (8, 16)):
            feeds = hand_made.feeds(artifact.spec, batch=batch, length=length)
            expected = module(*(torch.from_numpy(feeds[n]) for n in artifact.spec.input_names))[0]
            np.testing.assert_allclose(session.run(feeds)["y"], expected.numpy(), atol=1e-5)


@pytest.mark.timeout(600)
def test_feeds_of_any_memory_layout(artifact: artifacts.Artifact) -> None:
    """The package was compiled for row-major feeds and does not look."""
    feeds = hand_made.feeds(artifact.spec, batch=4, length=6)
    with RUNTIME.open(artifact) as session:
        expected = session.run(feeds)["y"]
        columns = {name: np.asfortranarray(value) for name, value in feeds.items()}
        np.testing.assert_array_equal(session.run(columns)["y"], expected)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"record": {"device": "cuda"}}, UsageError, "made for cuda"),
        ({"record": {"torch": "99.0.0"}}, BackendUnavailable, "older than the 99.0.0"),
        ({"AOTI_MACHINE": "s390x"}, BackendUnavailable, "s390x"),
    ],
    ids=["device", "torch", "machine"],
)
def test_a_package_that_does_not_fit_is_not_loaded(
    artifact: artifacts.Artifact, loads: list[Any], changes: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        RUNTIME.open(with_metadata(artifact, **changes))
    assert not loads


@pytest.mark.timeout(600)
def test_somebody_elses_package(artifact: artifacts.Artifact, loads: list[Any]) -> None:
    with pytest.raises(UsageError, match="do not say what it is"):
        RUNTIME.open(with_metadata(artifact, modelport="no JSON"))
    assert not loads


@pytest.mark.timeout(600)
def test_a_missing_instruction_set(
    artifact: artifacts.Artifact, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = with_metadata(artifact, AOTI_CPU_ISA="AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(BackendUnavailable, match="AVX512"):
        RUNTIME.open(wide)
    assert not loads


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("made_on", "missing"), [
    ({"avx_of_tomorrow": True}, "avx_of_tomorrow"), ({"sve_max_length": 7}, "sve_max_length")])
def test_what_the_compiler_may_have_used_has_to_be_here(
    artifact: artifacts.Artifact, loads: list[Any], made_on: dict[str, Any], missing: str
) -> None:
    with pytest.raises(BackendUnavailable, match=f"compiled for {missing}") as refused:
        RUNTIME.open(with_metadata(artifact, record={"processor": made_on}))
    assert refused.value.exit_code == 6
    assert not loads


@pytest.mark.timeout(600)
@pytest.mark.parametrize("record", [
    {"processor": None}, {"processor": {"num_logical_cores": 7000, "avx_of_tomorrow": False}}])
def test_packages_of_before_and_of_lesser_processors_open(
    artifact: artifacts.Artifact, record: dict[str, Any]
) -> None:
    feeds = hand_made.feeds(artifact.spec, batch=2, length=3)
    with RUNTIME.open(with_metadata(artifact, record=record)) as session:
        assert np.isfinite(session.run(feeds)["y"]).all()


@pytest.mark.timeout(600)
def test_another_kind_of_gpu(
    artifact: artifacts.Artifact, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUNTIME, "unavailable", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    made = with_metadata(artifact, record={"device": "cuda"}, AOTI_COMPUTE_CAPABILITY="90")
    with pytest.raises(BackendUnavailable, match="compute capability 90, and this GPU has 86"):
        RUNTIME.open(made, "cuda")
    assert not loads


@pytest.mark.timeout(600)
def test_a_changed_package_is_refused_before_it_is_loaded(
    artifact: artifacts.Artifact, loads: list[Any]
) -> None:
    path = artifact.root / "model.pt2"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch) as refused:
        pipeline.open_artifact(artifact.root)
    assert refused.value.exit_code == 4
    assert not loads
