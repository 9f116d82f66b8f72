"""Publish what is proven, pull what is whole: the gate, signatures and destinations together."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, destinations, validate
from ..artifacts import provenance, release, signing
from ..artifacts.digest import digest
from ..errors import (
    GateRefused,
    IncompleteError,
    ParityError,
    PickleRefused,
    RemoteCodeRefused,
    SignatureRefused,
    UnsafeError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..artifacts import Artifact, FileEntry
    from ..artifacts.release import Release
    from ..destinations import Reference
    from ..runtimes.benchmark import Report
    from .request import Notify


@dataclass(frozen=True, slots=True)
class Gate:
    """What may be published.

    Attributes:
        allow_unproven: no passing parity verdict on exactly these files.
        allow_random_weights: weights that were drawn, not trained.
        allow_pickle_source: weights that came out of a pickle.
        allow_remote_code: a source that ran Python of its own.
        require_benchmark: a complete benchmark of exactly these files must be inside.
        max_regression: with :attr:`against`: by which share it may have become slower, 0.05 for
            5 %.
        against: reference to the release whose benchmark this one's is compared with;
            ``DEST:previous`` is what the destination's tag points at now.
    """

    allow_unproven: bool = False
    allow_random_weights: bool = False
    allow_pickle_source: bool = False
    allow_remote_code: bool = False
    require_benchmark: bool = False
    max_regression: float | None = None
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Signer:
    """How to sign: with a private key (PEM file), or keyless where it is None."""

    private_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a publication.

    Attributes:
        reference: where it is, by tag.
        digest: ``sha256:…`` by which it can be pulled whatever becomes of the tag; empty for a
            server's model repository.
        sent: bytes that had to be sent.
        places: directories written, for a server's model repository.
    """

    reference: str
    digest: str
    release: Release
    sent: int = 0
    places: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Pulled:
    """An artifact that was fetched and verified, and the release it came from."""

    artifact: Artifact
    release: Release
    digest: str


def publish(
    root: Path,
    destination: str,
    gate: Gate | None = None,
    *,
    signer: Signer | None = None,
    expected: str | None = None,
    resend: bool = False,
    serve_as: str | None = None,
    notify: Notify = lambda _: None,
) -> Published:
    """Verify an artifact, put it through the gate, and publish it.

    Args:
        signer: signs the artifact in place first (``provenance.json`` and ``signature.json`` appear
            in ``root``). None carries over a signature that is there.
        expected: move the tag only if it points at this (``sha256:…`` or ``none``).
        resend: send files also where they are there already.
        serve_as: name on a server; default: the directory's.

    Raises:
        ParityError, GateRefused: evidence is missing or says no (exit code 3).
        UnsafeError: random weights, pickle, remote code; a digest that is wrong (exit code 4).
        TagMoved: the tag is not at ``expected``.
        UsageError, UnavailableError: see :mod:`..errors`.
    """
    gate = gate or Gate()
    reference = destinations.Reference.parse(destination)
    deployment = destinations.open_deployment(reference)
    _refuse_unused(
        reference,
        {"--name": serve_as} if deployment is None else
        {"--expect": expected, "--resend": resend, "--private-key or --keyless": signer},
    )
    notify("verifying")
    artifact = artifacts.verify(root)
    allowed = permissions(artifact, gate)
    checks = _evidence(artifact, gate, reference, notify)
    with tempfile.TemporaryDirectory() as scratch:
        files, where = _beside(artifact, allowed, signer, Path(scratch))
        record = release.release_of(artifact.manifest, files, allowed=allowed, checks=checks)
        if deployment is not None:
            serving = destinations.Serving(
                serve_as or root.resolve().name, _preferred(artifact)
            )
            places = deployment.place(artifact, serving, release.dumps(record))
            return Published(str(reference), "", record, places=places)
        items = [destinations.Item(name, entry, where[name]) for name, entry in files.items()]
        repository = destinations.open_repository(reference)
        head, sent = destinations.publish(
            repository, items, record, expected=expected, resend=resend, notify=notify
        )
    if not repository.revisions:
        reference = replace(reference, tag=reference.tag or destinations.DEFAULT_TAG)
    return Published(str(reference), head.digest, record, sent)


