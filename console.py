"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    from .artifacts import Artifact, ParitySummary
    from .errors import ModelportError
    from .spec import ModelSpec

MANY = 4
"""Tensors of one shape, one after the other, that are told in one line: those of a cache."""


@dataclass(slots=True)
class Output:
    """How the user wants to be told.

    Attributes:
        as_json: one JSON document on stdout instead of text.
        quiet: no progress and no notes; results and errors only.
        verbose: tracebacks, and every step on a line of its own.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    _told: bool = field(default=False, init=False, repr=False)

    def result(self, data: Any, view: RenderableType | Callable[[], RenderableType]) -> None:
        """Print a command's result: ``data`` as JSON, or ``view`` for a person."""
        if self.as_json:
            self._told = True
            print(json.dumps(data, indent=2, sort_keys=True, default=str))
            return
        _console(stderr=False).print(view() if callable(view) else view)

    def note(self, text: str) -> None:
        """A remark that matters, on stderr even without a terminal."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def aside(self, view: RenderableType) -> None:
        """Something to read beside the result, on stderr."""
        if not self.quiet:
            _console(stderr=True).print(view)

    def error(self, error: ModelportError) -> None:
        """Report an error where the reader of this run looks for it.

        After a result, which is the one document on stdout, it is told on stderr.
        """
        if self.as_json and not self._told:
            print(json.dumps({"error": error.record()}, indent=2, sort_keys=True))
            if self.quiet:
                return
        labels = ("error", "allowed", "try")
        for label, text in zip(labels, (error.found, error.allowed, error.hint), strict=True):
            if text:
                print(f"{label}: {text}", file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """A spinner on a terminal; step lines with ``-v``; nothing otherwise."""
        if self.verbose:
            yield lambda step: print(f"… {step}", file=sys.stderr, flush=True)
        elif self.quiet or not sys.stderr.isatty():
            yield lambda _: None
        else:
            with _console(stderr=True).status("starting") as status:
                yield lambda step: status.update(step)


def artifact_record(artifact: Artifact) -> dict[str, Any]:
    """A manifest as data, with what is derived from it."""
    from .artifacts.manifest import dumps

    manifest = artifact.manifest
    return {
        "root": str(artifact.root),
        "identity": manifest.identity,
        "proven": manifest.proven,
        "manifest": json.loads(dumps(manifest)),
    }


def artifact_view(artifact: Artifact) -> RenderableType:
    """An artifact for a person: what it is, where it came from, what is proven."""
    from rich.table import Table
    from rich.text import Text

    m = artifact.manifest
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(label: str, text: str) -> None:
        table.add_row(label, Text(text))  # as Text: a path or a shape is never markup

    weights: str = m.source.weights
    if weights == "random":
        weights = f"RANDOM (seed {m.source.seed}): not the published model"
    revision = f" @ {m.source.revision}" if m.source.revision else ""
    row("artifact", str(artifact.root))
    row("format", f"{m.format}  {_pairs(m.facts)}")
    row("source", f"{m.source.model}{revision}  ({m.source.task})")
    row("weights", f"{weights}  sha256 {m.source.digest[:12]}")
    for label, text in _contract(m.spec):
        row(label, text)
    for name, component in m.components.items():
        row("component", f"{name}  {component.file}  {_pairs(component.facts)}")
        for label, text in _contract(component.spec):
            row(f"  {label}", text)
    if m.target:
        row("tied to", _pairs(m.target))
    for name, entry in sorted(m.files.items()):
        row("file", f"{name}  {entry.size:,} bytes  sha256 {entry.sha256[:12]}")
    for attempt in m.attempts:
        reason = f": {attempt.reason}" if attempt.reason else ""
        row("attempt", f"{attempt.strategy} {attempt.outcome}{reason}")
    table.add_row("parity", _parity_line(artifact))
    return table


def _contract(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Inputs, outputs and dimensions, as a label and a text each."""
    for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        for (dtype, shape), alike in groupby(tensors, lambda t: (t.dtype, t.shape)):
            names = [t.name for t in alike]
            if len(names) >= MANY:
                names = [f"{names[0]} … {names[-1]}, {len(names)} of them"]
            for name in names:
                yield kind, f"{name}  {dtype}[{', '.join(map(str, shape))}]"
    for name, dim in spec.dims.items():
        yield "dimension", f"{name}  {dim.min} to {dim.max}, typically {dim.opt}"


def lineage_view(artifact: Artifact) -> RenderableType:
    """What an artifact was made from, the first export at the top, each with its verdict."""
    from rich.text import Text
    from rich.tree import Tree

    m = artifact.manifest
    root = Tree(Text(f"{m.source.model}  {m.source.task}  weights {m.source.digest[:12]}"))
    branch = root
    steps = [(a.made_by, a.identity, a.facts, a.parity) for a in m.lineage]
    current = m.parity if m.parity_is_current else None
    steps.append((str(m.facts.get("made_by", "export")), m.identity, m.facts, current))
    for made_by, identity, facts, parity in steps:
        verdict = "not validated itself" if parity is None else _verdict(parity)
        weights = ", ".join(f"{size:,} bytes {name}" for name, size in
                            sorted(facts.get("weight_bytes", {}).items(), key=lambda i: -i[1])[:2])
        head = f"{made_by}  {identity[:12]}"
        branch = branch.add(Text("\n".join((head, weights, verdict))))
    return root


def _verdict(parity: ParitySummary) -> str:
    gates = ", ".join(f"{name} {verdict}" for name, verdict in sorted(parity.gates.items()))
    rho = "" if parity.worst_rho is None else f", worst ρ {parity.worst_rho:.2f}"
    return f"{parity.verdict}{rho}\n({gates})"


def _parity_line(artifact: Artifact) -> str:
    parity = artifact.manifest.parity
    if parity is None:
        return "[bold red]not validated[/]"
    if not artifact.manifest.parity_is_current:
        return "[bold red]validated before the files were changed[/]"
    colour = {"pass": "green", "suspect": "yellow", "fail": "red"}[parity.verdict]
    rho = "" if parity.worst_rho is None else f", worst ρ {parity.worst_rho:.2f}"
    left_out = f", {parity.left_out} cases left out" if parity.left_out else ""
    return (
        f"[bold {colour}]{parity.verdict}[/]  {parity.comparisons:,} comparisons{rho}{left_out}"
    )


def _pairs(facts: Mapping[str, Any]) -> str:
    simple = {k: v for k, v in facts.items() if isinstance(v, str | int | float)}
    return "  ".join(f"{k} {v}" for k, v in simple.items())


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=not stderr, highlight=False)
