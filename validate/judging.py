"""The judge: runs the cases on candidate, reference and truth, and applies the gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from ..errors import ModelportError, UsageError
from ..session import Session
from . import hygiene
from .compare import error_stats, kept
from .effects import Effect, EffectBudget, EffectMeter
from .inputs import Case, Feeds, digest, draw, mask_arrays, mask_pieces
from .isolate import OPEN_SECONDS, IsolatedSession
from .matrix import LeftOut, Plan, output_elements, positions
from .pace import Pace
from .report import CaseRecord, ParityReport
from .rule import Rule, Verdict, worst
from .scoring import Score, Sides
from .spool import spool_directory
from .suppliers import Candidate, Outputs, ReferenceCache, SessionSource, Supplier

if TYPE_CHECKING:
    import numpy as np

    from ..artifacts.manifest import ParitySummary
    from ..spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""Called with the stage (``truth``, ``compare``), cases done and cases in all."""

RANDOM = ("the original gives other numbers each time: it draws random numbers, and nothing can be "
          "proven equal to it")
CHANCE = 1e-3
"""Root mean squared difference of two runs on the same inputs, of their size, that no rounding
explains: a thousand times what a GPU's unordered additions make in float32."""

TRUTH_SHARE = 0.6
"""Share of the time for float64 runs made ahead: 2.5 of the 4.5 float32 runs a case costs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to judge.

    Attributes:
        rule: constants.
        gate: ``translation`` (Gate A) for a float32 artifact against its source; ``precision``
            (Gate B) for a cast or quantised one against a reference and truth made from the same
            weights.
        parent: for Gate B, the summary of the float32 artifact it was made from. Without one that
            passed Gate A, Gate B does not pass.
        case_seconds: after this long without a result, a case of the candidate has failed.
        isolated: open and run the candidate in a process of its own, so that one that crashes
            costs its own case. Its source must then be importable: a function of a module, or a
            ``functools.partial`` of one.
    """

    rule: Rule = field(default_factory=Rule)
    gate: Literal["translation", "precision"] = "translation"
    parent: ParitySummary | None = None
    case_seconds: float = 120.0
    isolated: bool = False


def judge(
    candidate: SessionSource,
    reference: SessionSource | None,
    truth: SessionSource | None,
    cases: Plan | Sequence[Case],
    *,
    spec: ModelSpec | None = None,
    settings: Settings | None = None,
    cache: ReferenceCache | None = None,
    on_progress: Progress | None = None,
) -> ParityReport:
    """Compare a candidate with its reference, case by case, and decide.

    Sessions may be given open, or as functions that open them. A truth given as a function is run
    ahead on all cases, its outputs kept on disk (in ``cache``, or for the duration), and closed
    before the others open, so that float64 and float32 weights are never in memory together.

    A case in which the candidate raises or does not return is recorded as failed and the rest goes
    on. A case that the limits of the plan exclude is listed as left out. Without a truth, or
    without a reference, the remaining one is compared with under a fixed allowance
    (:attr:`Rule.bare`) and the report says that there was no noise floor.

    Args:
        candidate: what is judged.
        reference: the unpatched original in eager mode, in the candidate's dtype.
        truth: the same in float64.
        cases: from :func:`~.matrix.plan`, or given cases.
        spec: the source's contract; taken from an open reference or truth if not given. Output
            dtypes are compared with the reference's, or with these where there is none.
        cache: where stored runs of truth and reference are looked up and kept.

    Raises:
        UsageError: neither reference nor truth, or no spec and no open session to take it from.
        SpecError: given cases do not match the spec.
    """
    if reference is None and truth is None:
        raise UsageError("nothing to compare with", allowed="a reference, a truth, or both")
    settings = settings or Settings()
    plan = cases if isinstance(cases, Plan) else Plan(tuple(cases))
    spec = spec or _spec_of(reference, truth)
    with spool_directory() as spool:
        store = cache or ReferenceCache(spool, "", max_bytes=plan.max_disk)
        run = _Run(spec, plan, settings, on_progress)
        # A truth that is opened here is stored even without a cache; see above.
        stored = store if cache or not isinstance(truth, Session) else None
        run.truth = Supplier(truth, "truth", stored) if truth is not None else None
        run.reference = Supplier(reference, "reference", cache) if reference is not None else None
        run.candidate = _candidate(candidate, spec, settings)
        try:
            return run.report()
        finally:
            for side in (run.truth, run.reference, run.candidate):
                if side is not None:
                    side.close()


