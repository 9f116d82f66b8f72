"""The shape matrix: which sizes, paddings and seeds a model is compared on, within a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import ceil, prod
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..spec import terms
from .inputs import Case, Padding, tail_range

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence

    from ..spec import Dim, ModelSpec, TensorSpec

PREFERRED: Mapping[str, tuple[int, ...]] = {"batch": (1, 3, 7, 64), "sequence": (1, 2, 17, 128)}
"""Sizes wanted besides each dimension's own minimum and maximum."""

SEEDS = (0, 1, 2)
PADDINGS: tuple[Padding, ...] = ("none", "right", "left", "masked")
ODD = (3, 7, 17, 5, 9, 11, 13, 15, 19, 21, 23, 25, 31, 33)
"""Odd sizes to draw untraced values from, in order of preference."""

ESSENTIAL_POSITIONS = 2048
"""Pairs of sizes up to this many positions (batch × sequence) are essential; larger ones are
filled in as time allows. 2048 positions of a 110 M-parameter encoder take 2 s per float32 run on
two cores."""

MAX_MEMORY = 3 << 29
"""Default bytes for one case's arrays and activations, weights not included: 1.5 GiB."""

POSITION_BYTES = 64 << 10
"""Activations assumed per position: about ten float64 tensors of 768 channels."""

SAMPLE_BYTES = 4 << 10
"""The same per sample of a waveform, which no layer sees one by one: five float64 tensors of what
wav2vec 2.0's first convolution makes, 512 channels every 5 samples (``conv_dim``, ``conv_stride``);
what follows is 64 times shorter."""

ELEMENT_BYTES = 36
"""Per output element, in all processes: the float64 truth (8), float32 reference and candidate
(8), three float32 buffers in the candidate's runtime (12), copies while comparing (8). With these,
a base-size masked language model is validated within 3 GB, weights included."""

FILL_RATIO, FILL_SECONDS = 0.25, 1.0
"""Without a time limit, cases that are not essential may take this share of the essential ones'
time and this many seconds more."""

