"""Generated tokens against the source's: equal, or different at a tie; and data that tells them.

Two programs that round differently leave each other's path at the first token whose rivals are
closer than rounding, and from there on the comparison says nothing. So a sequence counts up to its
first difference, and that difference is looked at in the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .report import Result

ALIKE = 1e-4
"""Spread of answers to different prompts, relative to their size, below which they prove little.

A graph that ignored what it is given would be off by about this much; Gate A allows two or three
roundoffs of the reference, 2e-6 of the answers' size. Measured on seeded architectures of full size
in float32: GPT-2 0.66, T5-small 0.41, Whisper-tiny as the library draws it 0.0026; 0 to 8e-7 where
the decoder's attention to the encoder is switched off or two prompts are the same. 1e-4 lies 50
times above what a fault could hide in and 26 times below the faintest model that does listen.
In half precision rounding alone reaches 1e-3; there the float32 parent has been held to it."""

TIE = 2.0
"""Errors that the truth's margin must exceed for a flip to count, as for Gate C's agreement."""

Decide = Callable[[int, int], tuple[float, float]]
"""For a row and a step: by how much the truth prefers the reference's token to the candidate's, and
the largest root mean square error of the two sides' logits there."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two generated sequences part.

    Attributes:
        row, step: step counts new tokens from 0.
        margin, error: see :data:`Decide`.
    """

    row: int
    step: int
    margin: float
    error: float

    @property
    def tie(self) -> bool:
        """Whether rounding decides: phrased so that NaN is none."""
        return self.margin <= TIE * self.error


def compare_tokens(
    case: str, output: str, actual: np.ndarray, expected: np.ndarray, decide: Decide | None = None
) -> Result:
    """Compare sequences of new tokens, row by row.

    Args:
        case: label of the case.
        output: what was generated, such as ``greedy``.
        actual, expected: [rows, tokens], of possibly different lengths.
        decide: judges a difference; without it every one counts.
    """
    width = max(actual.shape[1], expected.shape[1])
    left, right = (np.pad(side, ((0, 0), (0, width - side.shape[1])), constant_values=-1)
                   for side in (actual, expected))
    compared, wrong, ties = 0, [], 0
    for row in range(len(right)):
        differ = np.flatnonzero(left[row] != right[row])
        compared += int(differ[0]) if differ.size else width
        if not differ.size:
            continue
        step = int(differ[0])
        margin, error = decide(row, step) if decide else (float("inf"), 0.0)
        found = Difference(row, step, margin, error)
        if found.tie:
            ties += 1
        else:
            wrong.append(found)
    reason = ""
    if wrong:
        first = wrong[0]
        reason = (f"row {first.row} differs at token {first.step}"
                  + (f", where the truth's margin of {first.margin:.3g} is no tie (errors "
                     f"{first.error:.3g})" if decide else ""))
    if not compared and not wrong:
        return Result(case, output, "generation", "fail", "nothing was compared")
    return Result(case, output, "generation", "fail" if wrong else "pass", reason,
                  samples=len(right), elements=compared)


def spread(answers: np.ndarray) -> float:
    """How far answers to different prompts differ: the least root mean square distance of two of
    them, relative to the root mean square of all; 0 for fewer than two.

    Args:
        answers: [prompts, ...], floating point.
    """
    rows = answers.reshape(len(answers), -1).astype(np.float64)
    scale = float(np.sqrt(np.mean(rows * rows))) if rows.size else 0.0
    if len(rows) < 2 or scale == 0:
        return 0.0
    least = min(float(np.sqrt(np.mean((a - b) ** 2)))
                for i, a in enumerate(rows) for b in rows[i + 1:])
    return least / scale


def diversity(case: str, output: str, answers: np.ndarray) -> Result:
    """Whether answers to different prompts differ enough to prove anything: else ``suspect``."""
    found = spread(answers)
    alike = not found >= ALIKE
    reason = (f"answers to {len(answers)} different prompts differ by {found:.2g} of their size; "
              f"allowed: {ALIKE:g} or more, since equal answers prove nothing")
    return Result(case, output, "generation", "suspect" if alike else "pass",
                  reason if alike else "", samples=len(answers), elements=answers.size)
