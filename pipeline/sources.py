"""A source as a measured process is told of it, and as measurements of it are kept apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.files import digest
from .references import identity

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint


def spelled(source: Checkpoint, **fields: Any) -> str:
    """Fields of a :class:`~.request.ModelRequest` as JSON, with others beside them.

    By its directory, so that no hub is asked again; a module that a file makes is made anew, since
    its directory holds no more than its weights.
    """
    model = str(source.root) if source.make is None else source.origin.model
    trusted = {"trust_remote_code": True} if source.origin.remote_code else {}
    return json.dumps({"model": model, "task": source.task, **trusted, **fields}, sort_keys=True)


def told_apart(source: Checkpoint) -> str:
    """A digest that is another for another source, Python of its own included."""
    code = []
    if source.own_code:
        code = sorted(source.root.glob("*.py"))
        made_by = Path(source.origin.model.rpartition(":")[0])
        if source.make is not None and made_by.is_file():
            code.append(made_by)
    found = (*identity(source), *map(digest, code))  # links, in the cache of a hub
    return hashlib.sha256(repr(found).encode()).hexdigest()
