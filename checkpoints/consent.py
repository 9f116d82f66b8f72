"""What this user lets a model do, now. A manifest or a config can only ask for it.

It holds for a block of code and for what that calls: a source is found again, and a tokenizer
loaded, far below the command that was told what is allowed.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Consent:
    """What is allowed, see :func:`~.resolver.resolve`."""

    allow_pickle: bool = False
    trust_remote_code: bool = False


_GIVEN: ContextVar[Consent] = ContextVar("consent", default=Consent())  # noqa: B039 - it is frozen


def given() -> Consent:
    """What is allowed here: nothing, unless somebody said so."""
    return _GIVEN.get()


@contextmanager
def allowing(consent: Consent) -> Iterator[None]:
    """Allow that, and nothing else, for the time of a block."""
    before = _GIVEN.set(consent)
    try:
        yield
    finally:
        _GIVEN.reset(before)