def measure_effects(
    candidate: SessionSource,
    truth: SessionSource,
    cases: Plan | Sequence[Case],
    *,
    spec: ModelSpec,
    budget: EffectBudget,
    settings: Settings | None = None,
    cache: ReferenceCache | None = None,
) -> tuple[Effect, ...]:
    """Gate C: effects of the candidate against the *original* model, not its cast weights.

    Add them to a report with :meth:`ParityReport.with_effects`.

    Args:
        truth: the original in the highest precision at hand.
        cases: real text where there is a tokenizer: random tokens have no meaning to lose.
        settings: how the candidate is run.

    Raises:
        ModelportError: whatever a run raises; Gate 0 is where failing cases are recorded.
    """
    meter = EffectMeter(spec)
    left = _candidate(candidate, spec, settings or Settings())
    right = Supplier(truth, "truth", cache)
    try:
        for case in cases.cases if isinstance(cases, Plan) else cases:
            feeds = draw(spec, case)
            masks = mask_arrays(spec, feeds)
            pieces = mask_pieces(spec, feeds, masks)
            expected = right.outputs(feeds, digest(feeds))
            actual = left.outputs(feeds, case.label)
            meter.add(actual, expected, {t.name: kept(t, masks, pieces) for t in spec.outputs})
    finally:
        left.close()
        right.close()
    return meter.effects(budget)


def run_ahead(
    reference: SessionSource,
    truth: SessionSource,
    plan: Plan,
    *,
    spec: ModelSpec,
    cache: ReferenceCache,
) -> None:
    """Run both sides in the cases that :func:`judge` has time for, so that it finds them stored.

    Raises:
        Exception: whatever the reference raises.
    """
    run = _Run(spec, plan, Settings(), None)
    run.truth = Supplier(truth, "truth", cache)
    other = Supplier(reference, "reference", cache)
    try:
        for case in run._run_truth(plan.cases):
            feeds = draw(spec, case)
            other.outputs(feeds, digest(feeds))
    finally:
        run.truth.close()
        other.close()


