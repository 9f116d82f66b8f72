"""Validate an artifact against the unpatched original, at shapes that tracing never saw."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, checkpoints, profiles, validate
from ..errors import UsageError
from ..validate import isolate, matrix
from . import deriving, generating, subjects
from .references import HALVES, identity, opened, original, references, whole
from .request import ModelRequest, Notify
from .texts import TEXTS

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint
    from ..spec import ModelSpec
    from ..validate import EffectBudget, ParityReport, Plan
    from .subjects import Subject

Reference = ModelRequest | Path
"""What to compare with: a model, or the directory of another artifact."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far validation goes.

    Attributes:
        sizes: sizes by dimension that replace the default matrix.
        max_seconds: for everything but the effects on the answers, whose limits need their rows,
            and the first cases of each graph and of what they generate, which are always run:
            a limit alone fails nothing. None lets what coverage rests on take what it needs.
        max_memory: bytes for one case's arrays; None is the validator's default.
        inputs: ``.npz`` file with the user's own feeds, compared besides the matrix.
        budget: what effects on the answers are accepted (Gate C); None measures them only where
            the precision is reduced, under the default budget.
        cache: keep runs of the reference, so that the next artifact of the model costs none.
        isolated: run the artifact in a process of its own, so that a crash of its runtime costs
            one case. The caller's main module must then be importable, as for multiprocessing.
        case_seconds: a case that the artifact gives no result for within this time has failed.
    """

    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    max_seconds: float | None = None
    max_memory: int | None = None
    inputs: Path | None = None
    budget: EffectBudget | None = None
    cache: bool = True
    isolated: bool = False
    case_seconds: float = 120.0

    def applied(self, settings: validate.Settings) -> validate.Settings:
        """The settings with these limits on how the artifact is run."""
        return replace(settings, isolated=self.isolated, case_seconds=self.case_seconds)

    @property
    def short(self) -> bool:
        """Whether less time is allowed than by default."""
        return self.max_seconds is not None and self.max_seconds < matrix.DEFAULT_SECONDS


def validate_artifact(
    path: Path,
    *,
    reference: Reference | None = None,
    runtime: str | None = None,
    device: str = "cpu",
    limits: Limits | None = None,
    notify: Notify = lambda _: None,
) -> ParityReport:
    """Compare an artifact with its source, and record the verdict in it.

    Args:
        path: an artifact's directory, or a bare model file (then ``reference`` names a model).
        reference: None takes the source named in the manifest, whose weights must be the very
            ones the artifact was made from. Only then is the verdict recorded, and a pass only if
            ``limits`` does not choose the sizes. One whose limits of time or memory left out what
            coverage rests on says so, is not published, and does not replace one in full.
        runtime, device: what runs the artifact.

    Raises:
        DigestMismatch: a file of the artifact was changed, or the source's weights were.
        UsageError, UnavailableError: the source cannot be had, or no runtime opens the artifact.
    """
    with isolate.kept():
        return _validated(path, reference, runtime, device, limits or Limits(), notify)


def _validated(
    path: Path, reference: Reference | None, runtime: str | None, device: str, limits: Limits,
    notify: Notify,
) -> ParityReport:
    if isinstance(reference, Path):
        return _pair(path, reference, runtime, device, limits, notify)
    if path.is_file():
        if reference is None:
            raise UsageError(
                f"{path} says nothing of its source",
                hint=f"modelport validate {path} --reference MODEL",
            )
        checkpoint = reference.resolve()
        subject = subjects.of_file(path, checkpoint, runtime, device)
    else:
        subject = subjects.of_artifact(path, runtime, device)
        artifact = subject.artifact
        assert artifact is not None
        checkpoint = (
            subjects.with_task(reference, artifact).resolve()
            if reference
            else subjects.source_of(artifact)
        )
    if subject.parts:
        report = _judge_parts(subject, checkpoint, runtime, device, limits, notify)
    else:
        report = _judge(subject, checkpoint, device, limits, limits.max_seconds, notify)
    if subject.artifact is None or reference is not None or (limits.sizes and report.accepted):
        return report
    if report.accepted and report.narrowed and _proven_in_full(subject.artifact):
        report = _noted(report, "not recorded: the pass on record is of more cases")
    else:
        summary = report.summary(subject.artifact.manifest.identity)
        artifacts.with_report(subject.artifact, artifacts.PARITY, report.to_json(), summary)
    return report


def run_ahead(checkpoint: Checkpoint) -> None:
    """Run both sides of a comparison with an artifact that is still being made, and keep that.

    In float32 and on the CPU, in the cases that :func:`validate_artifact` without limits has time
    for. Not of a source with Python of its own, whose runs are not kept.
    """
    reference = whole(checkpoint, "float32")
    if reference.parts:  # which share their tensors
        truth = whole(checkpoint, "float64")
    else:
        truth = replace(reference, module=copy.deepcopy(reference.module).double())
    for name in reference.parts or (None,):
        model = reference.parts[name] if name else reference
        spec, cache = model.spec, _cache(model.spec, name, checkpoint, "cpu", "float32")
        plan = planned(spec, {"traced": spec.check(model.samples)}, checkpoint.root, Limits())
        assert cache is not None
        precise = truth.parts[name] if name else truth
        validate.run_ahead(partial(opened, model, spec), partial(opened, precise, spec), plan,
                           spec=spec, cache=cache)


def parity_report(artifact: Artifact) -> ParityReport | None:
    """The report stored in an artifact; None when it has not been validated."""
    path = artifact.root / artifacts.PARITY
    return validate.from_json(path.read_bytes()) if path.exists() else None


def _proven_in_full(artifact: Artifact) -> bool:
    """Whether a pass of these very files is on record that no limit narrowed."""
    manifest = artifact.manifest
    report = parity_report(artifact) if manifest.proven else None
    return (report is not None and not report.narrowed
            and report.summary(manifest.identity) == manifest.parity)


def _judge(
    subject: Subject, checkpoint: Checkpoint, device: str, limits: Limits, seconds: float | None,
    notify: Notify,
) -> ParityReport:
    """Gates 0, A or B against a checkpoint, and C where it applies.

    Args:
        seconds: this model's share of the time that ``limits`` allow; the whole if it is alone.
    """
    sides = references(subject.artifact, subject.spec, checkpoint, device, subject.part)
    facts = _facts(subject)
    plan = planned(subject.spec, facts, checkpoint.root, replace(limits, max_seconds=seconds))
    known = partial(_cache, subject.spec, subject.part, checkpoint, device)
    report = validate.judge(
        subject.open,
        sides.reference,
        sides.truth,
        plan,
        spec=subject.spec,
        settings=limits.applied(sides.settings),
        cache=known(facts.get("precision") or "float32") if limits.cache else None,
        on_progress=_steps(notify),
    )
    report = report.cut_short(
        _left_out_on_request(report, subject.spec, facts, checkpoint.root, limits))
    reduced = sides.settings.gate == "precision"
    if limits.budget is None and not reduced:
        return report
    if not validate.measurable(subject.spec):
        return _noted(report, "no effects are measured on outputs that are all integers")
    if report.gates["hygiene"] != "pass":  # what fails its cases would fail these, too
        return _noted(report, "no effects were measured, since Gate 0 does not pass")
    notify("validating: effects on the answers")
    made_under = subject.artifact.manifest.options if subject.artifact else {}
    budget = limits.budget or deriving.budget_of(made_under)
    # What the limit left out of the other gates is left out here.
    ran = {record.label for record in report.cases}
    essential = tuple(case for case in plan.cases if case.essential and case.label in ran)
    try:
        effects = validate.measure_effects(
            subject.open,
            original(checkpoint, "float64", subject.spec, device, part=subject.part),
            deriving.text_cases(subject.spec, checkpoint.root)
            or deriving.enough(essential or plan.cases[:1]),
            spec=subject.spec,
            budget=budget,
            settings=limits.applied(sides.settings),
            # The original in float64 is what Gate A held the parent against.
            cache=known("float32") if limits.cache else None,
        )
    except Exception as error:  # noqa: BLE001 - recorded as the gate's outcome
        what = "; ".join(str(error).splitlines()) or type(error).__name__
        report, effects = _noted(report, f"effects could not be measured: {what}"), ()
    return report.with_effects(effects, budget)


def _noted(report: ParityReport, note: str) -> ParityReport:
    return replace(report, notes=(*report.notes, note))


def _judge_parts(
    subject: Subject,
    checkpoint: Checkpoint,
    runtime: str | None,
    device: str,
    limits: Limits,
    notify: Notify,
) -> ParityReport:
    """Every part as a model of its own, and then what they generate together.

    Each has its share of what is left of the time then, and runs its first case if nothing is.
    """
    artifact = subject.artifact
    assert artifact is not None
    if limits.inputs is not None:
        raise UsageError("--inputs goes with an artifact of one graph",
                         allowed=f"parts are drawn for: {', '.join(subject.parts)}")
    end = None if limits.max_seconds is None else time.monotonic() + limits.max_seconds
    reports: dict[str, ParityReport] = {}
    for name, part in subject.parts.items():
        sizes = {dim: chosen for dim, chosen in limits.sizes.items() if dim in part.spec.free}
        seconds = generating.share(end, len(subject.parts) - len(reports) + generating.STAGES)
        reports[name] = _judge(part, checkpoint, device, replace(limits, sizes=sizes), seconds,
                               partial(_of_part, notify, name))
    first = next(iter(subject.parts.values()))
    sides = references(first.artifact, first.spec, checkpoint, device, first.part)
    return generating.judged(reports, artifact, checkpoint, limits.applied(sides.settings),
                             end=end, tight=limits.short, runtime=runtime, device=device,
                             notify=notify)


def _of_part(notify: Notify, name: str, text: str) -> None:
    notify(f"{name}: {text}")


def _pair(
    path: Path, other: Path, runtime: str | None, device: str, limits: Limits, notify: Notify
) -> ParityReport:
    """Compare an artifact with another artifact; there is no truth, so no noise floor.

    Raises:
        UsageError: either is several graphs, they read different inputs, or a budget is given.
    """
    if limits.budget is not None:
        raise UsageError("a budget is for effects against a model, and this is an artifact",
                         allowed="--budget with --reference MODEL, or without --reference")
    made_for = str(artifacts.read(other).manifest.target.get("device", "cpu"))
    left = subjects.of_artifact(path, runtime, device)
    right = subjects.of_artifact(other, device=made_for)
    if left.parts or right.parts:
        raise UsageError("artifacts of several graphs are compared with their source only",
                         allowed="--reference MODEL, or none")
    names = (left.spec.input_names, right.spec.input_names)
    if names[0] != names[1]:
        raise UsageError(
            f"{path} reads {', '.join(names[0])}, and {other} reads {', '.join(names[1])}",
            allowed="two artifacts with the same inputs",
        )
    plan = planned(left.spec, _facts(left), path, limits)
    return validate.judge(
        left.open, right.open, None, plan, spec=left.spec, on_progress=_steps(notify),
        settings=limits.applied(validate.Settings()),
    )  # fmt: skip


def _steps(notify: Notify) -> validate.Progress:
    return lambda stage, done, total: notify(f"validating: {stage} {done} of {total}")


def _facts(subject: Subject) -> Mapping[str, Any]:
    return subject.artifact.manifest.facts if subject.artifact else {}


def _cache(
    spec: ModelSpec, part: str | None, checkpoint: Checkpoint, device: str, precision: str
) -> validate.ReferenceCache | None:
    """Stored reference runs of this source in a precision.

    Not for a quantised artifact: which of the source's layers are rounded is that artifact's own.
    Nor for a source with Python of its own: nothing tells what that imports, and when it changes.
    """
    if precision not in ("float32", *HALVES) or checkpoint.own_code:
        return None
    outputs = [f"{t.name} {t.dtype}" for t in spec.outputs]
    parts = (*identity(checkpoint), part or "", device, precision, *outputs, *_versions())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return validate.ReferenceCache(checkpoints.cache_root() / "reference" / key[:16], key)


def _versions() -> list[str]:
    """What computes the source's runs, and what decides how it does."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("modelport", "torch", "transformers", "sentence-transformers", "timm"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def _every_profile(spec: ModelSpec, facts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Sizes that reach every optimisation profile of an artifact that has any, with the usual ones.

    The kernels of one profile may be right and those of the next wrong.
    """
    if "engines" not in facts:
        return {}
    edges = profiles.edges(profiles.from_record(facts["engines"], spec))
    return {name: tuple(sorted({*edges.get(name, ()), *matrix.sizes_of(name, dim)}))
            for name, dim in spec.free.items()}


def _left_out_on_request(
    report: ParityReport, spec: ModelSpec, facts: Mapping[str, Any], root: Path, limits: Limits
) -> int:
    """How many cases that coverage rests on are missing because the caller set a tighter limit.

    What the default limits leave out (the largest sizes of a large vocabulary, or the end of the
    matrix on a slow machine) does not count: there is no proof of these artifacts without it. And
    a tighter limit that costs only cases beyond coverage narrows nothing.
    """
    memory = limits.max_memory
    if not limits.short and (memory is None or memory >= matrix.MAX_MEMORY):
        return 0
    usual = planned(spec, facts, root, replace(limits, max_seconds=None, max_memory=None))
    ran = {case.label for case in report.cases}
    return sum(case.essential and case.label not in ran for case in usual.cases)


def planned(spec: ModelSpec, facts: Mapping[str, Any], root: Path, limits: Limits) -> Plan:
    """The cases of a comparison: drawn ones, texts, and the user's own.

    Args:
        facts: of the artifact's manifest.
        root: a directory with the tokenizer, if there is one.

    Raises:
        UsageError, SpecError: sizes or inputs that ``limits`` names are not the model's.
    """
    plan = validate.plan(
        spec,
        max_seconds=limits.max_seconds,
        sizes={**_every_profile(spec, facts), **limits.sizes},
        traced={name: (size,) for name, size in facts.get("traced", {}).items()},
        max_memory=validate.MAX_MEMORY if limits.max_memory is None else limits.max_memory,
    )
    plan = plan + deriving.texts_of(spec, root, TEXTS)
    if limits.inputs is not None:
        plan = plan + validate.file_cases(spec, limits.inputs)
    return plan
