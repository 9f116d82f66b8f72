"""``--optimize auto``: build combinations of transforms, prove each, measure, keep the front.

Every combination is an artifact of its own below ``OUTPUT.search``; what is there already is not
built again, and what was measured is not measured again, so a search goes on where it ended. One
of a source with Python of its own begins anew: that may be other code by then.

What is less precise has references of its own, which no other trial shares, so its gates cost most
of a trial's time. They are held to :data:`PROOF_SECONDS`; before such an artifact is placed it is
proven in full, and if it fails the next best is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .. import artifacts, checkpoints, transforms
from ..artifacts.directory import REASON
from ..errors import (
    ClaimError,
    ExportError,
    ModelportError,
    OpsetTooLow,
    ParityError,
    UnsafeError,
    UsageError,
)
from ..runtimes.benchmark.cell import classify
from . import deriving, exporting, figures, references
from .request import file_digest
from .validating import parity_report
from .validator import Validator

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..artifacts import Artifact, Manifest
    from ..checkpoints import LoadedModel
    from ..exporters import Derivation, Exporter
    from .figures import Figures
    from .request import ModelRequest, Notify

Outcome = Literal["measured", "rejected", "failed", "left out"]
OBJECTIVES = ("latency", "throughput", "size", "memory")
ROUNDS = 5
"""Fresh processes for each figure, as far as the time allows."""

MEASURED = "measured"
"""Directory of the figures, beside the combinations."""

PROOF_SECONDS = 60.0
"""For the cases of each graph of a trial of less precision, those that coverage rests on first."""

LASTING = (ExportError, UsageError, ClaimError)
"""What comes again however often it is tried. A process that was killed or a package that is absent
does not, and what failed parity has its report."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination and what became of it.

    Attributes:
        options: that differ from the plain export's.
        bytes: of its weights.
        runtime, latency_s, rows_per_s, peak_bytes: see :class:`~.figures.Figures`.
        front: no other trial is at least as good in all four and better in one.
    """

    name: str
    options: dict[str, Any]
    outcome: Outcome
    reason: str = ""
    runtime: str = ""
    bytes: int = 0
    latency_s: float = 0.0
    rows_per_s: float = 0.0
    peak_bytes: int = 0
    front: bool = False

    def costs(self) -> tuple[float, float, float, float]:
        """The four figures in the order of :data:`OBJECTIVES`, less being better."""
        return self.latency_s, -self.rows_per_s, self.bytes, self.peak_bytes

    def line(self) -> str:
        """The figures, or why there are none."""
        if self.outcome != "measured":
            return self.reason
        place = "on the front" if self.front else "not on the front"
        return (f"{1e3 * self.latency_s:.4g} ms a row alone, {self.rows_per_s:.4g} rows/s by "
                f"{figures.MANY}, weights {self.bytes / 1e6:.4g} MB, "
                f"peak {self.peak_bytes / 1e6:.4g} MB ({self.runtime}); {place}")


class Search:
    """A search of one model's combinations in one directory.

    Args:
        asked: the options that left the choice to a search.
        workshop: where the combinations lie.
        validator: one process for all of them.
        seconds: nothing is begun that would end later, by what the longest took so far, with
            as long kept back for proving the best in full as the plain export's proof took; that
            proof itself is never cut short.
    """

    def __init__(
        self,
        exporter: Exporter[Any],
        request: ModelRequest,
        model: LoadedModel,
        asked: Any,
        workshop: Path,
        seconds: float,
        validator: Validator,
        notify: Notify,
    ) -> None:
        self._exporter = exporter
        self._request = request
        self._model = model
        self._asked = asked
        self._workshop = workshop
        self._end = time.monotonic() + seconds
        self._longest = 0.0
        self._proof = 0.0
        self._validator = validator
        self._notify = notify
        self._base: Any = None
        self._source: list[Any] = [dataclasses.asdict(model.source),
                                   *references.identity(model.checkpoint)]

    def run(self, candidates: Sequence[Any]) -> tuple[list[Trial], dict[str, Artifact]]:
        """Try all; the trials, the front marked, and the artifacts of those that were measured.

        Raises:
            ModelportError: the plain export, which all others are made from, failed.
        """
        self._base = self._exporter.base(candidates[0])
        report = parity_report(self._artifact(self._base, ()))
        self._proof = report.seconds if report else 0.0
        trials: list[Trial] = []
        made: dict[str, Artifact] = {}
        for options in candidates:
            name = self._name(options)
            self._notify(f"search: {name}")
            start = time.monotonic()
            trial, artifact = self._try(name, options)
            if artifact is not None:
                trial = self._measured([trial], {name: artifact}, rounds=1)[0]
            if artifact is not None and trial.outcome == "measured":
                made[name] = artifact
            trials.append(trial)
            self._longest = max(self._longest, time.monotonic() - start)
        for rounds in range(2, ROUNDS + 1):
            if not made or self._over():
                break
            self._notify(f"search: round {rounds} of {ROUNDS}")
            trials = self._measured(trials, made, rounds)
        return _with_front(trials), made

    def proven(self, artifact: Artifact) -> str:
        """Prove in full what was tried within :data:`PROOF_SECONDS`: why it fails, or nothing."""
        place = artifact.root
        if not _tried(place).exists():
            return ""
        manifest = self._validator.validate(place)
        if manifest.proven:
            _tried(place).unlink()
            return ""
        reason = f"proven in full: {exporting.verdict(place, manifest)}"
        (place / REASON).write_text(f"{reason}\n", encoding="utf-8")
        place.rename(_rejected(place))
        _tried(place).unlink()
        return reason

    def _over(self) -> bool:
        return time.monotonic() + self._longest + self._proof > self._end

    def _name(self, options: Any) -> str:
        changed = self._changed(options)
        return ", ".join(str(value) for value in changed.values()) or "plain"

    def _changed(self, options: Any) -> dict[str, Any]:
        plain = dataclasses.asdict(self._base)
        return {key: value for key, value in dataclasses.asdict(options).items()
                if value != plain[key] and key in ("optimize", "dtype", "quantize", "opset")}

    def _try(self, name: str, options: Any) -> tuple[Trial, Artifact | None]:
        changed = self._changed(options)
        if self._over() and not self._known(options):
            return Trial(name, changed, "left out", "the time was over"), None
        try:
            try:
                artifact = self._artifact(options, self._exporter.derivations(options))
            except OpsetTooLow as error:
                options = self._raised(options, error)
                artifact = self._artifact(options, self._exporter.derivations(options))
        except UnsafeError:
            raise
        except ModelportError as error:
            kind: Outcome = "rejected" if error.exit_code == 3 else "failed"
            return Trial(name, changed, kind, error.found), None
        return Trial(name, self._changed(options), "measured",
                     bytes=figures.weight_bytes(artifact)), artifact

    def _raised(self, options: Any, error: OpsetTooLow) -> Any:
        """The options at the opset that they need; the error where the user chose another one."""
        asked = dataclasses.replace(options, opset=self._asked.opset)
        raised = self._exporter.raised(asked, error.needed)
        if raised is None:
            raise error
        self._notify(f"{error.found}: raised to {error.needed}")
        return raised

    def _place(self, options: Any) -> Path:
        """Named after all that decides what will lie there, the contents of files included."""
        plain = dataclasses.asdict(options)
        files = [file_digest(value) for value in plain.values()]
        said = [self._source, exporting.tool_versions(),
                {k: v for k, v in plain.items() if k not in ("objective", "search_seconds")}, files]
        key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return self._workshop / key[:16]

    def _known(self, options: Any) -> bool:
        place = self._place(options)
        return any(p.exists() for p in (place, _rejected(place), _failed(place)))

    def _artifact(self, options: Any, steps: Sequence[Derivation]) -> Artifact:
        """The proven artifact of these options, made from that of one step less."""
        place = self._place(steps[-1].result if steps else options)
        if found := _found(place):
            return found
        if _failed(place).exists():
            raise ExportError(_failed(place).read_text(encoding="utf-8"))
        if _rejected(place).exists():
            raise ParityError((_rejected(place) / REASON).read_text(encoding="utf-8").strip())
        if not steps:
            return exporting.export(self._exporter.name, self._request, place, options,
                                    notify=self._notify)
        parent = self._artifact(options if steps[:-1] else self._exporter.base(options), steps[:-1])
        try:
            return self._derived(parent, place, steps[-1])
        except OpsetTooLow:
            raise  # the same may be made at a higher one
        except ModelportError as error:
            if isinstance(error, LASTING):
                _failed(place).write_text(error.found, encoding="utf-8")
            raise
        except Exception as error:
            reason = exporting.first_line(error)
            if not isinstance(error, OSError) and classify(error) != "out of memory":
                _failed(place).write_text(reason, encoding="utf-8")
            raise ExportError(reason) from error

    def _derived(self, parent: Artifact, place: Path, step: Derivation) -> Artifact:
        with artifacts.stage(place) as staging:
            deriving.derive(self._exporter, self._model, parent, staging.root, step)
            manifest = self._judged(staging.root, place, step)
            if not manifest.proven:
                _tried(place).unlink(missing_ok=True)
                reason = f"{step.transform}: {exporting.verdict(staging.root, manifest)}"
                staging.reject(reason)
                raise ParityError(reason)
            return artifacts.read(staging.commit())

    def _judged(self, root: Path, place: Path, step: Derivation) -> Manifest:
        """Its manifest with the verdict of its gates, of reduced precision within a limit.

        In full where that compared nothing of a graph or of the steps. A float32 artifact shares
        the stored references and is always judged in full: Gate B of what is made from it rests
        on that.
        """
        if not transforms.get(step.transform).lossy:
            return self._validator.validate(root)
        _tried(place).touch()
        graphs = max(1, len(artifacts.read(root).manifest.components))
        manifest = self._validator.validate(root, PROOF_SECONDS * graphs)
        if manifest.parity and (not manifest.parity.comparisons or _untold(root)):
            manifest = self._validator.validate(root)
            _tried(place).unlink()
        return manifest

    def _measured(
        self, trials: Sequence[Trial], made: dict[str, Artifact], rounds: int
    ) -> list[Trial]:
        """The trials with the figures of so many rounds; those of before are used again."""
        found = figures.measure(self._model, made, self._workshop / MEASURED, rounds)
        return [_filled(trial, found[trial.name]) if trial.name in made else trial
                for trial in trials]


def search(
    exporter: Exporter[Any],
    request: ModelRequest,
    output: Path,
    options: Any,
    *,
    force: bool,
    notify: Notify,
) -> Artifact:
    """Try the combinations that ``options`` leave open and place the best for its objective.

    Its manifest holds the table of all trials (``facts.search``). Combinations on the front stay
    below ``OUTPUT.search``, and if the time was over before the end, all others too; of a source
    with Python of its own, until the next search there.

    Raises:
        UsageError: the model is several graphs that generate no tokens.
        ModelportError: as :func:`~.exporting.export`; every combination failed.
    """
    start = time.monotonic()
    candidates = exporter.candidates(options)
    objective, seconds = options.objective, options.search_seconds
    workshop = output.with_name(f"{output.name}.search")
    with artifacts.stage(output, force=force) as staging, Validator(notify) as validator:
        model = checkpoints.load(
            request.resolve(), attention=exporter.attention(exporter.base(options)))
        figures.require_measurable(model)
        if model.checkpoint.own_code:  # nothing tells whether it is what an earlier search tried
            _empty(workshop)
        workshop.mkdir(parents=True, exist_ok=True)
        work = Search(exporter, request, model, options, workshop, seconds, validator, notify)
        trials, made = work.run(candidates)
        best, why = choose(trials, objective)
        while reason := work.proven(made[best.name]):
            del made[best.name]
            trials = _with_front([
                dataclasses.replace(t, outcome="rejected", reason=reason) if t.name == best.name
                else t for t in trials])
            best, why = choose(trials, objective)
        chosen = artifacts.read(made[best.name].root)
        shutil.copytree(chosen.root, staging.root, dirs_exist_ok=True)
        manifest = chosen.manifest
        table = {
            "objective": objective,
            "chosen": best.name,
            "why": why,
            "search_seconds": seconds,
            "seconds": round(time.monotonic() - start, 1),
            "threads": figures.threads(),
            "trials": [dataclasses.asdict(trial) for trial in trials],
        }
        attempts = tuple(artifacts.Attempt(t.name, _kind(t, best), _told(t, best, why))
                         for t in trials)
        artifacts.write_manifest(staging.root, dataclasses.replace(
            manifest, attempts=(*manifest.attempts, *attempts),
            facts={**manifest.facts, "search": table}))
        placed = artifacts.read(staging.commit())
    if not any(trial.outcome == "left out" for trial in trials):
        _drop_dominated(trials, made)
    return placed


def choose(trials: Sequence[Trial], objective: str) -> tuple[Trial, str]:
    """The best trial on the front, and why it is.

    Raises:
        UsageError: an unknown objective.
        ParityError: none was measured; all that was tried to its end failed its gates.
        ExportError: none was measured, for want of time or of an artifact.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"the objective {objective!r} is unknown", allowed=", ".join(OBJECTIVES))
    front = [trial for trial in trials if trial.front]
    if not front:
        found = ("no combination passed its gates and was measured ("
                 + "; ".join(f"{t.name}: {t.reason}" for t in trials) + ")")
        outcomes = {trial.outcome for trial in trials}
        if "rejected" in outcomes and "left out" not in outcomes:
            raise ParityError(
                found, hint="a wider --budget, another --dtype, or --optimize none")
        raise ExportError(found, hint="a longer --search-seconds, or --optimize none")
    index = OBJECTIVES.index(objective)
    ordered = sorted(front, key=lambda t: (t.costs()[index], t.costs()))
    best, rest = ordered[0], ordered[1:]
    words = ("lowest latency", "highest throughput", "smallest weights", "lowest peak memory")
    why = f"{words[index]} of {len(front)} on the front"
    if rest:
        ratio = max(abs(rest[0].costs()[index]), 1e-12) / max(abs(best.costs()[index]), 1e-12)
        why += f"; next is {rest[0].name}, {100 * abs(1 - ratio):.1f} % behind"
    return best, why