class _Run:
    """State of one validation."""

    truth: Supplier | None
    reference: Supplier | None
    candidate: Candidate

    def __init__(
        self, spec: ModelSpec, plan: Plan, settings: Settings, on_progress: Progress | None
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.settings = settings
        self._progress = on_progress or (lambda stage, done, total: None)
        self._started = perf_counter()
        self._left = list(plan.left_out)
        self._random: bool | None = None  # not known yet
        self._records: list[CaseRecord] = []
        self._score = Score(spec, settings.rule, settings.gate)

    def report(self) -> ParityReport:
        cases = self._run_truth(self.plan.cases)
        if cases:
            self.candidate.prepare()
        pace = self._pace(1.0, fill=self.truth is None or not self.truth.lazy)
        for done, case in enumerate(cases):
            size = positions(self.spec, case)
            if reason := pace.refuse(size, essential=case.essential):
                self._left.append(LeftOut(case.label, reason))
                continue
            started = perf_counter()
            self._compare(case)
            pace.took(size, self._record(case, started), essential=case.essential)
            self._progress("compare", done + 1, len(cases))
        return self._conclude()

    def _run_truth(self, cases: Sequence[Case]) -> list[Case]:
        """Run a truth that is opened here on every admitted case, then close it."""
        if self.truth is None or not self.truth.lazy:
            return list(cases)
        pace = self._pace(TRUTH_SHARE, fill=True)
        keyed = [(case, digest(draw(self.spec, case))) for case in cases]
        # If only cases that nothing rests on are not stored, the model is not opened for them.
        opened = any(c.essential and not self.truth.stored(key) for c, key in keyed)
        admitted: list[Case] = []
        for done, (case, key) in enumerate(keyed):
            if self.truth.stored(key) or self._store_truth(self.truth, case, key, pace, opened):
                admitted.append(case)
            self._progress("truth", done + 1, len(cases))
        self.truth.close()
        return admitted

    def _store_truth(
        self, truth: Supplier, case: Case, key: str, pace: Pace, opened: bool
    ) -> bool:
        """Run and store one case of the truth; False, with the reason on record, if it cannot."""
        size = positions(self.spec, case)
        if not opened:
            reason = "not essential, and no stored run of the truth has it"
        elif not truth.room(output_elements(self.spec, case) * 8):
            reason = "stored outputs have reached their limit on disk"
        else:
            reason = pace.refuse(size, essential=case.essential)
        if reason:
            self._left.append(LeftOut(case.label, reason))
            return False
        truth.session()
        started = perf_counter()
        try:
            truth.outputs(draw(self.spec, case), key)
        except Exception as error:  # noqa: BLE001 - recorded as this case's outcome
            pace.took(size, self._record(case, started), essential=case.essential)
            self._score.fail(case.label, "hygiene", f"the truth itself fails: {_what(error)}")
            return False
        pace.took(size, perf_counter() - started, essential=case.essential)
        return True

    def _compare(self, case: Case) -> None:
        feeds = draw(self.spec, case)
        if problem := hygiene.feeds_problem(feeds):
            self._score.fail(case.label, "hygiene", problem)
            return
        key = digest(feeds)
        found: dict[str, Outputs | None] = {"truth": None, "reference": None}
        for side in (self.truth, self.reference):
            if side is None:
                continue
            try:
                found[side.role] = side.outputs(feeds, key)
            except Exception as error:  # noqa: BLE001 - recorded as this case's outcome
                reason = f"the {side.role} itself fails: {_what(error)}"
                self._score.fail(case.label, "hygiene", reason)
                return
        reference, truth = found["reference"], found["truth"]
        # Chance would pass for the noise that every artifact is allowed. Reduced precision is as
        # far from the truth by itself; its parent, of the same original, went through here.
        if (self.settings.gate == "translation" and self._random is None and reference and truth
                and _apart(reference, truth)):
            self._check(feeds)
        if self._random:
            self._score.fail(case.label, "hygiene", RANDOM)
            return
        try:
            actual = self.candidate.outputs(feeds, case.label)
        except Exception as error:  # noqa: BLE001 - recorded as this case's outcome
            self._score.fail(case.label, "hygiene", _what(error))
            return
        self._score.add(case, feeds, Sides(actual, reference, truth))

    def _conclude(self) -> ParityReport:
        results = self._score.results()
        gate = self.settings.gate
        comparisons = sum(r.samples for r in results)
        hygienic = worst([r.verdict for r in results if r.gate == "hygiene"] or ["pass"])
        gates: dict[str, Verdict] = {
            "hygiene": hygienic if comparisons else "fail",
            gate: worst(r.verdict for r in results if r.gate == gate and r.samples),
        }
        notes = []
        noise_floor = self.truth is not None and self.reference is not None
        if not noise_floor:
            notes.append("no noise floor: the error was held against a fixed allowance of "
                         f"{self.settings.rule.bare:g} roundoffs")
        if not comparisons:
            notes.append("nothing was compared")
        if absent := self._never_run():
            notes.append(f"coverage is incomplete: no case ran with {', '.join(absent)}")
        if gate == "precision":
            gates["translation"] = _inherited(self.settings.parent)
            if gates["translation"] != "pass":
                notes.append("the float32 artifact this one was made from has not passed")
        unproven = gate == "translation" and worst(gates.values()) != "pass"
        if unproven and self._random is None and self.plan.cases:
            self._check(draw(self.spec, self.plan.cases[0]))
        if self._random:
            notes.append(RANDOM)
        sides = {"candidate": self.candidate.described} | {
            side.role: side.described for side in (self.reference, self.truth) if side is not None}
        return ParityReport(
            worst(gates.values()), gates, self.settings.rule, noise_floor, comparisons,
            tuple(self._records), results, tuple(self._left), tuple(notes), sides,
            perf_counter() - self._started)

    def _check(self, feeds: Feeds) -> None:
        """Find out whether the original differs from itself by more than any rounding."""
        side = self.reference or self.truth
        assert side is not None
        self._random = False
        with suppress(Exception):  # that it fails is on record already
            first, second = (side.session().run(feeds) for _ in range(2))
            self._random = _apart(first, second)

    def _never_run(self) -> list[str]:
        """Planned sizes that no case was run with, as ``sequence=512``."""
        ran = {size for record in self._records for size in record.shape.split()}
        planned = [size for case in self.plan.cases for size in case.shape.split()]
        planned += [size for left in self._left for size in left.case.split() if "=" in size]
        return [size for size in dict.fromkeys(planned) if size not in ran]

    def _record(self, case: Case, started: float) -> float:
        seconds = perf_counter() - started
        self._records.append(CaseRecord(case.label, case.shape, case.padding, case.seed,
                                        case.origin, seconds))
        return seconds

    def _pace(self, share: float, *, fill: bool) -> Pace:
        return Pace(self.plan.max_seconds, share=share, started=self._started, fill=fill)


def _candidate(source: SessionSource, spec: ModelSpec, settings: Settings) -> Candidate:
    """The candidate, in this process or in its own."""
    if not settings.isolated:
        return Candidate(source, settings.case_seconds)
    if isinstance(source, Session):
        raise UsageError("an open session cannot move to a process of its own",
                         allowed="a function that opens one")
    opener = source
    # The child is ended in time; a thread that waits for it is never given up on.
    return Candidate(lambda: IsolatedSession(spec, opener, settings.case_seconds),
                     2 * (settings.case_seconds + OPEN_SECONDS))


def _apart(one: Outputs, other: Outputs) -> bool:
    """Whether two runs differ by more than any order of additions could make them."""
    def differ(value: np.ndarray, second: np.ndarray) -> bool:
        if value.shape != second.shape:
            return True
        found = error_stats(value, second)
        return found.rmse > CHANCE * found.scale

    return any(name in other and differ(value, other[name]) for name, value in one.items())


def _inherited(parent: ParitySummary | None) -> Verdict:
    """Gate A's verdict on the parent; ``fail`` where it is not known to have passed."""
    if parent is None or parent.verdict != "pass" or parent.gates.get("translation") != "pass":
        return "fail"
    return "pass"


def _spec_of(*sources: SessionSource | None) -> ModelSpec:
    for source in sources:
        if isinstance(source, Session):
            return source.spec
    raise UsageError("no spec was given and no open session has one", allowed="judge(..., spec=)")


def _what(error: Exception) -> str:
    """One line; our own errors are sentences, others need their type."""
    if isinstance(error, ModelportError):
        return "; ".join(str(error).splitlines())
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
