"""A measurement that stops when its time is over and goes on from there in the next call; what of
it is published, and under which name."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any


class TimeUp(Exception):
    """The time allowed for this call is over; what was measured is kept."""


def until(minutes: float | None) -> Callable[[str], None]:
    """A progress printer that raises :class:`TimeUp` after the first cell past the limit."""
    start = time.monotonic()

    def notify(text: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {text}", file=sys.stderr, flush=True)
        if minutes is not None and time.monotonic() - start > minutes * 60:
            raise TimeUp(text)

    return notify


def published(report: dict[str, Any]) -> dict[str, Any]:
    """A benchmark report without the directories of the machine that made it."""
    for measured in (*report["rows"], *report["results"]):
        measured["cell"]["path"] = ""
    return report


def file_name(processor: str) -> str:
    """Part of a result's name: ``intel-xeon`` of an "Intel(R) Xeon(R) Processor".

    Results of one processor or card do not replace those of another.
    """
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((?:r|tm)\)", " ", processor.lower()))
    return "-".join(word for word in words if word not in ("cpu", "processor"))
