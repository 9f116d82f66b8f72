"""What goes into a model and what comes out, as frozen data: no framework, NumPy only.

A :class:`ModelSpec` is derived once from the checkpoint, written into the manifest, and is the
contract that every :class:`~.session.Session` checks its feeds against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .errors import SpecError

if TYPE_CHECKING:
    import numpy as np

Role = Literal[
    "tokens", "mask", "segments", "positions", "boxes", "flags", "pixels", "waveform", "features",
    "tail",
]
"""What an input means, so that test data can be drawn for it.

tokens, segments, positions, boxes: integers below ``TensorSpec.high``; mask: 1 keep, 0 padding;
flags: independent 0/1; pixels, waveform, features: standard normal floats; tail: one number, how
many of the last positions along ``sequence`` are answered for, 0 for all (an output's dimension of
the input's name is as long).
"""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: as the model names it.
        dtype: NumPy name, or ``bfloat16``.
        shape: an int is fixed; a str is a named dynamic dimension, and the same name means the
            same size in every tensor of the model; ``past+sequence`` is as long as these two.
        role: see :data:`Role`; outputs have none.
        high: exclusive upper bound of an integer input.
        pad: the id that means "no token here", for tokens; never drawn as real content.
        end: the id that each row of tokens holds exactly once, after its content; None where rows
            end in any token. A row that is padding from end to end holds it last.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: Role | None = None
    high: int | None = None
    pad: int | None = None
    end: int | None = None

    def ended(self, ids: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
        """Token ids with :attr:`end` exactly once a row; as they are where there is no end.

        Args:
            ids: int64 [..., tokens].
            keep: of the same shape, not 0 for content; None where all of it is.
        """
        import numpy as np

        if self.end is None:
            return ids
        other = next(i for i in range(3) if i not in (self.end, self.pad))
        kept = np.ones(ids.shape, bool) if keep is None else np.asarray(keep, bool)
        after = ids.shape[-1] - 1
        last = np.where(kept.any(-1), after - kept[..., ::-1].argmax(-1), after)
        found = np.where(ids == self.end, other, ids)
        np.put_along_axis(found, last[..., None], self.end, -1)
        return found


@dataclass(frozen=True, slots=True)
class Dim:
    """Range of a named dynamic dimension: ``min <= size <= max``, ``opt`` the typical size."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max or self.max < 1:
            raise SpecError(f"dimension range {self.min}:{self.opt}:{self.max} is not ordered",
                            allowed="0 <= min <= opt <= max, and max at least 1")


def terms(dim: str) -> tuple[str, ...]:
    """The plain dimensions that a named one is the sum of; itself where it is plain."""
    return tuple(dim.split("+"))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Inputs and outputs in the model's own order, and the range of each dynamic dimension.

    Attributes:
        dims: ranges by name; one under the name of a sum limits the sum.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, Dim] = field(default_factory=dict)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.outputs)

    @property
    def free(self) -> dict[str, Dim]:
        """The ranges of the plain dimensions of inputs, whose sizes can be chosen.

        What only outputs have (the frames of a waveform) follows from these.
        """
        used = {term for tensor in self.inputs for dim in tensor.shape if isinstance(dim, str)
                for term in terms(dim)}
        return {name: dim for name, dim in self.dims.items() if name in used}

    def shape(self, tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's concrete shape once every plain dimension has a size."""
        return tuple(d if isinstance(d, int) else sum(sizes[t] for t in terms(d))
                     for d in tensor.shape)

    def check(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Check feeds against the inputs and return the size of every plain dimension.

        Raises:
            SpecError: a missing or unexpected name, another dtype or rank, a fixed dimension of
                another size, one name with two sizes, a sum that is none, or a size outside its
                range.
        """
        expected, given = set(self.input_names), set(feeds)
        if expected != given:
            parts = []
            if expected - given:
                parts.append("missing: " + ", ".join(sorted(expected - given)))
            if given - expected:
                parts.append("unexpected: " + ", ".join(sorted(given - expected)))
            raise SpecError("; ".join(parts), allowed="exactly " + ", ".join(self.input_names))
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            value = feeds[tensor.name]
            if str(value.dtype) != tensor.dtype:
                raise SpecError(f"{tensor.name} has dtype {value.dtype}", allowed=tensor.dtype)
            self._check_shape(tensor, tuple(value.shape), sizes)
        for name in [name for name in sizes if len(terms(name)) > 1]:
            total = sizes.pop(name)
            expected_total = sum(sizes.get(term, 0) for term in terms(name))
            if total != expected_total:
                raise SpecError(f"{name} is {total}", allowed=str(expected_total))
        return sizes

    def _check_shape(
        self, tensor: TensorSpec, actual: tuple[int, ...], sizes: dict[str, int]
    ) -> None:
        wanted = "[" + ", ".join(map(str, tensor.shape)) + "]"
        if len(actual) != len(tensor.shape):
            raise SpecError(f"{tensor.name} has shape {list(actual)}", allowed=wanted)
        for dim, size in zip(tensor.shape, actual, strict=True):
            if isinstance(dim, int):
                if dim != size:
                    raise SpecError(f"{tensor.name} has shape {list(actual)}", allowed=wanted)
                continue
            known = sizes.setdefault(dim, size)
            if known != size:
                raise SpecError(f"{dim} is {known} in one input and {size} in {tensor.name}",
                                allowed=f"one size for {dim} in all inputs")
            bounds = self.dims.get(dim)
            if bounds and not bounds.min <= size <= bounds.max:
                raise SpecError(f"{dim} is {size} in {tensor.name}",
                                allowed=f"{bounds.min} to {bounds.max}")
