"""Which sizes an engine is built for, and which profile a request goes to: pure functions.

A profile gives every dynamic dimension a range with a typical size. Batch sizes are cut into
buckets (1, 2, 3 to 4, 5 to 8, …), each with a profile of its own, tuned for its largest batch, as a
kernel chosen for batch 64 is a poor one for batch 1. Buckets touch and do not overlap, so every
size in range lands in exactly one profile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .errors import SpecError, UsageError
from .spec import Dim, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Layout = Literal["auto", "multi-profile", "engine-per-profile"]

MAX_PROFILES = 8
"""Profiles in one engine, beyond which ``auto`` builds an engine for each: the builder's time and
the engine's size grow with every profile, and so does what a context switch costs."""

BATCH, SEQUENCE = "batch", "sequence"
TYPICAL, LONGEST = 128, 512
"""Sequence lengths that ``auto`` aims at, where the model takes them."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Largest batches of the buckets that ``auto`` makes, as far as the model takes them."""

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Profile:
    """Range of every dynamic dimension, by name; empty for a model of fixed shapes."""

    dims: Mapping[str, Dim]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether all sizes lie in range."""
        return all(d.min <= sizes[name] <= d.max for name, d in self.dims.items())

    def shapes(self, spec: ModelSpec, name: str) -> tuple[tuple[int, ...], ...]:
        """Smallest, typical and largest shape of an input."""
        tensor = next(t for t in spec.inputs if t.name == name)
        return tuple(
            spec.shape(tensor, {dim: getattr(r, which) for dim, r in self.dims.items()})
            for which in ("min", "opt", "max")
        )


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine file and its profiles, in the order of their indices in it."""

    file: str
    profiles: tuple[Profile, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: which engine, which of its profiles."""

    engine: int
    profile: int


def parse_range(text: str, option: str) -> Dim:
    """``min:opt:max``, or one number for a fixed size.

    Raises:
        UsageError: neither, or not in ascending order.
    """
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise UsageError(f"{option} has {text!r}",
                         allowed="min:opt:max with 1 <= min <= opt <= max, or one size",
                         hint=f"{option} 1:{TYPICAL}:{LONGEST}" if option == "--seq-lens" else "")
    return Dim(*numbers)


def buckets(text: str) -> tuple[Dim, ...]:
    """Batch buckets from their largest sizes: ``1,2,4,8`` is 1, 2, 3 to 4, 5 to 8.

    An entry may also be ``min:opt:max``; ``8:8:8`` is batch 8 and no other.

    Raises:
        UsageError: no number, not ascending, or sizes that no bucket would take.
    """
    found: list[Dim] = []
    for part in text.split(","):
        part = part.strip()
        previous = found[-1].max if found else 0
        if ":" in part:
            bucket = parse_range(part, "--batch-profiles")
        else:
            largest = parse_range(part, "--batch-profiles").max
            bucket = Dim(min(previous + 1, largest), largest, largest)
        if (found and bucket.min != previous + 1) or bucket.max <= previous:
            raise UsageError(
                f"--batch-profiles has {part} after {previous}",
                allowed="ascending sizes that leave no batch size out",
                hint="--batch-profiles 1,2,4,8,16,32,64",
            )
        found.append(bucket)
    return tuple(found)


def batch_ranges(text: str, model: Dim) -> tuple[Dim, ...]:
    """The ranges of batch buckets; ``auto`` is :data:`BATCHES` as far as the model takes them.

    Raises:
        UsageError: see :func:`buckets`, or a batch larger or smaller than the model takes.
    """
    if text == AUTO:
        largest = min(model.max, max(BATCHES[-1], model.min))
        tops = (*(size for size in BATCHES if model.min <= size < largest), largest)
        starts = (model.min, *(top + 1 for top in tops[:-1]))
        return tuple(Dim(start, top, top) for start, top in zip(starts, tops, strict=True))
    asked = buckets(text)
    if asked[0].min < model.min or asked[-1].max > model.max:
        raise UsageError(
            f"--batch-profiles asks for batches of {asked[0].min} to {asked[-1].max}",
            allowed=f"{model.min} to {model.max} for this model",
            hint=f"--batch-profiles {AUTO}",
        )
    return asked


def sequence_range(text: str, model: Dim) -> Dim:
    """The range of sequence lengths; ``auto`` is 1:128:512 as far as the model takes it.

    Raises:
        UsageError: longer or shorter than the model takes.
    """
    if text == AUTO:
        longest = min(model.max, max(LONGEST, model.min))
        return Dim(model.min, min(max(TYPICAL, model.min), longest), longest)
    asked = parse_range(text, "--seq-lens")
    if asked.min < model.min or asked.max > model.max:
        raise UsageError(
            f"--seq-lens asks for lengths {asked.min} to {asked.max}",
            allowed=f"{model.min} to {model.max} for this model",
            hint=f"--seq-lens {model.min}:{min(asked.opt, model.max)}:{model.max}",
        )
    return asked


def plan(spec: ModelSpec, batches: str, lengths: str) -> tuple[Profile, ...]:
    """One profile per batch bucket, smallest first.

    Dimensions other than batch and sequence keep the model's own range. A model without a batch
    dimension gets one profile.

    Raises:
        UsageError: see :func:`batch_ranges` and :func:`sequence_range`.
    """
    common = dict(spec.dims)
    if SEQUENCE in common:
        common[SEQUENCE] = sequence_range(lengths, common[SEQUENCE])
    if BATCH not in common:
        return (Profile(common),)
    return tuple(Profile({**common, BATCH: bucket})
                 for bucket in batch_ranges(batches, common[BATCH]))


def arrange(profiles: Sequence[Profile], layout: Layout) -> tuple[Engine, ...]:
    """Distribute profiles over engine files."""
    if layout == "auto":
        layout = "multi-profile" if len(profiles) <= MAX_PROFILES else "engine-per-profile"
    if layout == "multi-profile" or len(profiles) == 1:
        return (Engine("model.engine", tuple(profiles)),)
    return tuple(
        Engine(f"model-batch-{p.dims[BATCH].max}.engine", (p,)) for p in profiles
    )


def narrowed(spec: ModelSpec, profiles: Sequence[Profile]) -> ModelSpec:
    """The spec with the ranges that the profiles cover together."""
    dims = {
        name: Dim(
            min(p.dims[name].min for p in profiles),
            profiles[len(profiles) // 2].dims[name].opt,
            max(p.dims[name].max for p in profiles),
        )
        for name in spec.dims
    }
    return replace(spec, dims=dims)


def route(engines: Sequence[Engine], sizes: Mapping[str, int]) -> Route:
    """The profile that takes these sizes; the narrowest batch where several do.

    Raises:
        SpecError: none does.
    """
    admitting = [
        (profile.dims[BATCH].max if BATCH in profile.dims else 0, Route(e, p))
        for e, engine in enumerate(engines)
        for p, profile in enumerate(engine.profiles)
        if profile.admits(sizes)
    ]
    if not admitting:
        wanted = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise SpecError(f"no profile takes {wanted}", allowed=_described(engines))
    return min(admitting, key=lambda found: found[0])[1]


def _described(engines: Sequence[Engine]) -> str:
    texts = (
        " × ".join(f"{name} {d.min} to {d.max}" for name, d in profile.dims.items())
        for engine in engines
        for profile in engine.profiles
    )
    return "; ".join(texts)


def edges(engines: Sequence[Engine]) -> dict[str, tuple[int, ...]]:
    """Ends of every profile's ranges by dimension: sizes that reach every one of them."""
    found: dict[str, set[int]] = {}
    for engine in engines:
        for profile in engine.profiles:
            for name, dim in profile.dims.items():
                found.setdefault(name, set()).update((dim.min, dim.max))
    return {name: tuple(sorted(sizes)) for name, sizes in found.items()}


def record(engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """Engines for the manifest: what a serving repository needs to know of each profile."""
    return [
        {
            "file": engine.file,
            "profiles": [
                {name: [d.min, d.opt, d.max] for name, d in profile.dims.items()}
                for profile in engine.profiles
            ],
        }
        for engine in engines
    ]


def from_record(found: Any, spec: ModelSpec) -> tuple[Engine, ...]:
    """Engines from a manifest, which may have been written by anyone.

    Raises:
        UsageError: not what :func:`record` writes.
    """
    try:
        engines = tuple(
            Engine(
                str(entry["file"]),
                tuple(Profile({str(n): Dim(*map(int, r)) for n, r in profile.items()})
                      for profile in entry["profiles"]),
            )
            for entry in found
        )
    except (TypeError, ValueError, KeyError, AttributeError, SpecError) as error:
        raise _malformed() from error
    complete = all(set(p.dims) == set(spec.dims) for e in engines for p in e.profiles)
    if not engines or not complete or not all(e.profiles for e in engines):
        raise _malformed()
    return engines


def _malformed() -> UsageError:
    return UsageError("the manifest does not say which profiles its engines have",
                      hint="export the artifact again")
