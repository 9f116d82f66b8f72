"""Where artifacts are published: one file per URL scheme, found by name.

``file``, ``oci``, ``hf`` and ``sftp`` are repositories that can be published to and pulled from;
``triton`` is a model repository of an inference server, which is only written. Every scheme
without a file of its own is a file system that fsspec knows (``s3``, ``gs``, ``az``, …).
"""

from __future__ import annotations

import sys

from .. import plugins
from .base import (
    DEFAULT_TAG,
    PREVIOUS,
    Deployment,
    Head,
    Item,
    Reference,
    Repository,
    Serving,
    changed,
)
from .transfer import fetch, publish, resolve

__all__ = [
    "DEFAULT_TAG",
    "PREVIOUS",
    "Deployment",
    "Head",
    "Item",
    "Reference",
    "Repository",
    "Serving",
    "changed",
    "fetch",
    "open_deployment",
    "open_repository",
    "publish",
    "resolve",
    "schemes",
]

_OWN = frozenset({"base", "transfer", "retry", "tree"})
_ALIASES = {"ssh": "sftp"}


def schemes() -> tuple[str, ...]:
    """The schemes with a file of their own."""
    return tuple(n for n in plugins.names(sys.modules[__name__]) if n not in _OWN)


def open_repository(reference: Reference) -> Repository:
    """Open what a reference points into.

    Raises:
        UsageError: nothing knows the scheme, or it cannot be pulled from.
        BackendUnavailable: the package for it is not installed.
        DestinationUnreachable: it does not answer.
    """
    from ..errors import UsageError

    name = _ALIASES.get(reference.scheme, reference.scheme)
    kind = _load(name if name in schemes() else "_fsspec")
    if not issubclass(kind, Repository):
        raise UsageError(
            f"{reference.scheme}: is written for a server and cannot be pulled from",
            allowed="file, oci, hf, sftp, or a file system that fsspec knows",
        )
    return kind(reference)


def open_deployment(reference: Reference) -> Deployment | None:
    """The deployment a reference means; None where it means a repository."""
    if reference.scheme not in schemes():
        return None
    kind = _load(reference.scheme)
    return kind(reference) if issubclass(kind, Deployment) else None


def _load(name: str) -> type:
    from importlib import import_module

    kind: type = import_module(f"{__name__}.{name}").DESTINATION
    return kind
