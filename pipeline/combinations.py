"""``modelport bench bark --combinations``: what each optimisation of Bark brings, and its proof.

Every combination is measured in fresh processes, interleaved in rounds, at batch 1 and at a larger
batch; before that each is held against the plain model, decision by decision.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from .. import bark
from ..bark import Optimisations, Setting
from ..checkpoints import consent
from ..errors import ModelportError, ParityError
from ..runtimes import benchmark
from ..runtimes.benchmark import calls
from ..runtimes.benchmark.records import Cell, digest, write_json
from ..runtimes.benchmark.views import Table
from .request import ModelRequest, Notify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from ..runtimes.benchmark import Row, RunReport
    from ..runtimes.benchmark.report import Footprint

REPORT, TABLES = "combinations.json", "combinations.md"
PARITY = "parity.json"
PROVEN_TOKENS = 4
PROMPTS = (0, 1)
TASK = "text-to-audio"


@dataclass(frozen=True, slots=True)
class Proof:
    """Why a combination may be used, or why there is no telling.

    Attributes:
        found: None where the combination can't be had here; ``why`` says why.
    """

    name: str
    verdict: str
    found: bark.Agreement | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        samples: calls of each row, over all rounds.
        rounds: fresh processes of each row.
        prove: hold every combination against the plain model first.
    """

    model: ModelRequest
    device: str = "cpu"
    setting: Setting = field(default_factory=Setting)
    batches: tuple[int, ...] = (1, 8)
    samples: int = 100
    rounds: int = 5
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    timeout: float = 3600.0
    prove: bool = True

    @classmethod
    def usual(cls, device: str, **changes: Any) -> Plan:
        """The article's setting on a GPU; on a CPU what ten minutes allow, weights from a seed."""
        if device == "cpu":
            model = ModelRequest("suno/bark-small", task=TASK, weights="random")
            return replace(cls(model, device, bark.SHORT, samples=3, rounds=3), **changes)
        model = ModelRequest("suno/bark", task=TASK)
        return replace(cls(model, device, bark.ARTICLE), **changes)


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of every batch, their proofs, and everything they were computed from."""

    plan: Plan
    run: RunReport
    proofs: tuple[Proof, ...]

    def tables(self) -> tuple[Table, ...]:
        """The article's tables: for each batch the figures, then relative to the first row."""
        made = []
        for batch in self.plan.batches:
            rows = [row for row in self.run.rows if row.cell.batch == batch]
            named = {row.cell.subject: row for row in rows}
            order = [o.name for o in bark.combinations(self.plan.device)]
            ordered = [named[name] for name in order if name in named]
            made += [self._absolute(batch, ordered), self._relative(batch, ordered)]
        return tuple(made)

    def _absolute(self, batch: int, rows: Sequence[Row]) -> Table:
        verdicts = {proof.name: proof.verdict for proof in self.proofs}
        lines = []
        for row in rows:
            name = row.cell.subject
            if row.p50 is None or row.throughput is None:
                lines.append((name, "", "", "", row.detail.removeprefix("backend absent: ")))
                continue
            lines.append((
                name, f"{row.p50.value:.2f} ± {row.p50.margin:.1%}",
                f"{_memory(row) / 1e6:.1f} MB", f"{row.throughput.value:.3f}",
                f"parity {verdicts.get(name, 'not checked')}; {row.verdict.word}"))
        return Table(f"batch {batch}: {self._work()}",
                               ("combination", "latency, s", "memory", "samples/s", "note"),
                               tuple(lines))

    def _relative(self, batch: int, rows: Sequence[Row]) -> Table:
        first = rows[0]
        lines = []
        for row in rows:
            if row.p50 is None or row.throughput is None or first.p50 is None:
                continue
            assert first.throughput is not None
            claim = "" if row is first or row.comparison is None else row.comparison.word
            lines.append((row.cell.subject, _change(row.p50.value, first.p50.value),
                          _change(_memory(row), _memory(first)),
                          _change(row.throughput.value, first.throughput.value), claim))
        return Table(f"batch {batch}, relative to {first.cell.subject}",
                               ("combination", "latency", "memory", "samples/s", "claim"),
                               tuple(lines))

    def _work(self) -> str:
        setting = self.plan.setting
        limit = "exactly" if setting.lengths == "fixed" else "at most"
        speaker = f", voice {setting.voice}" if setting.voice else ""
        return f"{limit} {setting.new_tokens} semantic tokens{speaker}"

    def notes(self) -> tuple[str, ...]:
        """What a reader must know to trust the figures."""
        where = ("peak that torch allocated on the device" if self.plan.device != "cpu" else
                 "peak resident memory while it speaks, less the interpreter and its libraries")
        found = [f"memory: {where}; latency: one call of generate; ± is the 95 % interval over "
                 f"{self.plan.rounds} processes"]
        found += [_told(proof) for proof in self.proofs]
        return (*found, *self.run.environment.lines())

    def require_sound(self) -> None:
        """Raise where a combination says something else, or a measurement failed.

        Raises:
            ParityError: a combination is not equal to the plain model.
            IncompleteError: cells are missing.
        """
        wrong = [_told(proof) for proof in self.proofs if proof.verdict == "fail"]
        if wrong:
            raise ParityError(wrong[0], allowed="the plain model's decisions, but for rounding")
        self.run.require_complete()

    def markdown(self) -> str:
        """Tables and notes as Markdown."""
        parts = []
        for table in self.tables():
            lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
            parts += [f"## {table.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes())]) + "\n"


def combinations(plan: Plan, output: Path, *, notify: Notify = lambda _: None) -> Report:
    """Measure what is missing in ``output`` and write the report there.

    Raises:
        UsageError: no such model, or a setting it can't do.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = plan.model.resolve()
    identity = checkpoint.source.digest
    proofs: tuple[Proof, ...] = ()
    if plan.prove:
        notify("comparing every combination with the plain model")
        proofs = _proven(plan, checkpoint.root, identity, output)
    verdicts = {proof.name: proof.verdict for proof in proofs}
    per_process = math.ceil(plan.samples / plan.rounds)
    request = benchmark.SweepRequest(
        tuple(_subject(plan, o, checkpoint.root, identity, verdicts.get(o.name, ""))
              for o in bark.combinations(plan.device)),
        output, batches=plan.batches, sequences=(plan.setting.new_tokens,),
        devices=(plan.device,), threads=(plan.threads,), rounds=plan.rounds,
        seed=plan.setting.seed, aa=plan.rounds >= 5, timeout=plan.timeout,
        sampling=benchmark.Sampling(0, per_process, per_process, 0.0), measure_ceilings=False)
    outcome = calls.run(
        request, lambda result, done, total: notify(f"{done}/{total} {result.cell.label()}"))
    report = Report(plan, benchmark.summarise(request, outcome), proofs)
    write_json(output / REPORT, _plain(report))
    (output / TABLES).write_text(report.markdown(), encoding="utf-8")
    return report


def _subject(
    plan: Plan, chosen: Optimisations, root: Path, identity: str, parity: str
) -> benchmark.Subject:
    return benchmark.Subject(
        chosen.name, str(root), identity, "torch", dtype=chosen.precision,
        options={**asdict(chosen), **asdict(plan.setting), **_trust(plan)}, parity=parity)


def _trust(plan: Plan) -> dict[str, bool]:
    """What a process that loads the tokenizer is told; a pickle has been converted before.

    Nothing where nothing is allowed, so that what was measured before is still known by its name.
    """
    return {"trust_remote_code": True} if plan.model.trust_remote_code else {}


def open_cell(cell: Cell) -> bark.Speaker:
    """What a measured process opens."""
    chosen, setting = (
        kind(**{f.name: cell.options[f.name] for f in fields(kind)})
        for kind in (Optimisations, Setting))
    assert isinstance(chosen, Optimisations)
    assert isinstance(setting, Setting)
    with _trusting(cell.options):
        return bark.open_speaker(Path(cell.path), chosen, setting, device=cell.device)


def _trusting(told: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Allow what a process was told, see :func:`_trust`, for the time of a block."""
    return consent.allowing(consent.Consent(trust_remote_code="trust_remote_code" in told))


def _memory(row: Row) -> int:
    found: Footprint | None = row.memory
    assert found is not None
    host: int = found.weights + found.activations
    return host if found.gpu_allocated is None else found.gpu_allocated


def _change(value: float, first: float) -> str:
    return f"{value / first - 1:+.0%}"


def _told(proof: Proof) -> str:
    found = proof.found
    if found is None:
        return f"{proof.name}: {proof.verdict}: {proof.why}"
    same = "every prompt sounds the same; " if not found.diverse else ""
    return (f"{proof.name}: parity {proof.verdict}: {same}{found.flips} of {found.decisions} "
            f"decisions differ, {found.unexplained} of them by more than rounding; ρ "
            f"{found.rho:.2f}, {found.quality:.0f} dB, audio within {found.audio:.1e}")


def _plain(report: Report) -> dict[str, Any]:
    """As data, to be published: without the directories of this machine."""
    run = asdict(report.run)
    for measured in (*run["rows"], *run["results"]):
        measured["cell"]["path"] = ""
    found: dict[str, Any] = _finite({
        "plan": asdict(report.plan), "proofs": [asdict(p) for p in report.proofs],
        "tables": [asdict(t) for t in report.tables()], "notes": report.notes(), "run": run,
    })  # fmt: skip
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity; what is infinite or no number becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _proven(plan: Plan, root: Path, identity: str, output: Path) -> tuple[Proof, ...]:
    """The proofs, from an earlier run with the same versions, or from a process of its own."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    job = {"root": str(root), "device": plan.device, "setting": asdict(plan.setting),
           **_trust(plan)}
    key = digest({**job, "root": identity, "versions": versions})
    path, adapter = output / PARITY, TypeAdapter(tuple[Proof, ...])
    try:
        kept: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        if kept["key"] == key:
            return adapter.validate_python(kept["proofs"])
    except (OSError, ValueError, KeyError, ValidationError):
        pass
    # A process of its own: what it allocates would stay with the one that measures.
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__], input=json.dumps(job), text=True,
        capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ModelportError(f"the combinations could not be compared: {said[-1]}")
    proofs = adapter.validate_json(done.stdout)
    write_json(path, {"key": key, "proofs": [_finite(asdict(p)) for p in proofs]})
    return proofs


def prove(root: Path, setting: Setting, device: str) -> tuple[Proof, ...]:
    """Hold every combination, and batching, against the plain model, greedily, on a few tokens."""
    asked = replace(setting, new_tokens=min(setting.new_tokens, PROVEN_TOKENS), lengths="fixed",
                    sample=False)
    recordings: dict[str, bark.Recording] = {}

    def recorded(
        chosen: Optimisations, numbers: Sequence[int] = PROMPTS,
        along: bark.Recording | None = None,
    ) -> bark.Recording:
        with bark.open_speaker(root, chosen, asked, device=device) as speaker:
            codes.append(int(speaker.model.generation_config.codebook_size))
            return bark.record(speaker, numbers, along=along)

    codes: list[int] = []
    plain = recorded(Optimisations())
    truth = recorded(Optimisations(precision="float64"), along=plain)
    proofs = []
    for chosen in bark.combinations(device):
        if reason := chosen.unavailable(device):
            proofs.append(Proof(chosen.name, "absent", why=reason))
            continue
        own = plain if chosen == Optimisations() else recorded(chosen, along=plain)
        if chosen == Optimisations(precision=chosen.precision):
            recordings[chosen.precision] = own
        found = bark.compare(own, plain, recordings[chosen.precision], truth,
                                   codebook=codes[0])
        proofs.append(Proof(chosen.name, found.verdict(chosen.precision), found))
    alone = recorded(Optimisations(), PROMPTS[:1], plain.row(0))
    found = bark.compare(alone, plain.row(0), plain.row(0), truth.row(0), codebook=codes[0])
    return (*proofs, Proof("alone against in a batch", found.verdict("float32"), found))


def main() -> int:
    """Entry point of the process that proves: a job on stdin, proofs on stdout."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = json.load(sys.stdin)
    with _trusting(job):
        proofs = prove(Path(job["root"]), Setting(**job["setting"]), job["device"])
    sys.stdout.write(json.dumps([_finite(asdict(p)) for p in proofs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
