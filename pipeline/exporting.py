"""Export: try strategies from cheapest to dearest, keep the first that is proven."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import artifacts, errors, exporters, transforms
from ..checkpoints import consent, known
from ..errors import (
    ClaimError,
    ExportError,
    ModelportError,
    OpsetTooLow,
    ParityError,
    UsageError,
)
from ..exporters import NOTIFY
from .validator import Validator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..artifacts import Artifact, Attempt
    from ..checkpoints import Checkpoint, LoadedModel
    from .request import ModelRequest, Notify


STEPS = ".steps"
"""Below the directory being written: what the result is derived from, removed at the end."""


def export(
    format: str,  # noqa: A002 - the word users know
    request: ModelRequest,
    output: Path,
    options: Any = None,
    *,
    force: bool = False,
    validate: bool = True,
    notify: Notify = lambda _: None,
) -> Artifact:
    """Export a model, prove it, and place it at ``output``; or leave ``output`` as it was.

    Strategies are tried from cheapest to dearest. The first whose file is what was asked for and
    passes parity is kept; the manifest records every attempt. If none passes, the last one that
    could be validated is moved to ``output.rejected`` with its report, be it of the artifact to
    build from.

    Args:
        options: an instance of the exporter's ``options_type``; None for its defaults.
        validate: False skips parity; the manifest says so and publishing refuses it by default.

    Raises:
        UsageError, UnsafeError, UnavailableError: see :mod:`.errors`.
        ExportError: no strategy produced a file that opens.
        ClaimError: what was written is not what was asked for.
        ParityError: written, but not equal to the source.
    """
    exporter = exporters.get(format)
    options = exporter.options_type() if options is None else options
    exporter.check(options)
    if getattr(options, "budget", "") or getattr(options, "texts", ""):
        from . import deriving

        options = deriving.settled(options)
    if exporter.candidates(options):
        if not validate:
            raise UsageError("a search drops what fails its gates, so it cannot do without them",
                             hint="leave --no-validate out")
        from . import searching

        with consent.allowing(request.allowed):  # its validator finds the source again
            return searching.search(exporter, request, output, options, force=force, notify=notify)
    with ExitStack() as stack:
        stack.enter_context(consent.allowing(request.allowed))
        staging = stack.enter_context(artifacts.stage(output, force=force))
        validator = stack.enter_context(Validator(notify)) if validate else None
        if validator and exporter.parent_of(options) is None:  # else the parent's is the first
            validator.start(request.model)
        notify(f"finding {request.model}")
        checkpoint = request.resolve()
        if len(exporter.strategies(options)) > 1:  # with one, the user has chosen it
            known.refuse(checkpoint, exporter.name)
        if validator:
            validator.prepare(checkpoint, exporter.name, getattr(options, "device", "cpu"))
        notify("reading the architecture")
        model = _load(checkpoint, exporter.attention(options))
        _require_fitting(exporter, model)
        parent = stack.enter_context(_parent(exporter, request, staging, options, validate, notify))
        attempts: list[Attempt] = []
        strategies = list(exporter.strategies(options))
        while strategies:
            strategy = strategies.pop(0)
            _empty(staging.root)
            try:
                attempt = _attempt(exporter, model, staging.root, options, strategy, attempts,
                                   validator, notify, parent)
            except OpsetTooLow as error:
                raised = exporter.raised(options, error.needed)
                if raised is None:
                    raise
                reason = f"{error.found}: raised to {error.needed}"
                attempts.append(artifacts.Attempt(strategy, "failed", reason))
                options, strategies = raised, list(exporter.strategies(raised))
                model = _load(checkpoint, exporter.attention(options))
                continue
            attempts.append(attempt)
            if attempt.outcome == "kept":
                return artifacts.read(staging.commit())
            if attempt.outcome == "rejected":
                staging.set_aside()
        where = _reject(staging, attempts)
    raise _no_strategy_left(attempts, where)


@contextmanager
def _parent(
    exporter: exporters.Exporter[Any],
    request: ModelRequest,
    staging: artifacts.Staging,
    options: Any,
    validate: bool,
    notify: Notify,
) -> Iterator[Artifact | None]:
    """The artifact an exporter builds from, proven like any other; gone when the block is left.

    One that fails parity is rejected in the place of what was to be built from it.
    """
    origin = exporter.parent_of(options)
    if origin is None:
        yield None
        return
    wanted = exporter.parent_options(options)
    output = staging.destination
    with artifacts.stage(output.with_name(f".{output.name}.parent")) as workshop:
        place = workshop.root / origin
        try:
            yield export(
                origin, request, place, wanted, validate=validate,
                notify=lambda text: notify(f"{origin}: {text}"),
            )
        except ParityError as error:
            if place.exists():  # not the parent's: raised inside the block
                raise
            hint, rejected = error.hint, place.with_name(f"{place.name}.rejected")
            if rejected.exists():  # a search has none
                for entry in rejected.iterdir():
                    entry.rename(staging.root / entry.name)
                hint = f"modelport inspect {staging.reject(error.found)}"
            raise ParityError(
                f"the {origin} artifact to build from failed: {error.found}", hint=hint
            ) from error


def _reject(staging: artifacts.Staging, attempts: list[Attempt]) -> Path | None:
    """Move what failed parity last aside, its manifest telling all attempts; None if none did."""
    reasons = [a.reason for a in attempts if a.outcome == "rejected"]
    if not reasons:
        return None
    staging.restore()
    manifest = artifacts.read(staging.root).manifest
    artifacts.write_manifest(
        staging.root, dataclasses.replace(manifest, attempts=tuple(attempts))
    )
    return staging.reject(reasons[-1])


def _load(checkpoint: Checkpoint, attention: Any) -> LoadedModel:
    from .. import checkpoints

    return checkpoints.load(checkpoint, attention=attention)


def _require_fitting(exporter: exporters.Exporter[Any], model: LoadedModel) -> None:
    """Refuse a model of several graphs where the format holds one."""
    if model.parts and not exporter.several:
        able = [name for name in exporters.names() if exporters.get(name).several]
        task = model.checkpoint.task
        raise UsageError(
            f"{task} takes {', '.join(model.parts)} as graphs of their own with a cache between "
            f"steps, and {exporter.name} holds one graph without a state",
            allowed=", ".join(able),
            hint=f"modelport export {able[0]}, or --task feature-extraction for the bare model",
        )


def _attempt(
    exporter: exporters.Exporter[Any],
    model: LoadedModel,
    root: Path,
    options: Any,
    strategy: str,
    before: list[Attempt],
    validator: Validator | None,
    notify: Notify,
    parent: Artifact | None,
) -> Attempt:
    """Export by one strategy into ``root``, derive what was asked for, and judge the result."""
    start = time.monotonic()

    def outcome(kind: Literal["kept", "rejected", "failed"], reason: str = "") -> Attempt:
        return artifacts.Attempt(strategy, kind, reason, round(time.monotonic() - start, 3))

    steps = exporter.derivations(options)
    artifact: Artifact | None = None
    for index, step in enumerate((None, *steps)):
        what = f"{step.transform}: " if step else ""
        place = _place(root, index) if steps else root
        try:
            if step is None:
                notify(f"capturing the graph ({strategy})")
                NOTIFY.set(notify)
                artifact = _first(exporter, model, place, exporter.base(options), strategy, parent)
            else:
                from . import deriving

                assert artifact is not None
                notify(f"applying {step.transform}")
                artifact = deriving.derive(exporter, model, artifact, place, step)
        except (errors.UnsafeError, errors.UnavailableError, UsageError):
            raise
        except (ClaimError, ExportError) as error:
            if len(exporter.strategies(options)) == 1:
                raise  # there is nothing else to try, and it says what is wrong
            return outcome("failed", what + str(error))
        except Exception as error:  # noqa: BLE001 - an exporter may fail in any way; the next one is tried
            return outcome("failed", what + first_line(error))
        attempts = (*before, outcome("kept", "" if validator else "not validated"))
        artifact = _with_attempts(artifact, attempts)
        if validator and _is_judged(steps, index):
            notify(f"validating {step.transform if step else ''} in a process of its own")
            manifest = validator.validate(place)
            artifact = artifacts.read(place)
            if not manifest.proven:
                _promote(root, place)
                return outcome("rejected", what + verdict(root, manifest))
    _promote(root, place)
    return attempts[-1]


def _is_judged(steps: tuple[exporters.Derivation, ...], index: int) -> bool:
    """The result is, and so is whatever loses precision next: Gate B rests on its Gate A."""
    return index == len(steps) or transforms.get(steps[index].transform).lossy


def _place(root: Path, index: int) -> Path:
    """Where a step writes, so that what the result is made from stays apart from it."""
    place = root / STEPS / str(index)
    place.mkdir(parents=True)
    return place


def _promote(root: Path, place: Path) -> None:
    """Leave in ``root`` the artifact that lies at ``place`` and nothing else."""
    if place != root:
        for entry in place.iterdir():
            entry.rename(root / entry.name)
        shutil.rmtree(root / STEPS)


def _with_attempts(artifact: Artifact, attempts: tuple[Attempt, ...]) -> Artifact:
    manifest = dataclasses.replace(artifact.manifest, attempts=attempts)
    return artifacts.write_manifest(artifact.root, manifest)


def _first(
    exporter: exporters.Exporter[Any],
    model: LoadedModel,
    root: Path,
    options: Any,
    strategy: str,
    parent: Artifact | None,
) -> Artifact:
    """Export into ``root``, read it back, and write its manifest."""
    exporter.export(model, parent, root, options, strategy)
    written = exporter.read_back(model, root, options)
    for sidecar in model.sidecars:
        shutil.copyfile(sidecar, root / sidecar.name)
    # How the parent was transformed is what the result is judged by.
    inherited = {name: fact for name, fact in (parent.manifest.facts if parent else {}).items()
                 if name == "precision" or name in transforms.names()}
    components = {
        name: dataclasses.replace(found, facts={"traced": _traced(model.parts[name]),
                                                **found.facts})
        for name, found in written.components.items()
    }  # fmt: skip
    traced = {} if components else {"traced": _traced(model)}
    manifest = artifacts.Manifest(
        format=exporter.name,
        spec=written.spec,
        source=model.source,
        options=dataclasses.asdict(options),
        facts={"strategy": strategy, **traced, **written.facts, **inherited},
        tools=tool_versions(),
        files=artifacts.collect(root),
        target=written.target,
        parent=parent.manifest.identity if parent else None,
        lineage=_lineage(parent),
        components=components,
    )
    return artifacts.write_manifest(root, manifest)


def _lineage(parent: Artifact | None) -> tuple[artifacts.Ancestor, ...]:
    if parent is None:
        return ()
    from . import deriving

    return (*parent.manifest.lineage, deriving.ancestor(parent))


def _traced(model: LoadedModel) -> dict[str, int]:
    """The sizes that the capture saw."""
    return model.spec.check(model.samples)


def verdict(root: Path, manifest: artifacts.Manifest) -> str:
    """The verdict on an artifact in one line, with what its report found first, if it has one."""
    from ..validate.report import from_json

    said = f"parity: {manifest.parity.verdict if manifest.parity else 'no verdict'}"
    try:
        report = from_json((root / artifacts.PARITY).read_bytes())
    except (OSError, ValueError):
        return said
    reasons = [f"{r.reason}" if r.output == "*" else f"{r.output}: {r.reason}"
               for r in report.failures[:1]] or [*report.unmet, *report.notes]
    return ", ".join([said, *reasons])


def _no_strategy_left(attempts: list[Attempt], where: Path | None) -> ModelportError:
    tried = "; ".join(f"{a.strategy}: {a.reason}" for a in attempts)
    if any(a.outcome == "rejected" for a in attempts):
        return ParityError(
            f"no strategy passed parity ({tried})",
            hint=f"modelport inspect {where}",
        )
    return ExportError(f"no strategy produced an artifact ({tried})", hint="run again with -v")


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def default_output(request: ModelRequest, format: str) -> Path:  # noqa: A002
    """Where an export goes when no destination is given: ``out/MODEL-FORMAT``."""
    name = Path(request.model).name or "model"
    return Path("out") / f"{name}-{format}"


def tool_versions() -> dict[str, str]:
    """Versions of what makes an artifact and judges it, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    packages = ("modelport", "numpy", "torch", "transformers", "onnx", "onnx-ir", "onnxscript",
                "onnxsim", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
