"""What may be published, and that what had to be allowed is recorded."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
from modelport import artifacts, destinations
from modelport.artifacts import release
from modelport.cli import execute
from modelport.destinations import Reference
from modelport.errors import (
    GateRefused,
    IncompleteError,
    ParityError,
    PickleRefused,
    RemoteCodeRefused,
    UnsafeError,
    UsageError,
)
from modelport.pipeline.publishing import Gate, publish, pull


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/repository"


def with_source(root: Path, **changes: object) -> Path:
    manifest = artifacts.read(root).manifest
    source = dataclasses.replace(manifest.source, **changes)
    artifacts.write_manifest(root, dataclasses.replace(manifest, source=source))
    return root


CASES = [
    ({"weights": "random", "seed": 0}, UnsafeError, 4, "allow_random_weights", "random-weights"),
    ({"pickle": True}, PickleRefused, 4, "allow_pickle_source", "pickle"),
    ({"remote_code": True}, RemoteCodeRefused, 4, "allow_remote_code", "remote-code"),
]


@pytest.mark.parametrize(("changes", "error", "code", "flag", "word"), CASES)
def test_a_source_that_needs_permission(
    proven, url, tmp_path, changes, error, code, flag, word
):
    with_source(proven, **changes)
    with pytest.raises(error) as caught:
        publish(proven, url)
    assert caught.value.exit_code == code
    assert "--" + flag.replace("_", "-") in caught.value.hint
    assert not (tmp_path / "repository").exists(), "nothing is sent before the gate"
    done = publish(proven, url, Gate(**{flag: True}))
    assert done.release.allowed == (word,)
    assert pull(url, tmp_path / "pulled").release.allowed == (word,)
    statement = json.loads((tmp_path / "pulled" / release.PROVENANCE).read_bytes())
    build = statement["predicate"]["buildDefinition"]
    assert build["internalParameters"]["allowed"] == [word]


def test_a_permission_that_is_not_needed_is_not_recorded(proven, url):
    everything = Gate(True, True, True, True)
    assert publish(proven, url, everything).release.allowed == ()


def no_parity(root: Path) -> None:
    manifest = artifacts.read(root).manifest
    artifacts.write_manifest(root, dataclasses.replace(manifest, parity=None))


def suspect(root: Path) -> None:
    manifest = artifacts.read(root).manifest
    parity = dataclasses.replace(manifest.parity, verdict="suspect")
    artifacts.write_manifest(root, dataclasses.replace(manifest, parity=parity))


def other_files(root: Path) -> None:
    config = root / "config.json"
    config.write_text(config.read_text() + "\n")
    manifest = artifacts.read(root).manifest
    artifacts.write_manifest(root, dataclasses.replace(manifest, files=artifacts.collect(root)))


def other_report(root: Path) -> None:
    report = root / artifacts.PARITY
    document = json.loads(report.read_text())
    document["comparisons"] += 1
    report.write_text(json.dumps(document))
    manifest = artifacts.read(root).manifest
    artifacts.write_manifest(root, dataclasses.replace(manifest, files=artifacts.collect(root)))


def no_report(root: Path) -> None:
    (root / artifacts.PARITY).unlink()
    manifest = artifacts.read(root).manifest
    artifacts.write_manifest(root, dataclasses.replace(manifest, files=artifacts.collect(root)))


@pytest.mark.parametrize("spoil", [no_parity, suspect, other_files, other_report, no_report])
def test_no_passing_parity_for_exactly_this_digest(proven, url, spoil):
    spoil(proven)
    with pytest.raises(ParityError) as caught:
        publish(proven, url)
    assert caught.value.exit_code == 3
    assert "--allow-unproven" in caught.value.hint
    done = publish(proven, url, Gate(allow_unproven=True))
    assert done.release.allowed == ("unproven",)


def test_a_changed_file_is_no_matter_of_permission(proven, url):
    (proven / "config.json").write_text("{}")
    with pytest.raises(UnsafeError):
        publish(proven, url, Gate(True, True, True, True))


def test_a_benchmark_is_required_of_exactly_these_files(proven, url, monkeypatch):
    with pytest.raises(GateRefused, match="no benchmark") as caught:
        publish(proven, url, Gate(require_benchmark=True))
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match="go together"):
        publish(proven, url, Gate(max_regression=0.05))


def test_an_incomplete_benchmark_is_no_evidence(proven, url, monkeypatch, capsys):
    from types import SimpleNamespace

    from modelport.runtimes import benchmark

    def require_complete() -> None:
        raise IncompleteError("1 of 2 cells failed", hint="run the same command again")

    artifacts.with_report(artifacts.read(proven), artifacts.BENCHMARK, "{}")
    report = SimpleNamespace(require_complete=require_complete)
    monkeypatch.setattr(benchmark, "load_report", lambda _: report)
    assert execute(["publish", str(proven), url, "--require", "benchmark"]) == 3
    told = capsys.readouterr().err
    assert "incomplete: 1 of 2 cells failed" in told
    assert f"try: modelport bench {proven}" in told


@pytest.mark.parametrize("text", [
    "http:/x", "models", "s3://", "file:///a:b c", "oci://u:p4ssw0rd@host/x", "S3://k:p4ssw0rd@b/x",
    "filecache::s3://k:p4ssw0rd@b/x", "k:p4ssw0rd@b/x", "s3://k:p4ss/w0rd@b/x", "triton:///a:tag",
])
def test_a_destination_that_is_none(proven, text, capsys):
    assert execute(["publish", str(proven), text]) == 2
    assert not re.search("p4ss|w0rd", capsys.readouterr().err)


@pytest.mark.parametrize("after", [
    "sha256:abcd1234", "sha256:" + "AB" * 32, "sha512:" + "ab" * 64, "sha256:", "", "v2", "ab" * 32,
])
@pytest.mark.parametrize("scheme", ["file", "s3", "memory"])
def test_a_digest_that_is_mistyped_is_not_the_latest(proven, url, tmp_path, scheme, after):
    """Where it was passed over, it meant whatever the tag pointed at."""
    if scheme == "file":
        publish(proven, url)
    pinned = f"{url if scheme == 'file' else scheme + '://bucket/models'}@{after}"
    with pytest.raises(UsageError, match=r"digest|revision"):
        pull(pinned, tmp_path / "pulled")
    with pytest.raises(UsageError, match=r"digest|revision"):
        publish(with_source(proven, revision="2"), pinned)
    assert len(list((tmp_path / "repository" / "tags" / "latest").glob("*"))) == (scheme == "file")
    assert not (tmp_path / "pulled").exists()


def test_a_tag_and_a_digest_are_one_too_many():
    with pytest.raises(UsageError, match="a tag, v1, and a digest"):
        Reference.parse("oci://host:5000/name:v1@sha256:" + "ab" * 32)
    assert Reference.parse("sftp://me@host:22/home/me@team/x").place == "me@host:22/home/me@team/x"


def test_the_command_line(proven, tmp_path, url, capsys):
    assert execute(["publish", str(proven), url, "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    assert execute(["pull", url, str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == digest
    assert execute(["pull", url, str(tmp_path / "a")]) == 2, "taken"
    assert execute(["pull", f"{url}@{digest}", str(tmp_path / "a"), "--force"]) == 0
    with_source(proven, weights="random", seed=0)
    assert execute(["publish", str(proven), url]) == 4
    assert "--allow-random-weights" in capsys.readouterr().err
    assert execute(["publish", str(proven), url, "--allow-random-weights"]) == 0
    assert "random-weights" in capsys.readouterr().err
    assert execute(["publish", str(proven), url, "--max-regression", "x"]) == 2


def test_options_that_a_destination_knows_nothing_of(proven, url, tmp_path, capsys):
    (tmp_path / "key.pem").write_text("a key")
    for option in (["--expect", "none"], ["--resend"], ["--keyless"],
                   ["--private-key", str(tmp_path / "key.pem")]):
        assert execute(["publish", str(proven), f"triton://{tmp_path}/models", *option]) == 2
        told = capsys.readouterr().err
        assert "triton knows nothing of" in told
        assert option[0] in told
    assert execute(["publish", str(proven), url, "--name", "tiny"]) == 2
    assert "file knows nothing of --name" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "repository").exists()
    assert not (proven / release.PROVENANCE).exists()


def test_a_file_is_no_repository(proven, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below/it"):
        for option in ([], ["--resend"]):
            assert execute(["publish", str(proven), f"file://{tmp_path}/{place}", *option]) == 2
            assert f"{tmp_path}/file is a file" in capsys.readouterr().err
        assert execute(["pull", f"file://{tmp_path}/{place}", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("call", ["scandir", "lstat"])
def test_a_repository_that_may_not_be_read(proven, url, tmp_path, monkeypatch, capsys, call):
    """As for anyone but root, who runs these tests in many a container."""
    publish(proven, url)
    where = {"scandir": (os, "tags"), "lstat": (Path, "blobs")}[call]
    real = getattr(where[0], call)

    def refused(path, *rest, **options):
        if f"repository/{where[1]}" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(where[0], call, refused)
    assert execute(["pull", url, str(tmp_path / "elsewhere" / "out")]) == 6
    assert "cannot read" in capsys.readouterr().err


def test_tokens_are_in_no_message(monkeypatch):
    from modelport.destinations.retry import redacted

    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    for text in (
        "GET https://host/x?X-Amz-Signature=abcdef01&token=zzz",
        "Authorization: Bearer abcdef01", "sftp://me:abcdef01@host/", "bad hf_abcdefghijk here",
        "{'password': 'abcdef01'}",
    ):
        assert not {"abcdef01", "hf_abcdefghijk", "zzz"} & set(
            redacted(text).replace("=", " ").replace(":", " ").replace("'", " ").split()
        ), redacted(text)
        assert "abcdef01" not in redacted(text)


def test_a_token_in_the_environment_is_published_nowhere(proven, url, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, "s3cr3t-value")
    publish(proven, url)
    for path in (tmp_path / "repository").rglob("*"):
        assert path.is_dir() or b"s3cr3t-value" not in path.read_bytes()



@pytest.mark.parametrize("slower", [False, True])
def test_a_regression_is_refused(proven, url, monkeypatch, slower):
    """The gate's own part: what is compared with what, and what follows."""
    from types import SimpleNamespace

    from modelport.runtimes import benchmark
    from modelport.runtimes.benchmark.against import Change
    from modelport.runtimes.benchmark.statistics import Comparison

    seen = []
    (proven / artifacts.BENCHMARK).write_text("{}")
    manifest = artifacts.read(proven).manifest
    artifacts.write_manifest(
        proven, dataclasses.replace(manifest, files=artifacts.collect(proven))
    )
    cell = SimpleNamespace(identity=manifest.identity, batch=1)
    row = SimpleNamespace(cell=cell, verdict=SimpleNamespace(word="stable"), pareto=True)
    report = SimpleNamespace(
        rows=[row], require_complete=lambda: None,
        verdicts=lambda identity: {"onnx": row.verdict} if identity == manifest.identity else {})
    monkeypatch.setattr(benchmark, "load_report", lambda path: seen.append(path) or report)
    change = Change("onnx batch 1", Comparison(None, "slower", 0.0, ""), past_limit=slower)
    found = benchmark.RunComparison((change,), 0.05, same_machine=True)
    monkeypatch.setattr(benchmark, "compare_runs", lambda new, old, **_: found)
    gate = Gate(max_regression=0.05, against=f"{url}:previous")
    first = publish(proven, url, gate)  # nothing to compare with yet, and the record says so
    assert first.release.checks["against"] is None
    if slower:
        with pytest.raises(GateRefused, match="slower than"):
            publish(proven, url, gate)
    else:
        second = publish(proven, url, gate)
        assert second.release.checks == {
            "benchmark": True, "max_regression": 0.05, "against": first.digest, "compared": 1,
            "same_machine": True,
        }
    assert seen[0] == proven / artifacts.BENCHMARK
    assert seen[-1].name == artifacts.BENCHMARK


