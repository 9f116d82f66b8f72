"""What can be validated: an artifact, or a bare model file that somebody else made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import artifacts, checkpoints, runtimes
from ..checkpoints import consent
from ..errors import (
    BackendUnavailable,
    DigestMismatch,
    HubUnreachable,
    ModelportError,
    PickleRefused,
    RemoteCodeRefused,
    UsageError,
)
from .opening import STILL, open_session, require
from .request import ModelRequest

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint
    from ..session import Session
    from ..spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can be opened as a session under a known contract.

    Attributes:
        open: a ``functools.partial`` of a function of a module, so that another process can call
            it.
        artifact: None for a bare file.
        part: the component that is meant, of an artifact of several graphs.
        parts: its components, where it is all of them.
    """

    spec: ModelSpec
    open: Callable[[], Session]
    artifact: Artifact | None = None
    part: str | None = None
    parts: Mapping[str, Subject] = field(default_factory=dict)


def is_artifact(path: Path) -> bool:
    """Whether a path is the directory of an artifact."""
    return (path / artifacts.MANIFEST).is_file()


def of_artifact(root: Path, runtime: str | None = None, device: str = "cpu") -> Subject:
    """A verified artifact that something here can open.

    Raises:
        UsageError, UnsafeError: it is none, or its files are not those of its manifest.
        UsageError, BackendUnavailable: nothing opens it on this device here.
    """
    artifact = artifacts.verify(root)
    # Where it is opened, in the cases, this would count as the artifact's own failure.
    require(artifact, runtime, device)

    def subject(found: Artifact, part: str | None = None) -> Subject:
        opener = partial(open_session, found, runtime=runtime, device=device,
                         unless_given=STILL)
        return Subject(found.spec, opener, found, part)

    parts = {name: subject(view, name) for name, view in artifact.components.items()}
    return replace(subject(artifact), parts=parts)


def of_file(
    path: Path, checkpoint: Checkpoint, runtime: str | None = None, device: str = "cpu"
) -> Subject:
    """A bare model file, held to the contract of the checkpoint it claims to be.

    Raises:
        UsageError: no runtime opens such a file, or the checkpoint becomes several.
        BackendUnavailable: none of those that could is available here.
    """
    able = [
        candidate
        for candidate in map(runtimes.get, runtimes.names())
        if path.suffix in candidate.suffixes and runtime in (None, candidate.name)
    ]
    if not able:
        suffixes = {s for n in runtimes.names() for s in runtimes.get(n).suffixes}
        raise UsageError(
            f"no runtime opens {path}",
            allowed=f"an artifact's directory, or a file ending in {', '.join(sorted(suffixes))}",
        )
    ready = [candidate for candidate in able if candidate.unavailable(device) is None]
    if not ready:
        raise BackendUnavailable(
            "; ".join(f"{c.name}: {c.unavailable(device)}" for c in able), hint="modelport doctor"
        )
    model = checkpoints.load(checkpoint)
    if model.parts:
        raise UsageError(
            f"{checkpoint.task} is several graphs ({', '.join(model.parts)}), and {path} is one",
            allowed="the directory of an artifact",
            hint=f"modelport export onnx --model {checkpoint.origin.model}, which validates it")
    spec = model.spec
    return Subject(spec, partial(_open_file, ready[0].name, path, spec, device))


def _open_file(runtime: str, path: Path, spec: ModelSpec, device: str) -> Session:
    return runtimes.get(runtime).open_file(path, spec, device)


def source_of(artifact: Artifact) -> Checkpoint:
    """The checkpoint an artifact was made from, with the very weights it had then.

    Raises:
        DigestMismatch: the weights have changed since.
        PickleRefused, RemoteCodeRefused: it needs what this user did not allow now, whatever the
            manifest says.
        ModelportError: it cannot be had any more; the hint names ``--reference``.
    """
    source = artifact.manifest.source
    try:
        checkpoint = ModelRequest.of(source).resolve()
    except ModelportError as error:
        raise type(error)(
            f"the source {source.model} cannot be read: {error.found}",
            allowed=error.allowed,
            hint=_way_out(error, artifact.root),
        ) from error
    if checkpoint.scan.digest != source.digest:
        raise DigestMismatch(
            f"{source.model} now has weights {checkpoint.scan.digest[:12]}, and the artifact was "
            f"made from {source.digest[:12]}",
            hint="export again, or give the original with --reference",
        )
    return checkpoint


def _way_out(error: ModelportError, root: Path) -> str:
    now = consent.given()
    if isinstance(error, RemoteCodeRefused) and not now.trust_remote_code:
        return f"read that code, then modelport validate {root} --trust-remote-code"
    if isinstance(error, PickleRefused) and not now.allow_pickle:
        return f"modelport validate {root} --allow-pickle"
    model = "DIRECTORY" if isinstance(error, HubUnreachable) else "MODEL"
    return f"modelport validate {root} --reference {model}"


def named(
    reference: str, *, revision: str | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
) -> ModelRequest | Path:
    """What a user means by a reference: the directory of an artifact, or a model.

    Args:
        revision, weights: of the model; see :class:`ModelRequest`.
    """
    path, now = Path(reference), consent.given()
    return path if is_artifact(path) else ModelRequest(
        reference, revision=revision, weights=weights, allow_pickle=now.allow_pickle,
        trust_remote_code=now.trust_remote_code)


def with_task(request: ModelRequest, artifact: Artifact | None) -> ModelRequest:
    """A reference loaded with the head that the artifact has, unless another was named."""
    if request.task is None and artifact is not None:
        return replace(request, task=artifact.manifest.source.task)
    return request
