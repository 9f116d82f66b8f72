"""Which model a user means, and what the user allowed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from ..checkpoints import consent
from ..checkpoints.files import digest

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint, Source

Notify = Callable[[str], None]
"""Receives one short sentence when a step starts; the command line shows it as progress."""


def file_digest(said: object) -> str:
    """The sha256 of the file that an option names; empty where it names none."""
    try:
        return digest(Path(str(said)))
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Which model, and what the user allowed for it.

    Attributes:
        model: hub id, local directory, ``demo`` or a bundled architecture.
        revision: commit, tag or branch of a hub model.
        task: None takes it from the checkpoint's configuration.
        weights: ``random`` builds the architecture with weights drawn from ``seed``.
    """

    model: str
    revision: str | None = None
    task: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    seed: int = 0
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def resolve(self) -> Checkpoint:
        """Find the checkpoint on disk or on the hub."""
        from .. import checkpoints

        return checkpoints.resolve(
            self.model,
            revision=self.revision,
            task=self.task,
            weights=self.weights,
            seed=self.seed,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def allowed(self) -> consent.Consent:
        """What the user allowed."""
        return consent.Consent(self.allow_pickle, self.trust_remote_code)

    @classmethod
    def of(cls, source: Source) -> Self:
        """The request that led to a source, as far as its manifest tells.

        What was allowed then is not allowed for that: a manifest may be anybody's. What is allowed
        now is (:mod:`~..checkpoints.consent`).
        """
        now = consent.given()
        return cls(
            source.model,
            revision=source.revision,
            task=source.task,
            weights=source.weights,
            seed=source.seed or 0,
            allow_pickle=now.allow_pickle,
            trust_remote_code=now.trust_remote_code,
        )