def pull(
    source: str,
    destination: Path,
    *,
    signer: Path | signing.Identity | None = None,
    force: bool = False,
    notify: Notify = lambda _: None,
) -> Pulled:
    """Fetch a release, check every byte, and place it; or leave ``destination`` as it was.

    Args:
        signer: refuse what this public key, or this identity, did not sign.

    Raises:
        UsageError: there is nothing under that reference, or its records are malformed.
        DigestMismatch, PathEscape, SignatureRefused: what is there is not what it says it is.
        DestinationExists, StorageError, DestinationUnreachable: see :mod:`..errors`.
    """
    repository = destinations.open_repository(destinations.Reference.parse(source))
    with artifacts.stage(destination, force=force) as staging:
        head = destinations.resolve(repository)
        if head is None:
            raise UsageError(f"nothing is published at {source}", hint="check the tag")
        found = destinations.fetch(repository, head, staging.root, notify=notify)
        if signer is not None:
            signing.verify_signature(staging.root, signer)
            _require_signed(staging.root, found, source)
        artifact = artifacts.verify(staging.root)
        if artifact.manifest.identity != found.artifact:
            raise UnsafeError(f"the release at {source} names another artifact than it holds")
        _refuse_unnamed(artifact, found)
        return Pulled(artifacts.read(staging.commit()), found, head.digest)


def _require_signed(root: Path, found: release.Release, source: str) -> None:
    """A release record is not signed: what it says was allowed must be what the provenance says."""
    try:
        told = provenance.allowed((root / release.PROVENANCE).read_bytes())
    except OSError:
        told = ()
    if sorted(told) != sorted(found.allowed):
        raise SignatureRefused(
            f"the release at {source} says that {_listed(found.allowed)} was allowed, and what is "
            f"signed says {_listed(told)}",
            hint="trust neither; ask who published it")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "nothing"


def verify(root: Path, *, signer: Path | signing.Identity | None = None) -> Artifact:
    """Check a directory's signature, if one is asked for, and then every digest.

    Raises:
        SignatureRefused: before anything but the signature is parsed.
        DigestMismatch, PathEscape, UsageError: see :func:`.artifacts.verify`.
    """
    if signer is not None:
        signing.verify_signature(root, signer)
    return artifacts.verify(root)


def permissions(artifact: Artifact, gate: Gate) -> tuple[str, ...]:
    """What had to be allowed for this artifact.

    Raises:
        ParityError: it is not proven, and that was not allowed.
        UnsafeError: another of the gate's refusals; its hint names the flag.
    """
    source = artifact.manifest.source
    found = [
        (_doubt(artifact), gate.allow_unproven, "unproven", "--allow-unproven", ParityError),
        ("its weights are random: it is not the published model" * (source.weights == "random"),
         gate.allow_random_weights, "random-weights", "--allow-random-weights", UnsafeError),
        ("its weights came out of a pickle" * source.pickle,
         gate.allow_pickle_source, "pickle", "--allow-pickle-source", PickleRefused),
        ("its source ran Python of its own" * source.remote_code,
         gate.allow_remote_code, "remote-code", "--allow-remote-code", RemoteCodeRefused),
    ]
    allowed = []
    for reason, given, word, flag, kind in found:
        if reason and not given:
            raise kind(
                f"{artifact.root} is not published: {reason}",
                hint=(f"modelport validate {artifact.root}, or " if kind is ParityError else "")
                + f"{flag}, which the release records",
            )
        if reason:
            allowed.append(word)
    return tuple(sorted(allowed))


