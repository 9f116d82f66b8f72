"""Two runs side by side: what became slower, where the data support saying so."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import GateRefused
from . import statistics as st
from .summary import paces

if TYPE_CHECKING:
    from .records import Cell, CellResult
    from .report import RunReport


@dataclass(frozen=True, slots=True)
class Change:
    """One configuration in both runs.

    Attributes:
        comparison: new over old time; ``slower`` only with 5 processes on each side, an interval
            that excludes 1 and an effect above the noise floor of both runs.
        past_limit: the whole interval lies beyond the allowed regression.
    """

    label: str
    comparison: st.Comparison
    past_limit: bool


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Attributes:
        same_machine: the environments are equal; if not, differences may be the machine's.
        only_new, only_old: labels without a counterpart.
        repeated: labels whose samples are those of the older run, read from disk again.
    """

    changes: tuple[Change, ...]
    limit: float
    same_machine: bool
    only_new: tuple[str, ...] = ()
    only_old: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(c for c in self.changes if c.comparison.word == "slower")

    @property
    def past_limit(self) -> tuple[Change, ...]:
        """What a command should fail for."""
        return tuple(c for c in self.changes if c.past_limit)

    def require_counterparts(self, against: object) -> None:
        """Raise where nothing could be compared: a gate that saw nothing has not been passed.

        Raises:
            GateRefused: says what each side measured.
        """
        if self.changes:
            return
        if self.repeated:
            raise GateRefused(f"every measurement is the one that {against} already holds",
                              hint="measure anew: another --output")
        machine = "" if self.same_machine else " (another machine)"
        raise GateRefused(
            f"no measurement has a counterpart in {against}{machine}; "
            f"now: {_some(self.only_new)}; then: {_some(self.only_old)}",
            allowed="the same artifact's name, runtime, device, threads, shapes and corpus")


def compare_runs(
    new: RunReport, old: RunReport, *, max_regression: float = 0.05, seed: int = 0
) -> RunComparison:
    """Match configurations by subject, runtime, device, dtype, threads, options, shape and corpus.

    Artifacts may differ (that is the point); what the user named must be equal. Rounds of
    different runs are not paired.
    """
    recent, earlier = _grouped(new), _grouped(old)
    changes, repeated = [], []
    floor = max([0.0, *new.floors.values(), *old.floors.values()])
    for name in recent.keys() & earlier.keys():
        if _samples(recent[name]) == _samples(earlier[name]):
            repeated.append(recent[name][0].cell.label())
        else:
            changes.append(_change(recent[name], earlier[name], floor, max_regression, seed))
    changes.sort(key=lambda c: c.label)
    return RunComparison(
        tuple(changes), max_regression, new.environment.digest == old.environment.digest,
        tuple(sorted(recent[n][0].cell.label() for n in recent.keys() - earlier.keys())),
        tuple(sorted(earlier[n][0].cell.label() for n in earlier.keys() - recent.keys())),
        tuple(sorted(repeated)))


def _samples(results: list[CellResult]) -> set[tuple[float, ...]]:
    return {result.samples for result in results}


def _some(labels: tuple[str, ...]) -> str:
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return ", ".join(labels[:3]) + more or "nothing"


def _grouped(report: RunReport) -> dict[tuple[Any, ...], list[CellResult]]:
    usable = {_name(row.cell) for row in report.rows if row.verdict.word != "invalid"}
    groups: dict[tuple[Any, ...], list[CellResult]] = defaultdict(list)
    for result in report.results:
        name = _name(result.cell)
        if result.status == "ok" and not result.cell.twin and name in usable:
            found = result.corpus
            corpus = (found.sentences, found.tokens) if found else None
            groups[*name, corpus].append(result)
    return groups


def _name(cell: Cell) -> tuple[Any, ...]:
    return (*cell.column, *cell.shape)


def _change(
    new: list[CellResult], old: list[CellResult], floor: float, limit: float, seed: int
) -> Change:
    # Other round numbers: rounds of two runs share no drift, so they must not be paired.
    apart = {-1 - number: samples for number, samples in paces(old).items()}
    found = st.compare(paces(new), apart, floor=floor, seed=seed)
    past = (found.word == "slower" and found.ratio is not None
            and found.ratio.low > 1 + limit)
    return Change(new[0].cell.label(), found, past)
