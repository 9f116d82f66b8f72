"""What a validation found, as frozen records; JSON is the record, everything else a view of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from ..artifacts.manifest import ParitySummary
from ..errors import UsageError
from .effects import Effect, EffectBudget
from .matrix import LeftOut
from .rule import Gate, Rule, Verdict, worst

if TYPE_CHECKING:
    from pydantic import TypeAdapter

HISTOGRAM_LOW, HISTOGRAM_STEP, HISTOGRAM_BINS = -12.0, 0.5, 26
"""Bins of ``log10(|c - t| / RMS(t))``: from 1e-12 to 10 in half decades, ends open."""

ANY = "*"
"""Stands for an output's name where a whole case failed."""


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """A case that was run: its unique label, sizes as text, padding, seed, origin, seconds."""

    label: str
    shape: str
    padding: str
    seed: int
    origin: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """One output in one case, by its worst sample.

    Attributes:
        case: label of the :class:`CaseRecord`.
        output: name, or ``*`` where the whole case failed.
        gate: the gate that decided.
        reason: what was found and what was allowed, unless it passed.
        samples: comparisons made (one for each row of the batch that has kept positions).
        elements: positions compared.
        rho, excess: of the worst sample, see :class:`~.rule.Decision`.
        sample: its index in the batch.
        rmse, noise, scale, largest: its error, the reference's error, RMS of the truth, maximum
            norm of the error, in the output's own unit; None where not computed or not finite.
        histogram: counts of ``log10(|c - t| / RMS(t))``, see :data:`HISTOGRAM_LOW`, over at most
            65536 evenly spaced elements.
    """

    case: str
    output: str
    gate: Gate
    verdict: Verdict
    reason: str = ""
    samples: int = 0
    elements: int = 0
    rho: float | None = None
    excess: float | None = None
    sample: int | None = None
    rmse: float | None = None
    noise: float | None = None
    scale: float | None = None
    largest: float | None = None
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The outcome of one validation.

    ``suspect`` is not accepted: the error is larger than rounding explains, though small enough
    that it may be harmless; find the cause (``--bisect``) before publishing. A command exits with
    3 unless :attr:`accepted`.

    Attributes:
        verdict: gravest over all gates.
        gates: verdict of each gate that ran.
        noise_floor: whether truth and reference both took part; without it Gate A had a fixed
            allowance only.
        comparisons: output × sample comparisons made.
        left_out: planned cases that were not run, with the reason.
        notes: what a reader must know besides the numbers.
        effects, budget: Gate C, where it was measured.
        sides: runtime and device by ``candidate``, ``reference``, ``truth``.
        seconds: wall time of the validation.
        narrowed: a limit that was asked for left out cases that coverage rests on. Such a pass
            proves too little to be published.
    """

    verdict: Verdict
    gates: Mapping[str, Verdict]
    rule: Rule
    noise_floor: bool
    comparisons: int
    cases: tuple[CaseRecord, ...]
    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    sides: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    effects: tuple[Effect, ...] = ()
    budget: EffectBudget | None = None
    narrowed: bool = False
    schema: Literal[1] = 1

    @property
    def accepted(self) -> bool:
        """True for ``pass`` only."""
        return self.verdict == "pass"

    @property
    def worst_rho(self) -> float | None:
        """Largest ρ over all comparisons; None where none has one."""
        return max((r.rho for r in self.results if r.rho is not None), default=None)

    @property
    def failures(self) -> tuple[Result, ...]:
        """Every result that is not a pass."""
        return tuple(r for r in self.results if r.verdict != "pass")

    @property
    def unmet(self) -> tuple[str, ...]:
        """Why Gate C does not pass: each broken limit, or that nothing was measured."""
        if self.gates.get("effect", "pass") == "pass":
            return ()
        broken = tuple(f"{e.output}: {text}" for e in self.effects for text in e.broken)
        return broken or ("no effects were measured",)

    def summary(self, identity: str) -> ParitySummary:
        """The manifest's record of this report, for the artifact of that identity."""
        return ParitySummary(self.verdict, identity, dict(self.gates), self.worst_rho,
                             self.comparisons, len(self.left_out))

    def with_effects(self, effects: tuple[Effect, ...], budget: EffectBudget) -> ParityReport:
        """This report with Gate C added: it fails where a limit is broken or nothing was measured.

        A budget can only reject; it never mends a verdict of the other gates.
        """
        kept = effects and not any(e.broken for e in effects)
        gates: dict[str, Verdict] = {**self.gates, "effect": "pass" if kept else "fail"}
        return replace(self, gates=gates, verdict=worst(gates.values()), effects=effects,
                       budget=budget)

    def cut_short(self, absent: int) -> ParityReport:
        """This report where given limits kept so many cases that coverage rests on from running."""
        if not absent:
            return self
        note = (f"narrowed by the limits that were given: {absent} cases that coverage rests on "
                "did not run, and a pass without them is not published")
        return replace(self, narrowed=True, notes=(*self.notes, note))

    def with_results(
        self, gate: Gate, cases: tuple[CaseRecord, ...], results: tuple[Result, ...],
        notes: tuple[str, ...] = (), seconds: float = 0.0,
    ) -> ParityReport:
        """This report with the results of one gate more; none of them is a failure, too."""
        gates: dict[str, Verdict] = {**self.gates, gate: worst(r.verdict for r in results)}
        return replace(
            self, gates=gates, verdict=worst(gates.values()), cases=(*self.cases, *cases),
            results=(*self.results, *results), notes=(*self.notes, *notes),
            comparisons=self.comparisons + sum(r.samples for r in results),
            seconds=self.seconds + seconds)

    def to_json(self) -> str:
        """The whole report as JSON text."""
        return _adapter().dump_json(self, indent=1).decode()


