"""Keeping to a time limit: predicts a case from those already timed, and says why it refuses."""

from __future__ import annotations

from time import perf_counter

from .matrix import DEFAULT_SECONDS, FILL_RATIO, FILL_SECONDS


class Pace:
    """Admits cases while the predicted time lasts, and the first one always.

    Without any nothing would be shown, and a right model would fail for want of time.

    Args:
        max_seconds: limit of the whole validation; None for the default limit, with cases that
            are not essential held to a share of the essential ones' time.
        share: part of the limit that this stage may use.
        started: ``perf_counter`` value at which the validation began.
        fill: whether that share is enforced here.
    """

    def __init__(
        self, max_seconds: float | None, *, share: float, started: float, fill: bool
    ) -> None:
        self._deadline = started + share * (DEFAULT_SECONDS if max_seconds is None else max_seconds)
        self._held = fill and max_seconds is None
        self._rate: tuple[int, float] = (0, 0.0)
        self._essential = self._extra = 0.0

    def refuse(self, size: int, *, essential: bool) -> str:
        """Why a case of ``size`` positions cannot be run; empty if it can."""
        known, seconds = self._rate
        need = seconds * max(size / known, 1.0) if known else 0.0
        room = self._deadline - perf_counter()
        if known and need > room:
            return f"needs about {need:.1f} s, {max(room, 0.0):.1f} s of the budget remain"
        extra = FILL_SECONDS + FILL_RATIO * self._essential - self._extra
        if self._held and not essential and need > extra:
            return f"not essential, and needs about {need:.1f} s; set a time limit to include it"
        return ""

    def took(self, size: int, seconds: float, *, essential: bool) -> None:
        """Record a case's time; the largest case so far sets the rate."""
        if size >= self._rate[0]:
            self._rate = (size, seconds)
        if essential:
            self._essential += seconds
        else:
            self._extra += seconds
