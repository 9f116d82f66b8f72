"""Every error modelport raises on purpose, with the exit code the command line returns for it.

    ModelportError                  1   unexpected: a bug, or a library failed under us
    ├── UsageError                  2   what was asked for cannot be done as asked
    │   ├── SpecError               2   feeds do not match a model's inputs
    │   ├── CheckpointError         2   the checkpoint is damaged, incomplete or of another kind
    │   ├── OpsetTooLow             2   a transform needs operators of a higher opset
    │   ├── DestinationExists       2   the output directory is taken
    │   └── TagMoved                2   someone else published under the tag meanwhile
    ├── ExportError                 1   no strategy produced a graph that opens
    ├── ClaimError                  3   the written file is not what was asked for
    ├── ParityError                 3   the artifact is not equal to its source
    ├── GateRefused                 3   evidence that publishing asks for is absent or bad
    ├── UnsafeError                 4   refused for safety
    │   ├── DigestMismatch          4   bytes are not those the manifest names
    │   ├── PathEscape              4   a file points outside its artifact
    │   ├── PickleRefused           4   a pickle would have to be executed
    │   ├── RemoteCodeRefused       4   the checkpoint wants to run its own Python
    │   └── SignatureRefused        4   not signed, or not by this key, or not these files
    ├── IncompleteError             5   a sweep ended with cells missing
    └── UnavailableError            6   something needed is absent
        ├── BackendUnavailable      6   a package, provider or device
        ├── HubUnreachable          6   the model hub did not answer
        ├── DestinationUnreachable  6   where artifacts are published did not answer as it should
        └── StorageError            6   no space, or the disk refused the write

An error is one sentence of what was found, one of what is allowed, and the next command to try.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


class ModelportError(Exception):
    """Base of the tree.

    Args:
        found: what is wrong, as one sentence.
        allowed: what would have been right, when that is not obvious.
        hint: the next command or change to try.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, found: str, *, allowed: str = "", hint: str = "") -> None:
        self.found = found
        self.allowed = allowed
        self.hint = hint
        super().__init__(found)

    def __str__(self) -> str:
        lines = [self.found]
        if self.allowed:
            lines.append(f"allowed: {self.allowed}")
        if self.hint:
            lines.append(f"try: {self.hint}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The error as data; ``kind`` is its class."""
        return {
            "kind": type(self).__name__,
            "found": self.found,
            "allowed": self.allowed,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


def from_record(record: Mapping[str, Any]) -> ModelportError:
    """The error that such data was made of; of an unknown kind, a plain one."""
    kind = globals().get(record["kind"])
    if not (isinstance(kind, type) and issubclass(kind, ModelportError)):
        kind = ModelportError
    return kind(record["found"], allowed=record["allowed"], hint=record["hint"])


def unexpected(error: Exception) -> ModelportError:
    """An exception that nobody raised on purpose."""
    return ModelportError(f"unexpected {type(error).__name__}: {error}",
                          hint="run again with -v and report the traceback")


class UsageError(ModelportError):
    exit_code = 2


class SpecError(UsageError):
    """Feeds whose names, dtypes, ranks or sizes are not those of the :class:`~.spec.ModelSpec`."""


class CheckpointError(UsageError):
    """A checkpoint that is truncated, lacks a shard or a tensor, or holds NaN or infinity."""


class OpsetTooLow(UsageError):
    """The graph's opset lacks what a transform writes; ``--opset auto`` raises it by itself.

    Attributes:
        needed: the lowest opset that will do; 0 where only the message tells.
    """

    def __init__(
        self, found: str, *, needed: int = 0, allowed: str = "", hint: str = ""
    ) -> None:
        self.needed = needed
        super().__init__(
            found,
            allowed=allowed or f"opset {needed} or higher",
            hint=hint or f"--opset {needed}, or --opset auto",
        )


class DestinationExists(UsageError):
    """The output directory exists and ``--force`` was not given."""


class TagMoved(UsageError):
    """A tag no longer points at the release that was expected there; nothing was replaced."""


class ExportError(ModelportError):
    """No strategy produced a graph; the message lists each attempt with its cause."""


class ClaimError(ModelportError):
    """Opset, dtype, axes or device read back from the file differ from the request."""

    exit_code = 3


class ParityError(ModelportError):
    """The artifact was compared with its source and is not equal to it."""

    exit_code = 3


class GateRefused(ModelportError):
    """Publishing asks for evidence (a benchmark, no regression) that is absent or says no."""

    exit_code = 3


class UnsafeError(ModelportError):
    exit_code = 4


class DigestMismatch(UnsafeError):
    """A file's sha256 or size is not the one recorded for it."""


class PathEscape(UnsafeError):
    """A path inside an artifact is absolute, contains ``..``, or is a link."""


class PickleRefused(UnsafeError):
    """Reading this checkpoint means unpickling, which can run code."""


class RemoteCodeRefused(UnsafeError):
    """The checkpoint names Python of its own (``auto_map``)."""


class SignatureRefused(UnsafeError):
    """There is no signature, another key made it, or it covers other files."""


class IncompleteError(ModelportError):
    """A sweep ended, but some of its cells failed; the finished ones are on disk."""

    exit_code = 5


class UnavailableError(ModelportError):
    exit_code = 6


class BackendUnavailable(UnavailableError):
    """A package, execution provider or device that was asked for is not there."""


class HubUnreachable(UnavailableError):
    """The model hub could not be reached, or offline mode is on and the cache lacks the files."""


class DestinationUnreachable(UnavailableError):
    """A registry, bucket or server refused or did not answer, also when asked again."""


class StorageError(UnavailableError):
    """The disk is full or refused the write; nothing was placed at the destination."""
