"""Measure how fast artifacts generate, beside their source in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, checkpoints, runtimes
from ..errors import ModelportError, PickleRefused, UnsafeError, UsageError
from ..runtimes import benchmark
from .opening import load_pipeline
from .request import ModelRequest, Notify
from .sources import spelled, told_apart

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..runtimes.benchmark import Contestant, GenerationReport, Shape
    from ..session import Session

EAGER = ("dynamic", "static", "compiled")
"""How the source is run; see :data:`~..runtimes.benchmark.generation.Mode`."""


@dataclass(frozen=True, slots=True)
class GenerationGrid:
    """What to measure.

    Attributes:
        shapes: every one is measured with every contestant.
        baseline: the source; None takes what the first artifact was made from, if it can be had.
        eager: among :data:`EAGER`; the first is what ratios are taken to. Empty: the source is
            not measured.
        options: rounds, threads, device, timeout: what the measurement itself takes.
    """

    shapes: tuple[Shape, ...]
    baseline: ModelRequest | None = None
    eager: tuple[str, ...] = EAGER
    options: Mapping[str, Any] = field(default_factory=dict)


def generates(root: Path) -> bool:
    """Whether a directory holds an artifact of several graphs."""
    try:
        return bool(artifacts.read(root).manifest.components)
    except ModelportError:
        return False


def bench_generation(
    roots: Sequence[Path],
    output: Path,
    grid: GenerationGrid,
    *,
    notify: Notify = lambda _: None,
) -> GenerationReport:
    """Measure prefill and decode of every artifact, and of its source as transformers runs it.

    Finished shapes are on disk at once; the same call again measures only what is missing. The
    report is kept in ``output`` and in each artifact.

    Raises:
        UsageError, UnsafeError: an artifact cannot be read, is one graph, or its files were
            changed.
    """
    measured = [artifacts.verify(root) for root in roots]
    if one := next((a for a in measured if not a.manifest.components), None):
        raise UsageError(f"{one.root} is one graph, which does not generate",
                         allowed="artifacts that generate, without others beside them",
                         hint=f"modelport bench {one.root}")
    if wrong := [mode for mode in grid.eager if mode not in EAGER]:
        raise UsageError(f"eager runs are not {', '.join(wrong)}", allowed=", ".join(EAGER))
    eager = _of_source(grid.baseline or ModelRequest.of(measured[0].manifest.source), grid.eager,
                       asked=grid.baseline is not None)
    request = benchmark.GenerationRequest(
        (*_of_artifacts(measured), *eager), grid.shapes, output,
        baseline=eager[0].name if eager else None, **grid.options)
    report: GenerationReport = benchmark.run_generation(request, notify)
    text = (output / benchmark.GENERATION).read_text(encoding="utf-8")
    for artifact in measured:
        artifacts.with_report(artifact, artifacts.BENCHMARK, text)
    return report


def open_generator(
    path: str, mode: str, *, device: str, options: Mapping[str, Any]
) -> tuple[Any, tuple[Session, ...]]:
    """What a measured process opens: an artifact on sessions, or the source in transformers.

    Args:
        path: an artifact's directory, or the fields of a :class:`ModelRequest` as JSON.
        mode: see :data:`~..runtimes.benchmark.generation.Mode`.
        options: of the runtime; the source takes none but ``threads``, which are torch's.

    Returns:
        The model, and the sessions that it runs on.
    """
    if mode == "sessions":
        known = _options(artifacts.read(Path(path)))
        taken = {name: value for name, value in options.items() if name in known}
        opened = load_pipeline(Path(path), device, **taken)
        return opened.model, tuple(opened.sessions.values())
    if unknown := sorted(set(options) - {"threads"}):
        raise UsageError(f"eager runs have no option {', '.join(unknown)}", allowed="none")
    checkpoint = ModelRequest(**json.loads(path)).resolve()
    return checkpoints.load_reference(checkpoint, attention="sdpa").module.to(device), ()


def _options(artifact: Artifact) -> set[str]:
    return {name for r in runtimes.for_format(artifact.format) for name in r.options}


def _of_artifacts(measured: Sequence[Artifact]) -> list[Contestant]:
    return [benchmark.Contestant(a.root.name, str(a.root.absolute()), a.manifest.identity,
                                 "sessions")
            for a in measured]


def _of_source(
    request: ModelRequest, modes: Sequence[str], *, asked: bool
) -> list[Contestant]:
    if not modes:
        return []
    try:
        checkpoint = request.resolve()
    except UnsafeError as error:  # to leave it out unasked would hide what nobody measured
        pickled = isinstance(error, PickleRefused)
        flag = "--allow-pickle" if pickled else "--trust-remote-code"
        if request.allow_pickle if pickled else request.trust_remote_code:
            raise  # it was given, and something else is missing
        raise type(error)(error.found, allowed=error.allowed,
                          hint=f"{flag}, or --eager none: without the source") from error
    except ModelportError:
        if asked:
            raise
        return []
    path, identity = spelled(checkpoint), told_apart(checkpoint)
    make: Callable[..., Contestant] = benchmark.Contestant
    return [make(f"eager, {mode}", path, identity, mode) for mode in modes]
