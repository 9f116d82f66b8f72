"""The report of a run as frozen records; :mod:`.summary` computes it, :mod:`.views` shows it.

A :class:`RunReport` holds the raw samples too; everything else in it is computed from them.
"""

from __future__ import annotations

# What the records name must exist at run time: pydantic reads their annotations.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import IncompleteError
from . import statistics as st
from .ceilings import Ceilings, Share
from .environment import Environment
from .records import Cell, CellResult, ColdStart, Load, Status

REPORT = "benchmark.json"
SOURCE = "source"
"""Parity of the model itself, computed as it was published."""
Objective = Literal["lowest p50", "highest throughput", "smallest", "p95 within limit"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resident bytes, the largest over the processes.

    Attributes:
        gpu: of the process on the GPU, as the driver says, or else the framework.
        gpu_allocated, gpu_reserved: peaks as the framework says.
    """

    peak: int
    weights: int
    activations: int
    gpu: int | None = None
    gpu_allocated: int | None = None
    gpu_reserved: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration, over all its processes.

    Attributes:
        cell: the configuration (round 0).
        runtime: what ran it, as the session says.
        p50: seconds per call; with a corpus, per sentence: the time of the batch it was in.
        tails: p90, p95 and p99 of the pooled samples.
        throughput: rows (sentences) per second.
        tokens: real tokens per second; None where the model takes none.
        pace: seconds per row; what cells are compared by with a corpus.
        with_text: sentences per second, tokenisation included; None without a text.
        comparison: with the reference subject at the same shape, device and threads.
        pareto: on the front of p50, throughput and peak memory within its workload.
        placed: share of the graph's nodes on the device; None where the runtime has no nodes.
        cut: tokens left of the corpus where the contract cuts sentences that others take whole;
            0 where it does not.
        detail: why there are no numbers.
    """

    cell: Cell
    status: Status
    verdict: st.Verdict
    processes: int
    runtime: str = ""
    parity: str = ""
    p50: st.Interval | None = None
    iqr: float | None = None
    tails: tuple[st.Percentile, ...] = ()
    outliers: st.Outliers | None = None
    throughput: st.Interval | None = None
    tokens: float | None = None
    pace: st.Interval | None = None
    padding: float | None = None
    with_text: float | None = None
    device_p50: float | None = None
    transfer_p50: float | None = None
    memory: Footprint | None = None
    cold: ColdStart | None = None
    share: Share | None = None
    comparison: st.Comparison | None = None
    pareto: bool = False
    placed: float | None = None
    detail: str = ""
    cut: int = 0

    @property
    def workload(self) -> str:
        """Rows of one workload may be weighed against each other."""
        if self.cell.batching:
            return f"corpus, cut to {self.cut:,} tokens" if self.cut else "corpus"
        return f"sequence {self.cell.sequence}" if self.cell.sequence else "by batch size"

    @property
    def label(self) -> str:
        cell = self.cell
        name = self.runtime or cell.runtime or "auto"
        threads = f" × {cell.threads}" if cell.device == "cpu" else ""
        return f"{cell.subject} · {name} · {cell.device}{threads} · {cell.work()}"

    def percentile(self, q: float) -> st.Percentile | None:
        return next((p for p in self.tails if p.q == q), None)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One scenario of the load generator.

    Attributes:
        load: what it says; None where it did not run, and ``detail`` says why.
    """

    cell: Cell
    status: Status
    runtime: str
    parity: str
    load: Load | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The row that serves an objective best, and how sure that is.

    Attributes:
        margin: relative half-width of the figure it was chosen by.
        ties: labels of rows that the data cannot tell from it.
        row: label of the row; "" where none qualifies, and ``note`` says why.
    """

    workload: str
    objective: Objective
    row: str
    value: float | None = None
    unit: str = ""
    margin: float | None = None
    ties: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class RunReport:
    """Everything a run found.

    Attributes:
        reference: the subject that comparisons are made with.
        floors: noise floor by ``device/threads``, from A/A pairs; absent where none was run.
        results: raw, one per process.
        tokenise_seconds: of the whole corpus, one figure per repetition.
        notes: what else a reader must know, such as why operations were not counted.
    """

    environment: Environment
    reference: str
    rounds: int
    rows: tuple[Row, ...]
    recommendations: tuple[Recommendation, ...]
    floors: Mapping[str, float]
    ceilings: tuple[Ceilings, ...]
    results: tuple[CellResult, ...]
    corpus: str = ""
    tokenise_seconds: tuple[float, ...] = ()
    p95_limit: float | None = None
    loads: tuple[Loaded, ...] = ()
    notes: tuple[str, ...] = ()
    schema: Literal[1] = 1

    def verdicts(self, identity: str) -> dict[str, st.Verdict]:
        """Of every configuration that measured this artifact, by its label; what is absent here
        measured nothing."""
        return {row.label: row.verdict for row in self.rows
                if row.cell.identity == identity and row.status != "absent"}

    @property
    def invalid(self) -> dict[str, str]:
        """What ran and must not be believed, by its label, and why: the wrong device, say."""
        return {row.label: "; ".join(row.verdict.reasons) for row in self.rows
                if row.status == "ok" and row.verdict.word == "invalid"}

    @property
    def failed(self) -> tuple[CellResult, ...]:
        return tuple(r for r in self.results if r.status == "failed")

    def require_complete(self) -> None:
        """Raise for the exit code when cells failed; absent backends are no failure.

        Raises:
            IncompleteError: names the cells and their causes.
        """
        if not self.failed:
            return
        causes = sorted({": ".join(filter(None, (r.cell.label(), r.cause, r.detail[:200])))
                         for r in self.failed})
        raise IncompleteError(
            f"{len(self.failed)} of {len(self.results)} measurements failed: " + some(causes),
            hint="run the same command again: it measures only what is missing")

    def require_valid(self) -> None:
        """Raise for the exit code when something ran that must not be believed.

        Raises:
            IncompleteError: names the lines, and why.
        """
        refuse_invalid(self.invalid, len(self.rows))


def refuse_invalid(invalid: Mapping[str, str], lines: int) -> None:
    """Raise where lines of a report, by their labels with the reasons, are invalid.

    Raises:
        IncompleteError: names them, and why.
    """
    if found := [f"{label}: {why}" for label, why in invalid.items()]:
        raise IncompleteError(f"{len(found)} of {lines} lines are invalid: " + some(found),
                              hint="once that is mended, run the same command again")


def some(causes: Sequence[str]) -> str:
    """The first of several causes, and how many more there are."""
    more = f" and {len(causes) - 5} more" if len(causes) > 5 else ""
    return "; ".join(causes[:5]) + more
