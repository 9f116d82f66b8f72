"""Open an artifact, once its digests are verified, with a runtime that can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import artifacts, runtimes
from ..checkpoints import lean
from ..errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..runtimes import Runtime
    from ..runtimes.pipelines import Pipeline
    from ..session import Session

Used = TypeVar("Used")

STILL = {"spinning": False}
"""Keeps idle threads from spinning where sessions and torch take turns on the same cores:
T5-small's beams took 1.7 times as long with threads of one spinning beside those of the other."""


def open_artifact(
    root: Path,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> tuple[Artifact, Session]:
    """Verify an artifact and open it.

    Args:
        runtime: None takes the first that can open the format here.
        device: ``cpu`` or ``cuda``.
        options: of the runtime, by name.

    Raises:
        DigestMismatch, PathEscape: before anything but the manifest is parsed.
        BackendUnavailable: no runtime for this format is available here; says why for each.
        UsageError: the named runtime cannot open this format.
    """
    artifact = artifacts.verify(root)
    return artifact, open_session(artifact, runtime=runtime, device=device, options=options)


def load_pipeline(
    root: Path,
    device: str = "cpu",
    *,
    runtime: str | None = None,
    **options: Any,
) -> Pipeline:
    """Verify an artifact of several graphs and open it as a model that generates.

    Args:
        device: ``cpu`` or ``cuda``.
        runtime: None takes the first that can open the format here.
        options: of the runtime, by name.

    Returns:
        An object whose ``generate`` is the model's own, on sessions.

    Raises:
        DigestMismatch, PathEscape: before anything but the manifest is parsed.
        UsageError: the artifact is one graph, which does not generate.
        BackendUnavailable: as :func:`open_artifact`.
    """
    artifact = artifacts.verify(Path(root))
    return open_pipeline(artifact, device=device, runtime=runtime, options=options)


def open_pipeline(
    artifact: Artifact,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Open a verified artifact of several graphs; see :func:`load_pipeline`."""
    from ..runtimes import pipelines

    with ExitStack() as opened:
        sessions = {
            name: opened.enter_context(
                open_session(view, runtime=runtime, device=device, options=options,
                             unless_given=STILL))
            for name, view in artifact.components.items()
        }  # fmt: skip
        pipeline = pipelines.build(artifact, sessions, device)
        opened.pop_all()
    return pipeline


def warm(format: str, *, generates: bool) -> None:  # noqa: A002
    """Import what opening an artifact will need.

    Args:
        generates: it is a model that generates, which rests on transformers' own loop.
    """
    import_module(runtimes.for_format(format)[0].package)
    if generates:
        lean.preload()
        import_module("..runtimes.pipelines", __package__)


def open_session(
    artifact: Artifact,
    *,
    runtime: str | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    unless_given: Mapping[str, Any] | None = None,
) -> Session:
    """Open a verified artifact; see :func:`open_artifact`.

    Args:
        unless_given: options that hold where a runtime has them and ``options`` says nothing.
    """
    if artifact.manifest.components:
        raise UsageError(
            f"{artifact.root} is several graphs: {', '.join(artifact.manifest.components)}",
            allowed="an artifact of one graph, or a component of this one",
            hint="modelport.load_pipeline opens it as a model that generates",
        )

    def opened(candidate: Runtime) -> Session:
        chosen = {name: value for name, value in (unless_given or {}).items()
                  if name in candidate.options}
        return candidate.open(artifact, device, {**chosen, **(options or {})})

    return _first(opened, artifact, runtime, device)


def require(artifact: Artifact, runtime: str | None = None, device: str = "cpu") -> None:
    """Refuse what nothing here can open, by what is known before it is opened.

    Raises:
        BackendUnavailable, UsageError: as :func:`open_artifact`, or it was made for another device.
    """
    _first(lambda candidate: candidate.require(artifact, device), artifact, runtime, device)


def _first(
    use: Callable[[Runtime], Used], artifact: Artifact, runtime: str | None, device: str
) -> Used:
    """What the first runtime gives that is here and takes the artifact."""
    able = runtimes.for_format(artifact.format)
    if runtime is not None:
        able = tuple(r for r in able if r.name == runtime)
    if not able:
        known = ", ".join(r.name for r in runtimes.for_format(artifact.format)) or "none"
        asked = f"no runtime called {runtime}" if runtime else "no runtime"
        raise UsageError(f"{asked} opens the format {artifact.format}", allowed=known)
    reasons = []
    for candidate in able:
        reason = candidate.unavailable(device)
        if reason is None:
            try:
                return use(candidate)
            except BackendUnavailable as error:
                if len(able) == 1:
                    raise
                reason = error.found
        reasons.append(f"{candidate.name}: {reason}")
    raise BackendUnavailable(
        f"{artifact.format} cannot be run on {device} here ({'; '.join(reasons)})",
        hint="modelport doctor",
    )