DEFAULT_SECONDS = 600.0
"""Bound where no time limit is given. The cases that coverage rests on take about a minute for a
base-size encoder on two idle cores; a machine that is busy takes longer and leaves none of them
out. Only a model ten times as large meets the bound, and then what did not run is listed."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A planned case that was not run, and why; it is never counted as passed."""

    case: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, in order, and what was left out before starting.

    Attributes:
        cases: those that coverage rests on first.
        left_out: cases the limits exclude.
        max_seconds: for everything together, the first case excepted, which is always run; None
            lets essential cases take :data:`DEFAULT_SECONDS` and the rest a little more
            (:data:`FILL_RATIO`).
        max_disk: bytes of stored float64 outputs.
    """

    cases: tuple[Case, ...]
    left_out: tuple[LeftOut, ...] = ()
    max_seconds: float | None = None
    max_disk: int = 4 << 30

    def __add__(self, cases: Sequence[Case]) -> Plan:
        """The same plan with given cases (texts, a user's file) run before the drawn ones."""
        return replace(self, cases=(*cases, *self.cases))


def plan(
    spec: ModelSpec,
    *,
    max_seconds: float | None = None,
    max_memory: int = MAX_MEMORY,
    max_disk: int = 4 << 30,
    cost: Callable[[Case], float] | None = None,
    traced: Mapping[str, Collection[int]] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> Plan:
    """Choose the cases for a model.

    Every dynamic dimension appears at its minimum, its maximum and at least two odd sizes that
    tracing never saw (where its range has them), under every padding pattern that the size admits,
    and each seed is used. All pairs of batch and sequence are planned, each under every padding,
    with the seeds taking turns; other dimensions vary against them without the full product.

    Args:
        max_seconds: for everything, runs of truth, reference and candidate together.
        max_memory: bytes for one case, see :func:`memory`.
        max_disk: bytes of truth outputs kept on disk at once.
        cost: seconds a case takes in all its runs. Without it, time is measured while judging and
            the limit is applied there.
        traced: sizes by dimension that the exporter saw.
        sizes: sizes by dimension that replace the default choice (``--batch-sizes``).

    Returns:
        The plan; whatever a limit excludes is listed in ``left_out``.

    Raises:
        UsageError: ``sizes`` names a dimension the model has not, or one out of its range.
    """
    _check_sizes(spec, sizes or {})
    chosen = {name: tuple(dict.fromkeys(sizes[name])) if sizes and sizes.get(name)
              else sizes_of(name, dim, (traced or {}).get(name, ()))
              for name, dim in spec.free.items()}
    ordered = _order(spec, _pool(spec, chosen, tuple(seeds)), chosen)
    kept: list[Case] = []
    left: list[LeftOut] = []
    spent = 0.0
    for case in ordered:
        need = memory(spec, case)
        seconds = cost(case) if cost else 0.0
        if need > max_memory:
            left.append(LeftOut(case.label, f"needs {_mib(need)}, allowed {_mib(max_memory)}"))
        elif max_seconds is not None and spent + seconds > max_seconds:
            left.append(LeftOut(case.label, f"needs {seconds:.1f} s, "
                                            f"{max_seconds - spent:.1f} s of the budget remain"))
        else:
            spent += seconds
            kept.append(case)
    return Plan(tuple(kept), tuple(left), max_seconds, max_disk)


def sizes_of(name: str, dim: Dim, traced: Collection[int] = ()) -> tuple[int, ...]:
    """Ascending sizes for one dimension: its ends, the preferred ones, two odd untraced ones.

    Where none are preferred, its typical size and an odd one beside it: the least that a waveform
    may have gives two frames, and so do all odd sizes near that.
    """
    def counts(value: int) -> bool:
        return value % 2 == 1 and dim.min < value < dim.max and value not in traced

    wanted = PREFERRED.get(name, (dim.opt, dim.opt - 1 - dim.opt % 2))
    chosen = {dim.min, dim.max, *(v for v in wanted if dim.min <= v <= dim.max)}
    for value in filter(counts, (*ODD, *_odd(dim))):
        if sum(map(counts, chosen)) >= 2:
            break
        chosen.add(value)
    return tuple(sorted(chosen))


def positions(spec: ModelSpec, case: Case) -> int:
    """Positions of the largest input (batch × sequence): the unit that time is counted in."""
    return max((_positions(spec, t, case) for t in spec.inputs), default=1)


def _positions(spec: ModelSpec, tensor: TensorSpec, case: Case) -> int:
    return prod(size for size, d in zip(spec.shape(tensor, dict(case.sizes)), tensor.shape,
                                        strict=True) if isinstance(d, str))


def output_elements(spec: ModelSpec, case: Case) -> int:
    """Elements of all outputs together.

    A size that only outputs name is taken to grow as the inputs' sizes do, the batch's excepted.
    """
    grown = max((size / spec.free[name].max for name, size in case.sizes
                 if name in spec.free and name != "batch"), default=1.0)
    sizes = {d: 1 for t in spec.outputs for dim in t.shape if isinstance(dim, str)
             for d in terms(dim)}
    sizes |= {name: max(dim.min, ceil(dim.max * grown)) for name, dim in spec.dims.items()}
    sizes |= dict(case.sizes)
    for tensor in (t for t in spec.inputs if t.role == "tail"):
        least, end = tail_range(tensor, sizes)
        sizes[tensor.name] = min(sizes["sequence"], end - 1) if least else sizes["sequence"]
    return sum(prod(spec.shape(t, sizes)) for t in spec.outputs)


def memory(spec: ModelSpec, case: Case) -> int:
    """Estimated bytes of a case's arrays on all sides and of one model's activations."""
    fed = sum(prod(spec.shape(t, dict(case.sizes))) for t in spec.inputs)
    waves = {t.shape for t in spec.inputs if t.role == "waveform"}  # and their masks
    active = max((_positions(spec, t, case) * (SAMPLE_BYTES if t.shape in waves else POSITION_BYTES)
                  for t in spec.inputs), default=POSITION_BYTES)
    return active + (fed + output_elements(spec, case)) * ELEMENT_BYTES


def fitted(spec: ModelSpec, sizes: Mapping[str, int], wanted: Collection[str]) -> dict[str, int]:
    """The sizes with every limited sum within its limit: what is not wanted gives way first."""
    found = dict(sizes)
    for name, limit in spec.dims.items():
        for term in sorted(terms(name), key=lambda term: term in wanted):
            excess = sum(found.get(t, 0) for t in terms(name)) - limit.max
            if excess > 0 and term in found and len(terms(name)) > 1:
                found[term] = max(spec.dims[term].min, found[term] - excess)
    return found


def admits(spec: ModelSpec, sizes: Mapping[str, int], padding: Padding) -> bool:
    """Whether a padding pattern means something at these sizes.

    Side padding needs a masked dimension longer than 1; a fully masked row needs a second row to
    compare.
    """
    if padding == "none":
        return True
    shapes = [spec.shape(t, sizes) for t in spec.inputs if t.role == "mask"]
    if padding == "masked":
        return any(prod(shape[:-1]) > 1 for shape in shapes)
    return any(shape[-1] > 1 for shape in shapes)


def _check_sizes(spec: ModelSpec, sizes: Mapping[str, Sequence[int]]) -> None:
    for name, values in sizes.items():
        dim = spec.free.get(name)
        if dim is None:
            raise UsageError(f"the model has no dimension {name}",
                             allowed=", ".join(spec.free) or "none: its shapes are fixed")
        wrong = [v for v in values if not dim.min <= v <= dim.max]
        if wrong:
            raise UsageError(f"{name} {wrong[0]} is out of range",
                             allowed=f"{dim.min} to {dim.max}")


def _pool(
    spec: ModelSpec, chosen: Mapping[str, tuple[int, ...]], seeds: tuple[int, ...]
) -> Iterator[Case]:
    seen: set[tuple[object, ...]] = set()
    for index, sizes in enumerate(_shapes(spec, chosen)):
        pairs = tuple(sorted(sizes.items()))
        for turn, padding in enumerate(PADDINGS):
            if (pairs, padding) in seen or not admits(spec, sizes, padding):
                continue
            seen.add((pairs, padding))
            yield Case(pairs, padding, seeds[(index + turn) % len(seeds)])
    if not chosen:  # one fixed shape: the seeds cannot take turns over shapes
        first = [p for p in PADDINGS if admits(spec, {}, p)]
        yield from (Case((), first[i % len(first)], seed) for i, seed in enumerate(seeds)
                    if seed != seeds[i % len(first) % len(seeds)] or i >= len(first))


def _shapes(
    spec: ModelSpec, chosen: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, int]]:
    names = list(chosen)
    main = [n for n in names if n in PREFERRED] or names[:2]
    others = [n for n in names if n not in main]
    for index, values in enumerate(product(*(chosen[n] for n in main))):
        # What may be empty, such as a cache, is so every other time.
        middle = {n: chosen[n][min(1 if chosen[n][0] else index % 2, len(chosen[n]) - 1)]
                  for n in names}
        yield fitted(spec, middle | dict(zip(main, values, strict=True)), main)
    for name in others:
        for turn, value in enumerate(chosen[name]):
            # The largest size of the main dimensions is left to their own product, and the largest
            # here goes with their smallest: what it needs is the most that memory may hold.
            rest = len(chosen[name]) - 1 - turn
            small = {n: chosen[n][rest % max(1, len(chosen[n]) - 1)] for n in main}
            middle = {n: chosen[n][min(1, len(chosen[n]) - 1)] for n in names}
            yield fitted(spec, middle | small | {name: value}, (name,))


def _order(
    spec: ModelSpec, pool: Iterator[Case], chosen: Mapping[str, tuple[int, ...]]
) -> list[Case]:
    """Essential cases by greedy set cover (most new items per position), then the rest by cost."""
    remaining = list(pool)
    items = {case.label: _items(spec, case, chosen) for case in remaining}
    costs = {case.label: positions(spec, case) for case in remaining}
    missing: set[Hashable] = set().union(*items.values()) if items else set()
    ordered: list[Case] = []
    while missing:
        best = max(remaining, key=lambda c: (
            len(items[c.label] & missing) / (costs[c.label] + 8), -costs[c.label]))
        remaining.remove(best)
        missing -= items[best.label]
        ordered.append(best)
    shapes = {case.sizes for case in ordered}
    remaining.sort(key=lambda c: costs[c.label])
    for case in sorted(remaining, key=lambda c: c.sizes in shapes):
        ordered.append(replace(case, essential=False))
    return ordered


def _items(
    spec: ModelSpec, case: Case, chosen: Mapping[str, tuple[int, ...]]
) -> set[Hashable]:
    """What a case covers: each size under its padding, its seed, and its pair of main sizes."""
    covered: set[Hashable] = {(n, v, case.padding) for n, v in case.sizes}
    covered.add(("seed", case.seed))
    if not chosen or positions(spec, case) <= ESSENTIAL_POSITIONS:
        covered.add(case.sizes)
    return covered


def _odd(dim: Dim) -> range:
    start = dim.min + 1 + dim.min % 2
    return range(start, min(dim.max, start + 64), 2)


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