def _with_front(trials: Sequence[Trial]) -> list[Trial]:
    measured = [trial for trial in trials if trial.outcome == "measured"]

    def dominated(trial: Trial) -> bool:
        mine = trial.costs()
        return any(other.costs() != mine
                   and all(a <= b for a, b in zip(other.costs(), mine, strict=True))
                   for other in measured)

    return [dataclasses.replace(t, front=t.outcome == "measured" and not dominated(t))
            for t in trials]


def _filled(trial: Trial, found: Figures | str) -> Trial:
    if isinstance(found, str):
        return dataclasses.replace(trial, outcome="failed", reason=f"not measured: {found}")
    return dataclasses.replace(
        trial, outcome="measured", reason="", **dataclasses.asdict(found))


def _kind(trial: Trial, best: Trial) -> Literal["kept", "rejected", "failed", "skipped"]:
    if trial.outcome == "measured":
        return "kept" if trial.name == best.name else "skipped"
    return "skipped" if trial.outcome == "left out" else trial.outcome


def _told(trial: Trial, best: Trial, why: str) -> str:
    return f"{trial.line()}; {why}" if trial.name == best.name else trial.line()


def _drop_dominated(trials: Sequence[Trial], made: dict[str, Artifact]) -> None:
    for trial in trials:
        if trial.name in made and not trial.front:
            shutil.rmtree(made[trial.name].root)
            _tried(made[trial.name].root).unlink(missing_ok=True)