def test_the_benchmark_of_a_model_that_generates_is_evidence_too(proven, url):
    """The report is made as `bench` makes it; the same artifact may be published again."""
    import dataclasses

    from modelport.runtimes.benchmark import GenerationReport, Shape, environment, generation

    def measured(identity, pace):
        shape = Shape(1, 4, 3)
        samples = (generation.Sample(pace, (pace, pace), 3 * pace),) * 2
        processes = tuple(
            generation.Process("mine", n, 1.0, 1, 1, (generation.Measured(shape, samples),))
            for n in range(5))
        asked = generation.GenerationRequest(
            (generation.Contestant("mine", "", identity, "sessions"),), (shape,), proven)
        report: GenerationReport = generation.summarise(asked, processes, environment.read())
        text = json.dumps(dataclasses.asdict(report))
        artifacts.with_report(artifacts.read(proven), artifacts.BENCHMARK, text)

    gate = Gate(require_benchmark=True, max_regression=0.05, against=f"{url}:latest")
    measured("another", 0.01)
    with pytest.raises(GateRefused, match="measured other files"):
        publish(proven, url, gate)
    measured(artifacts.read(proven).manifest.identity, 0.01)
    publish(proven, url, dataclasses.replace(gate, max_regression=None, against=None))
    assert publish(proven, url, gate).release.checks["compared"] == 1
    measured(artifacts.read(proven).manifest.identity, 0.02)
    with pytest.raises(GateRefused, match="slower than"):
        publish(proven, url, gate)