def _doubt(artifact: Artifact) -> str:
    """Why an artifact is not proven; empty where it is."""
    manifest = artifact.manifest
    if manifest.parity is None:
        return "it has not been validated"
    if not manifest.parity_is_current:
        return "its files were changed after they were validated"
    if not manifest.proven:
        return f"parity with its source: {manifest.parity.verdict}"
    if artifacts.PARITY not in manifest.files:
        return "its parity report is missing"
    report = validate.from_json((artifact.root / artifacts.PARITY).read_bytes())
    if report.summary(manifest.identity) != manifest.parity:
        return "its parity report says something else than its manifest"
    if report.narrowed:
        return "its validation was cut short by --max-memory or --max-seconds"
    return ""


def _evidence(
    artifact: Artifact, gate: Gate, reference: Reference, notify: Notify
) -> dict[str, Any]:
    """Benchmark checks that were asked for, as the release records them."""
    if (gate.max_regression is None) != (gate.against is None):
        raise UsageError("--max-regression and --against go together")
    checks: dict[str, Any] = {}
    if gate.require_benchmark or gate.against:
        report = _benchmark(artifact.root, artifact.manifest.identity)
        checks["benchmark"] = True
        if gate.against is not None and gate.max_regression is not None:
            notify(f"comparing with {gate.against}")
            checks |= _regression(report, artifact.manifest.identity, gate.against,
                                  gate.max_regression, reference)
    return checks


def _benchmark(root: Path, identity: str) -> Report:
    from ..runtimes import benchmark

    path = root / artifacts.BENCHMARK
    if not path.exists():
        raise GateRefused(f"{root} holds no benchmark", hint=f"modelport bench {root}")
    report: Report = benchmark.load_report(path)
    try:
        report.require_complete()
    except IncompleteError as error:  # its hint is that of bench: here nothing would be measured
        raise GateRefused(
            f"the benchmark in {root} is incomplete: {error.found}", hint=f"modelport bench {root}"
        ) from error
    verdicts = report.verdicts(identity)
    if not verdicts:
        scenarios = not isinstance(report, benchmark.GenerationReport) and any(
            line.cell.identity == identity for line in report.loads)
        held = "holds scenarios of a load generator alone" if scenarios else "measured other files"
        raise GateRefused(f"the benchmark in {root} {held}", hint=f"modelport bench {root}")
    invalid = [f"{label}: {'; '.join(verdict.reasons)}"
               for label, verdict in verdicts.items() if verdict.word == "invalid"]
    if invalid:
        raise GateRefused(
            f"{len(invalid)} of {len(verdicts)} measurements are invalid, such as {invalid[0]}",
            hint=f"modelport bench {root}, once that is mended",
        )
    return report


def _regression(
    report: Report, identity: str, against: str, limit: float, destination: Reference
) -> dict[str, Any]:
    """Compare two benchmarks; what the release records of it.

    Raises:
        GateRefused: slower by more than ``limit`` for certain; or nothing could be compared.
    """
    from ..runtimes import benchmark

    repository = destinations.open_repository(destinations.Reference.parse(against))
    head = destinations.resolve(repository, following=destination)
    if head is None:
        if repository.reference.tag != destinations.PREVIOUS:
            raise UsageError(f"nothing is published at {against}")
        return {"max_regression": limit, "against": None}  # the first release has no past
    earlier = release.loads(head.release)
    if artifacts.BENCHMARK not in earlier.files:
        raise GateRefused(f"the release at {against} holds no benchmark to compare with")
    with tempfile.TemporaryDirectory() as scratch:
        only = frozenset({artifacts.BENCHMARK})
        destinations.fetch(repository, head, Path(scratch), only=only)
        past = benchmark.load_report(Path(scratch) / artifacts.BENCHMARK)
    found = benchmark.compare_runs(report, past, max_regression=limit, identity=identity)
    machine = "" if found.same_machine else " (measured on different machines)"
    if not found.repeated:  # the same artifact, published again, is no slower than itself
        found.require_counterparts(against)
    if found.past_limit:
        worst = found.past_limit[0]
        raise GateRefused(
            f"slower than {against} in {len(found.past_limit)} of {len(found.changes)} "
            f"measurements{machine}, such as {worst.label}",
            allowed=f"at most {limit:.0%} slower",
        )
    return {"max_regression": limit, "against": head.digest,
            "compared": len(found.changes) + len(found.repeated),
            "same_machine": found.same_machine}