def joined(reports: Mapping[str, ParityReport]) -> ParityReport:
    """One report on the parts of a whole, which is as good as its worst part.

    Cases and what was left out say which part they are of: ``part=decoder batch=3 …``.
    """
    parts = list(reports.values())
    gates: dict[str, Verdict] = {
        gate: worst(report.gates[gate] for report in parts if gate in report.gates)
        for gate in dict.fromkeys(gate for report in parts for gate in report.gates)
    }

    def of(name: str, text: str) -> str:
        return f"part={name} {text}"

    return ParityReport(
        verdict=worst(report.verdict for report in parts),
        gates=gates,
        rule=parts[0].rule,
        noise_floor=all(report.noise_floor for report in parts),
        comparisons=sum(report.comparisons for report in parts),
        cases=tuple(replace(case, label=of(name, case.label), shape=of(name, case.shape))
                    for name, report in reports.items() for case in report.cases),
        results=tuple(replace(result, case=result.case if result.case == ANY
                              else of(name, result.case))
                      for name, report in reports.items() for result in report.results),
        left_out=tuple(LeftOut(of(name, left.case), left.reason)
                       for name, report in reports.items() for left in report.left_out),
        notes=tuple(f"{name}: {note}" for name, report in reports.items()
                    for note in report.notes),
        sides={f"{name} {side}": text for name, report in reports.items()
               for side, text in report.sides.items()},
        seconds=sum(report.seconds for report in parts),
        effects=tuple(replace(effect, output=f"{name} {effect.output}")
                      for name, report in reports.items() for effect in report.effects),
        budget=next((report.budget for report in parts if report.budget), None),
        narrowed=any(report.narrowed for report in parts),
    )


def from_json(text: str | bytes) -> ParityReport:
    """Read :meth:`ParityReport.to_json` back.

    Raises:
        UsageError: not JSON, or not a report of this schema.
    """
    from pydantic import ValidationError

    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"not a parity report: {where}: {first['msg']}",
                         allowed="JSON written by modelport validate --json") from error


@cache
def _adapter() -> TypeAdapter[ParityReport]:
    from pydantic import TypeAdapter

    return TypeAdapter(ParityReport)
