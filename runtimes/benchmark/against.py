"""Two runs side by side: what became slower, where the data support saying so."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import GateRefused
from . import statistics as st
from .generation import GenerationReport, whole_calls
from .report import SOURCE
from .summary import paces

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from .reading import Report
    from .records import Cell, CellResult


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
    new: Report, old: Report, *, max_regression: float = 0.05, seed: int = 0, identity: str = ""
) -> RunComparison:
    """Match what was measured by what the user named; artifacts may differ, that is the point.

    Cells match by subject, runtime, device, dtype, threads, options, shape and corpus; what
    generates by name and shape, and is compared by the whole call. Rounds of different runs are
    not paired. The floor is that of both runs' twins, and what the source itself, the same in
    both, differs by: the machine's drift between the runs is not the artifact's. The source is no
    artifact: it is never a change.

    Args:
        identity: of the one artifact that matters; "": all of the new run.
    """
    recent, earlier = _grouped(new), _grouped(old)
    floor = _floor(new, old, recent, earlier, seed)
    recent, earlier = _artifacts(recent, _source(new)), _artifacts(earlier, _source(old))
    if identity:
        recent = {name: group for name, group in recent.items() if group.identity == identity}
    changes, repeated = [], []
    for name in recent.keys() & earlier.keys():
        if _samples(recent[name]) == _samples(earlier[name]):
            repeated.append(recent[name].label)
        else:
            changes.append(_change(recent[name], earlier[name], floor, max_regression, seed))
    changes.sort(key=lambda c: c.label)
    return RunComparison(
        tuple(changes), max_regression, new.environment.digest == old.environment.digest,
        tuple(sorted(recent[n].label for n in recent.keys() - earlier.keys())),
        tuple(sorted(earlier[n].label for n in earlier.keys() - recent.keys())),
        tuple(sorted(repeated)))


@dataclass(frozen=True, slots=True)
class _Group:
    """One configuration: its label, digest of what was measured, and seconds by round."""

    label: str
    identity: str
    rounds: Mapping[int, NDArray[np.float64]]


def _grouped(report: Report) -> dict[Hashable, _Group]:
    if isinstance(report, GenerationReport):
        return {(line.contestant, line.shape): _Group(
                    line.label, report.identities.get(line.contestant, ""),
                    whole_calls(line.contestant, line.shape, report.processes))
                for line in report.lines
                if line.verdict is not None and line.verdict.word != "invalid"}
    usable = {_name(row.cell) for row in report.rows if row.verdict.word != "invalid"}
    groups: dict[Hashable, list[CellResult]] = defaultdict(list)
    for result in report.results:
        name = _name(result.cell)
        if result.status == "ok" and not result.cell.twin and name in usable:
            found = result.corpus
            corpus = (found.sentences, found.tokens) if found else None
            groups[*name, corpus].append(result)
    return {name: _Group(mine[0].cell.label(), mine[0].cell.identity, paces(mine))
            for name, mine in groups.items()}


def _artifacts(
    groups: Mapping[Hashable, _Group], source: str | None
) -> dict[Hashable, _Group]:
    return {name: group for name, group in groups.items()
            if source is None or group.identity != source}


def _source(report: Report) -> str | None:
    """Digest of the source that artifacts were measured beside; None where it was not."""
    if isinstance(report, GenerationReport):
        return report.identities.get(report.baseline) if report.baseline else None
    return next((row.cell.identity for row in report.rows if row.parity == SOURCE), None)


def _name(cell: Cell) -> tuple[Hashable, ...]:
    return (*cell.column, *cell.shape)


def _floor(
    new: Report, old: Report, recent: Mapping[Hashable, _Group],
    earlier: Mapping[Hashable, _Group], seed: int,
) -> float:
    source = _source(new)
    same = [name for name in recent.keys() & earlier.keys()
            if source is not None and source == _source(old) and recent[name].identity == source]
    drift = st.noise_floor([
        st.ratio(recent[name].rounds, _apart(earlier[name].rounds), seed=seed) for name in same])
    twins = [floor for report in (new, old) if not isinstance(report, GenerationReport)
             for floor in report.floors.values()]
    return max([drift, *twins])


def _samples(group: _Group) -> set[tuple[float, ...]]:
    return {tuple(samples) for samples in group.rounds.values()}


def _apart(rounds: Mapping[int, NDArray[np.float64]]) -> dict[int, NDArray[np.float64]]:
    """Other round numbers: rounds of two runs share no drift, so they must not be paired."""
    return {-1 - number: samples for number, samples in rounds.items()}


def _change(new: _Group, old: _Group, floor: float, limit: float, seed: int) -> Change:
    found = st.compare(new.rounds, _apart(old.rounds), floor=floor, seed=seed)
    past = (found.word == "slower" and found.ratio is not None
            and found.ratio.low > 1 + limit)
    return Change(new.label, found, past)


def _some(labels: tuple[str, ...]) -> str:
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return ", ".join(labels[:3]) + more or "nothing"
