"""From raw results to an answer: rows, comparisons, the Pareto front, recommendations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from . import statistics as st
from .ceilings import Ceilings, Share, Work, share
from .cell import placed
from .corpus import sentence_latencies
from .environment import throttles
from .recommend import Choice, recommend
from .records import Cell, CellResult, ColdStart, write_json
from .report import REPORT, Footprint, Loaded, Recommendation, Row, RunReport
from .sweep import Progress, SweepOutcome, SweepRequest, sweep

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

PERCENTILES = (0.90, 0.95, 0.99)


def run_sweep(request: SweepRequest, progress: Progress | None = None) -> RunReport:
    """Measure what is missing, write ``benchmark.json`` and return the report.

    Failed cells do not raise here: :meth:`RunReport.require_complete` does.
    """
    report = summarise(request, sweep(request, progress))
    write_json(request.output / REPORT, asdict(report))
    return report


def summarise(request: SweepRequest, outcome: SweepOutcome) -> RunReport:
    """Compute the report of a sweep."""
    groups: dict[str, list[CellResult]] = defaultdict(list)
    for result in outcome.results:
        if result.cell.traffic is None:
            groups[config_key(result.cell)].append(result)
    tokenise = request.corpus.tokenise_seconds if request.corpus else ()
    parity = {s.name: s.parity for s in request.subjects}
    measured = [
        _row(group, parity.get(group[0].cell.subject, ""), outcome.ceilings, request, tokenise)
        for group in groups.values()
    ]
    measured = _with_cuts(measured, groups)
    floors = _floors(measured, groups, request.seed)
    rows = [_compared(row, measured, groups, floors, request)
            for row in measured if not row.cell.twin]
    rows = _with_front(sorted(rows, key=_order))
    return RunReport(
        outcome.environment, request.reference, request.rounds, tuple(rows),
        tuple(_recommend(rows, groups, floors, request)), floors, outcome.ceilings,
        outcome.results, outcome.corpus, tokenise, request.p95_limit,
        tuple(_loaded(r, parity) for r in outcome.results if r.cell.traffic),
        tuple(_uncounted(rows, request)))


def config_key(cell: Cell) -> str:
    """Key of a configuration, whatever its round."""
    return cell.config.key("")


def _loaded(result: CellResult, parity: Mapping[str, str]) -> Loaded:
    found = result.load
    detail = "" if found else f"{result.cause}: {result.detail}"
    return Loaded(result.cell, result.status, result.runtime,
                  parity.get(result.cell.subject, ""), found, detail)


def _order(row: Row) -> tuple[object, ...]:
    cell = row.cell
    return (cell.batching or "", cell.sequence, cell.batch, cell.budget, cell.device,
            cell.threads, cell.subject)


def latencies(results: Iterable[CellResult]) -> dict[int, NDArray[np.float64]]:
    """Seconds by round: per call, or per sentence with a corpus."""
    return {
        r.cell.round: sentence_latencies(r) if r.corpus else np.asarray(r.samples)
        for r in results if r.status == "ok" and r.samples
    }


def paces(results: Iterable[CellResult]) -> dict[int, NDArray[np.float64]]:
    """Seconds per row by round: every call, or with a corpus the one figure of the pass."""
    return {
        r.cell.round: (np.array([sum(r.samples) / r.corpus.sentences]) if r.corpus
                       else np.asarray(r.samples) / r.cell.batch)
        for r in results if r.status == "ok" and r.samples
    }


def _row(
    group: Sequence[CellResult], parity: str, ceilings: Sequence[Ceilings],
    request: SweepRequest, tokenise: Sequence[float],
) -> Row:
    good = [r for r in group if r.status == "ok" and r.samples]
    cell = replace((good or group)[0].cell, round=0)
    if not good:
        last = group[-1]
        return Row(cell, last.status, st.Verdict("invalid", (last.detail or last.cause,)), 0,
                   last.runtime, parity, detail=f"{last.cause}: {last.detail}")
    times, pace = latencies(good), paces(good)
    pooled = np.concatenate(list(times.values()))
    timings = sum(len(r.samples) for r in good)
    p50 = st.centre(list(times.values()), seed=request.seed)
    per_row = st.centre(list(pace.values()), seed=request.seed)
    corpus = good[0].corpus
    work = _work(cell, request)
    real = corpus.tokens / corpus.sentences if corpus else float(cell.sequence)
    extra = float(np.median(tokenise)) / corpus.sentences if corpus and tokenise else None
    return Row(
        cell, "ok", _verdict(good, len(group)), len(good), good[0].runtime, parity,
        p50, st.iqr(pooled),
        tuple(st.percentile(pooled, q, timings=timings) for q in PERCENTILES),
        st.outliers(pooled),
        _inverse(per_row), real / per_row.value if real else None, per_row,
        corpus.padding if corpus else None,
        1 / (per_row.value + extra) if extra is not None else None,
        _median(r.device_samples for r in good),
        _median(r.transfer_samples for r in good),
        _footprint(good), _cold(good),
        None if isinstance(work, str) else _share(work, p50.value, cell, ceilings),
        placed=_placed(good),
        detail="" if len(good) == len(group) else f"{len(group) - len(good)} rounds failed")


def _placed(results: Sequence[CellResult]) -> float | None:
    found = [r.placement for r in results if r.placement]
    shares = [placed(p["nodes"], p.get("fallback", {})) for p in found]
    return min((s for s in shares if s is not None), default=None)


def _inverse(interval: st.Interval) -> st.Interval:
    return replace(interval, low=1 / interval.high, value=1 / interval.value,
                   high=1 / interval.low)


def _median(groups: Iterable[Sequence[float]]) -> float | None:
    medians = [float(np.median(g)) for g in groups if g]
    return float(np.median(medians)) if medians else None


def _footprint(results: Sequence[CellResult]) -> Footprint | None:
    found = [r.memory for r in results if r.memory]
    if not found:
        return None
    def most(values: Iterable[int | None]) -> int | None:
        return max((v for v in values if v is not None), default=None)

    return Footprint(max(m.peak for m in found), max(m.weights for m in found),
                     max(m.activations for m in found),
                     most(m.gpu_process or m.gpu_reserved for m in found),
                     most(m.gpu_allocated for m in found), most(m.gpu_reserved for m in found))


def _cold(results: Sequence[CellResult]) -> ColdStart | None:
    found = [r.cold for r in results if r.cold]
    if not found:
        return None
    return ColdStart(*(float(np.median([getattr(c, name) for c in found]))
                       for name in ("imports", "open", "first", "second")))


def _work(cell: Cell, request: SweepRequest) -> Work | str:
    """What one call computes and moves, or why that is unknown; "" where nobody asked."""
    return request.work(cell) if request.work and not cell.batching else ""


def _uncounted(rows: Iterable[Row], request: SweepRequest) -> Iterator[str]:
    """Why lines have no share of the ceiling, each reason once."""
    counted = ((row.cell.subject, _work(row.cell, request)) for row in rows if row.status == "ok")
    reasons = dict.fromkeys(found for found in counted if isinstance(found[1], str) and found[1])
    for subject, why in reasons:
        yield f"operations of {subject} were not counted: {why}"


def _share(work: Work, seconds: float, cell: Cell, ceilings: Sequence[Ceilings]) -> Share:
    match = (c for c in ceilings if c.device == cell.device and c.threads == cell.threads)
    return share(work, seconds, cell.dtype, next(match, None))


def _verdict(results: Sequence[CellResult], wanted: int) -> st.Verdict:
    invalid = sorted({fault for r in results for fault in r.faults})
    unstable = []
    if len(results) < wanted:
        unstable.append(f"{wanted - len(results)} of {wanted} processes failed")
    known = [r.conditions for r in results if r.conditions]
    others = [(c.foreign or 0.0) + (c.stolen or 0.0) for c in known]
    if throttled := throttles(reading for c in known for reading in c.gpu):
        unstable.append(throttled)
    by_round = paces(results) if results[0].corpus else latencies(results)
    step = max((c.clock_step / r.inner for r in results if (c := r.conditions)), default=0.0)
    return st.verdict(list(by_round.values()), timer=step, foreign=max(others, default=0.0),
                      invalid=invalid, unstable=unstable)


def _floors(
    rows: Sequence[Row], groups: Mapping[str, Sequence[CellResult]], seed: int
) -> dict[str, float]:
    ratios: dict[str, list[st.Interval]] = defaultdict(list)
    for row in rows:
        if not row.cell.twin or row.status != "ok":
            continue
        other = paces(groups.get(config_key(replace(row.cell, twin=False)), ()))
        own = paces(groups[config_key(row.cell)])
        if min(len(own), len(other)) >= 2:
            ratios[_place(row.cell)].append(st.ratio(own, other, seed=seed))
    return {place: st.noise_floor(found) for place, found in ratios.items()}


def _place(cell: Cell) -> str:
    return f"{cell.device}/{cell.threads}"


def _compared(
    row: Row, rows: Sequence[Row], groups: Mapping[str, Sequence[CellResult]],
    floors: Mapping[str, float], request: SweepRequest,
) -> Row:
    """The row with its comparison to the reference at the same shape."""
    cell = row.cell
    if cell.subject == request.reference or row.status != "ok":
        return row
    base = next(
        (r for r in rows if r.cell.subject == request.reference and not r.cell.twin
         and r.cell.shape == cell.shape and _place(r.cell) == _place(cell)), None)
    if base is None or base.status != "ok":
        return row
    if row.cut != base.cut:
        whose = cell.subject if row.cut else request.reference
        found = st.Comparison(None, "not compared", 0.0,
                              f"{whose} takes shorter sentences, and computed less")
    elif "invalid" in (row.verdict.word, base.verdict.word):
        found = st.Comparison(None, "not compared", 0.0, "a measurement is invalid")
    elif _place(cell) not in floors:
        found = st.Comparison(None, "not compared", 0.0, "there is no A/A pair for a noise floor")
    else:
        found = st.compare(paces(groups[config_key(cell)]), paces(groups[config_key(base.cell)]),
                           floor=floors[_place(cell)], seed=request.seed)
    return replace(row, comparison=found)


def _with_cuts(
    rows: Sequence[Row], groups: Mapping[str, Sequence[CellResult]]
) -> list[Row]:
    """Mark passes over fewer tokens than others: their contract cuts the sentences shorter."""
    def tokens(row: Row) -> int:
        return max((r.corpus.tokens for r in groups[config_key(row.cell)] if r.corpus), default=0)

    most = max(map(tokens, rows), default=0)
    return [replace(row, cut=found) if 0 < (found := tokens(row)) < most else row for row in rows]


def _with_front(rows: Sequence[Row]) -> list[Row]:
    """Mark the rows that no other row of the workload beats in p50, throughput and memory."""
    return [replace(row, pareto=_on_front(row, rows)) for row in rows]


def _point(row: Row) -> tuple[float, float, float] | None:
    if row.p50 is None or row.throughput is None or row.memory is None:
        return None
    if row.verdict.word == "invalid" or row.parity == "fail":
        return None
    return (row.p50.value, -row.throughput.value, float(row.memory.gpu or row.memory.peak))


def _on_front(row: Row, rows: Sequence[Row]) -> bool:
    own = _point(row)
    if own is None:
        return False
    rivals = (p for r in rows if r.workload == row.workload and (p := _point(r)) is not None)
    return not any(
        p != own and all(a <= b for a, b in zip(p, own, strict=True)) for p in rivals)


def _recommend(
    rows: Sequence[Row], groups: Mapping[str, Sequence[CellResult]],
    floors: Mapping[str, float], request: SweepRequest,
) -> list[Recommendation]:
    found = []
    for workload in dict.fromkeys(r.workload for r in rows):
        usable = [
            Choice(r, latencies(groups[config_key(r.cell)]), paces(groups[config_key(r.cell)]),
                   floors.get(_place(r.cell), 0.0))
            for r in rows if r.workload == workload and _point(r) is not None
        ]
        found.extend(recommend(workload, usable, request.p95_limit, request.seed))
    return found