def _refuse_unused(reference: Reference, options: Mapping[str, Any]) -> None:
    """What was given and would be passed over is refused: it was asked for, for safety perhaps."""
    given = [option for option, value in options.items() if value not in (None, False)]
    if given:
        raise UsageError(
            f"{reference.scheme} knows nothing of {given[0]}",
            allowed="--name with triton; --expect, --resend and signatures with any other",
        )


def _beside(
    artifact: Artifact, allowed: tuple[str, ...], signer: Signer | None, scratch: Path
) -> tuple[dict[str, FileEntry], dict[str, Path]]:
    """Every file to be published, with where it lies: the artifact's, provenance, signature."""
    root = artifact.root
    assert artifact.entry is not None
    # As it was verified: a report that is added meanwhile makes another manifest, which a release
    # of the files that were verified must not name.
    own = {**artifact.manifest.files, artifacts.MANIFEST: artifact.entry}
    where = {name: root / name for name in own}
    statement = provenance.statement(artifact.manifest, own, allowed=allowed)
    carried = signer is None and (root / release.SIGNATURE).exists()
    if signer is not None:
        _sign(root, signer, own, statement)
    elif not carried:
        signing.write_beside(scratch / release.PROVENANCE, statement)
        where[release.PROVENANCE] = scratch / release.PROVENANCE
    if signer is not None or carried:
        beside = (release.PROVENANCE, release.SIGNATURE)
        where |= {name: root / name for name in beside if (root / name).exists()}
    files = {name: own.get(name) or digest(path) for name, path in where.items()}
    if carried:
        _refuse_stale_signature(root, files)
    return files, where


def _sign(root: Path, signer: Signer, own: Mapping[str, FileEntry], statement: bytes) -> None:
    """Put provenance and signature beside an artifact; or leave what is there, if that fails."""
    path = root / release.PROVENANCE
    before = path.read_bytes() if path.exists() else None
    signing.write_beside(path, statement)  # it is signed where it lies
    try:
        signature = signing.sign(root, signer.private_key)
        signed = {**own, release.PROVENANCE: release.entry_of(statement)}
        if not signing.covers(signature, signed):
            raise destinations.changed(root)
    except BaseException:
        if before is None:
            path.unlink()
        else:
            signing.write_beside(path, before)
        raise
    signing.write_beside(root / release.SIGNATURE, signature)


def _refuse_stale_signature(root: Path, files: Mapping[str, FileEntry]) -> None:
    signed = {n: e for n, e in files.items() if n != release.SIGNATURE}
    if not signing.covers((root / release.SIGNATURE).read_bytes(), signed):
        raise UsageError(
            f"the signature in {root} is not on the files that are there now",
            hint=f"sign again (--private-key), or remove {root / release.SIGNATURE}",
        )


def _refuse_unnamed(artifact: Artifact, found: Release) -> None:
    """What the release brought along is what the manifest names and what may lie beside it."""
    known = {*artifact.manifest.files, artifacts.MANIFEST, *release.BESIDE}
    if set(found.files) - known:
        raise UnsafeError(f"the release names {min(set(found.files) - known)}, the manifest not")


def _preferred(artifact: Artifact) -> tuple[int, ...]:
    """Batch sizes on the benchmark's front of latency and throughput; none without one."""
    from ..runtimes import benchmark

    path = artifact.root / artifacts.BENCHMARK
    if not path.exists():
        return ()
    report = benchmark.load_report(path)
    rows = [] if isinstance(report, benchmark.GenerationReport) else report.rows
    mine = (r for r in rows if r.cell.identity == artifact.manifest.identity and r.pareto)
    return tuple(sorted({r.cell.batch for r in mine if r.cell.batch > 1}))