def _found(place: Path) -> Artifact | None:
    """The proven artifact that lies there. A kill may have left another, which is removed."""
    if not place.exists():
        return None
    if artifacts.read(place).manifest.proven:
        return artifacts.verify(place)
    shutil.rmtree(place)
    _tried(place).unlink(missing_ok=True)
    return None


def _empty(workshop: Path) -> None:
    """Remove what earlier searches left, and nothing that they did not make."""
    for place in workshop.glob("*"):
        if place.name == MEASURED:
            shutil.rmtree(place)
        elif re.fullmatch(r"[0-9a-f]{16}(\.(rejected|failed|tried))?", place.name):
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def _untold(root: Path) -> bool:
    """Whether cases were left out of a graph, or of the steps, of which nothing was compared."""
    report = parity_report(artifacts.read(root))
    if report is None:
        return False
    shown = {_part(result.case) for result in report.results if result.samples}
    return not shown.issuperset(_part(left.case) for left in report.left_out)


def _part(label: str) -> str:
    first = label.split()[0]
    return first if first.startswith("part=") else ""


def _failed(place: Path) -> Path:
    return place.with_name(f"{place.name}.failed")


def _rejected(place: Path) -> Path:
    return place.with_name(f"{place.name}.rejected")


def _tried(place: Path) -> Path:
    """There as long as an artifact was judged within :data:`PROOF_SECONDS` alone."""
    return place.with_name(f"{place.name}.tried")
