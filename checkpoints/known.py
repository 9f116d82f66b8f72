"""Pairs of a model type and a task that were measured not to export, refused before any work.

``known_failures.json`` is written by ``make coverage`` from its records, never by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from .files import read_config

if TYPE_CHECKING:
    from .model import Checkpoint

_FILE = Path(__file__).parent / "known_failures.json"


def refuse(checkpoint: Checkpoint, format: str) -> None:  # noqa: A002 - the word users know
    """Raise for a pair that no way of capture exported when it was last measured.

    Raises:
        ExportError: with the cause, and with what works instead.
    """
    if checkpoint.own_code:
        return
    measured: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    model_type = str(read_config(checkpoint.root).get("model_type"))
    found = measured.get(format, {}).get(model_type, {}).get(checkpoint.task)
    if found is None:
        return
    instead = [f"modelport export torchscript --task {checkpoint.task}"] if found.get(
        "torchscript") else []
    instead += [f"--task {task}" for task in found.get("tasks", ())]
    raise ExportError(
        f"{model_type} with {checkpoint.task} is known not to export to {format}: "
        f"{found['cause']} (measured with transformers {measured['transformers']})",
        allowed=", ".join(instead) or "nothing that was measured",
        hint="--strategy trace tries it all the same")