def test_an_invalid_benchmark_says_what_is_wrong_and_how_to_measure_anew(
    proven, url, monkeypatch
):
    from types import SimpleNamespace

    from modelport.runtimes import benchmark
    from modelport.runtimes.benchmark.statistics import Verdict

    artifacts.with_report(artifacts.read(proven), artifacts.BENCHMARK, "{}")
    verdicts = {"mine · 1×8": Verdict("invalid", ("asked for cuda, ran on cpu",))}
    report = SimpleNamespace(require_complete=lambda: None, verdicts=lambda _: verdicts, loads=())
    monkeypatch.setattr(benchmark, "load_report", lambda _: report)
    with pytest.raises(GateRefused, match="such as mine · 1×8: asked for cuda") as caught:
        publish(proven, url, Gate(require_benchmark=True))
    assert caught.value.hint == f"modelport bench {proven}, once that is mended"
    verdicts.clear()
    identity = artifacts.read(proven).manifest.identity
    report.loads = (SimpleNamespace(cell=SimpleNamespace(identity=identity)),)
    with pytest.raises(GateRefused, match="holds scenarios of a load generator alone"):
        publish(proven, url, Gate(require_benchmark=True))


def test_a_registrys_names_have_no_capital_letters():
    """As the owner of a repository on a forge may have: told before anything is sent."""
    pytest.importorskip("oras", reason="oras is not installed")
    reference = Reference.parse("oci://host:5000/MyOrg/Model:v1")
    with pytest.raises(UsageError, match="capital letters") as caught:
        destinations.open_repository(reference)
    assert caught.value.hint == "oci://host:5000/myorg/model"
