"""Name the first layer of an ONNX artifact whose output leaves the band, and write it down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np

from .. import artifacts, validate
from ..errors import UsageError
from ..runtimes import _onnx_taps, _torch_taps
from . import subjects
from .references import references
from .validating import Limits, planned

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint
    from ..session import Session
    from ..spec import ModelSpec
    from ..validate import Case, CaseRecord, ParityReport, Point, Probe
    from .references import Opener
    from .request import ModelRequest, Notify

CLEAR = replace(validate.Rule(), m=10.0, m_small=10.0, m_precision=10.0, m_max=30.0)
"""Looked for first: what is wrong beyond doubt. Inside a network, unlike at its outputs, a correct
value can have a few times the reference's error."""

HELD_BYTES = 1 << 30
"""Values of one side held in memory at once; beyond that they are asked for in several runs."""

TRIED = 6
"""Cases looked at before it is said that none fails."""


@dataclass(frozen=True, slots=True)
class Bisection:
    """What was found.

    Attributes:
        case: label of the case it was found in; empty if no case failed.
        layer: name of the first module (or node, or output) that is wrong; None if none is.
        kind: ``layer``: its value leaves the band; ``absent``: the graph computes nothing for it;
            ``node``: it raises; ``output``: all layers are right and an output is wrong;
            ``none``: nothing was found.
        reason: what is wrong there.
        before: the last layer that is right.
        chain: the probes around it, in order of computation.
        nodes: ``operator name`` of the graph's nodes between the last right values and it.
        absent: layers with weights that the graph computes nothing for.
        compared: points that both sides have.
        reproduction: the directory written, if one was.
        seconds: wall time.
    """

    case: str
    layer: str | None
    kind: Literal["layer", "absent", "node", "output", "none"]
    reason: str = ""
    before: str = ""
    chain: tuple[Probe, ...] = ()
    nodes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    compared: int = 0
    reproduction: str | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        """The whole record as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def view(self) -> RenderableType:
        """The chain as a table, the culprit marked, with what was written below."""
        return _view(self)


def bisect(
    path: Path,
    *,
    reference: ModelRequest | None = None,
    report: ParityReport | None = None,
    limits: Limits | None = None,
    device: str = "cpu",
    out: Path | None = None,
    notify: Notify = lambda _: None,
) -> Bisection:
    """Find the first layer at which an ONNX graph parts from its source.

    The source's modules are watched while they run, in the artifact's precision and in float64;
    the graph is asked for the last value it computes in each module's scope. The search takes the
    smallest failing case.

    Args:
        path: an ONNX artifact, or a bare ``.onnx`` file (then ``reference`` is needed).
        reference: None takes the source that the manifest names.
        report: what failed; None reads the artifact's own report, or tries cases.
        limits: under which it failed: texts and a user's own inputs are found again by them.
        out: directory for the minimal reproduction, which must not exist; None writes none.

    Raises:
        UsageError: the format holds no graph that can be asked for its values.
        DestinationExists: ``out`` is there already.
    """
    started = perf_counter()
    artifact, spec, checkpoint, file = _subject(path, reference, device)
    sides = references(artifact, spec, checkpoint, device)
    if report is None and artifact is not None and artifact.manifest.parity_is_current:
        report = validate.from_json((artifact.root / artifacts.PARITY).read_bytes())
    facts = artifact.manifest.facts if artifact else {}
    plan = planned(spec, facts, checkpoint.root, limits or Limits())
    tap = _onnx_taps.GraphTap(file, device)
    found = Bisection("", None, "none", "no case was found that fails")
    if problem := _form_problem(tap, spec):
        return replace(problem, seconds=perf_counter() - started)
    with _held(sides.reference, sides.truth) as (original, truth):
        for case in _cases(spec, report, plan.cases):
            notify(f"bisecting: {case.label}")
            feeds = validate.draw(spec, case)
            search = _Search(tap, spec, original, truth, feeds, case.label)
            found = search.found()
            if found.layer is not None:
                if out is not None:
                    notify("bisecting: writing the reproduction")
                    found = search.written(found, out)
                break
    return replace(found, seconds=perf_counter() - started)


def require_bisectable(path: Path) -> None:
    """Refuse what holds no graph that can be asked for its values, by what its manifest says.

    Raises:
        UsageError: the format is another, or there are several graphs.
    """
    if path.is_file():
        if path.suffix != ".onnx":
            raise UsageError(f"{path.name} holds no graph to look into", allowed="a .onnx file")
        return
    manifest = artifacts.read(path).manifest
    if manifest.format != "onnx":
        raise UsageError(f"a {manifest.format} artifact holds no graph to look into",
                         allowed="onnx", hint="export onnx from the same source and bisect that")
    if manifest.components:
        raise UsageError(f"{path} is several graphs, and one is looked into at a time",
                         allowed="an artifact of one graph",
                         hint="--task feature-extraction exports the bare model; bisect that")


def _subject(
    path: Path, reference: ModelRequest | None, device: str
) -> tuple[Artifact | None, ModelSpec, Checkpoint, Path]:
    if path.is_file():
        if reference is None:
            raise UsageError(f"{path} says nothing of its source", hint="--reference MODEL")
        require_bisectable(path)
        checkpoint = reference.resolve()
        return None, subjects.of_file(path, checkpoint, None, device).spec, checkpoint, path
    artifact = artifacts.verify(path)
    require_bisectable(path)
    checkpoint = (subjects.with_task(reference, artifact).resolve() if reference
                  else subjects.source_of(artifact))
    return artifact, artifact.spec, checkpoint, path / "model.onnx"


def _form_problem(tap: _onnx_taps.GraphTap, spec: ModelSpec) -> Bisection | None:
    """Outputs that are missing, unexpected, misplaced or of another dtype need no search."""
    found, wanted = tap.outputs, spec.output_names
    if found != wanted:
        wrong = [n for n in (*wanted, *found) if (n in wanted) != (n in found)]
        reason = f"the graph's outputs are {', '.join(found)}; allowed: {', '.join(wanted)}"
        return Bisection("", (wrong or found)[0], "output", reason)
    for tensor in spec.outputs:
        if tap.dtypes[tensor.name] != tensor.dtype:
            reason = f"dtype is {tap.dtypes[tensor.name]}; allowed: {tensor.dtype}"
            return Bisection("", tensor.name, "output", reason)
    return None


def _cases(
    spec: ModelSpec, report: ParityReport | None, cases: Sequence[Case]
) -> list[Case]:
    """Cases to try, unpadded and small ones first, of those that failed if that is known."""
    if report is not None and report.failures:
        failed = {r.case for r in report.failures}
        known = {case.label: case for case in cases}
        found = [known.get(record.label) or _as_case(spec, record)
                 for record in report.cases if record.label in failed]
        cases = [case for case in found if case is not None] or cases

    def cost(case: Case) -> tuple[bool, int, int]:
        size = prod(size for _, size in case.sizes)
        # One position hides too much: softmax over a single key is 1 whatever the scores.
        return case.padding == "masked", validate.PADDINGS.index(case.padding), abs(size - 51)

    ordered = sorted(cases, key=cost)
    # Each padding early on: a fault in the mask shows in none but padded cases.
    first = {case.padding: case for case in reversed(ordered)}
    chosen = [*sorted(first.values(), key=cost), *ordered]
    return list(dict.fromkeys(chosen))[:TRIED]


def _as_case(spec: ModelSpec, record: CaseRecord) -> Case | None:
    """A drawn case again; None for one that was given, whose arrays are in no report."""
    pairs = [part.split("=") for part in record.shape.split() if "=" in part]
    sizes = {name: int(size) for name, size in pairs}
    if record.origin != "matrix" or set(sizes) != set(spec.free):
        return None
    known = [p for p in validate.PADDINGS if p == record.padding]
    return validate.Case(tuple(sorted(sizes.items())), known[0], record.seed) if known else None


@dataclass
class _Search:
    """One case."""

    tap: _onnx_taps.GraphTap
    spec: ModelSpec
    reference: Session
    truth: Session
    feeds: Mapping[str, np.ndarray]
    label: str
    calls: tuple[_torch_taps.Call, ...] = ()
    culprit: validate.Culprit | None = None
    stops: tuple[str, ...] = ()

    def found(self) -> Bisection:
        """Search; a node that raises bounds what can be compared."""
        self.calls = _torch_taps.record(lambda: self.reference.run(self.feeds), ()).calls
        points, at_once = self._points()
        crash: _onnx_taps.NodeFailedError | None = None
        culprit: validate.Culprit | None = None
        while points:
            try:
                culprit = self._first(points, at_once)
                break
            except _onnx_taps.NodeFailedError as error:
                crash = error
                end = self.tap.place_of_node(error.node)
                fewer = [p for p in points if self.tap.place(p.candidate) < end]
                # A node that the runtime made up (a fusion) bounds nothing: halve instead.
                points = fewer if len(fewer) < len(points) else points[: len(points) // 2]
        self.culprit = culprit
        if culprit is None:
            return self._crashed(crash, points)
        return self._named(culprit, points)

    def _first(self, points: Sequence[Point], at_once: int) -> validate.Culprit | None:
        """What is wrong beyond doubt, else what is suspect."""
        sides = self._candidate, self._side(self.reference), self._side(self.truth)
        for rule in (CLEAR, validate.Rule()):
            if found := validate.find_first(points, *sides, rule=rule, at_once=at_once):
                return found
        return None

    def _candidate(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        values = self.tap.run(self.feeds, names)
        return {name: self._kept(value) for name, value in values.items()}

    def _points(self) -> tuple[list[Point], int]:
        """Values that both sides compute, in the graph's order, and how many fit in memory."""
        scopes = self.tap.scopes()
        pairs = [(scopes[c.scope], i, c) for i, c in enumerate(self.calls)
                 if c.scope and c.scope in scopes and not c.several]
        pairs.sort(key=lambda pair: (self.tap.place(pair[0]), pair[1]))
        points = [validate.Point(_name(c.scope), value, c.scope) for value, _, c in pairs]
        points = self._with_entries(points)
        points += [validate.Point(t.name, t.name, f"output {t.name}") for t in self.spec.outputs
                   if t.name in self.tap.outputs]
        largest = max((prod(c.shape) for c in self.calls), default=1) * 8
        return points, max(1, HELD_BYTES // largest)

    def _with_entries(self, points: list[Point]) -> list[Point]:
        """Add what innermost modules are given.

        What a module computes between the modules inside it shows there first, and so does a
        module that reads the wrong one of two right values.
        """
        entries = self.tap.entries()
        inner = [c.scope for c in self.calls if c.given and c.scope in entries
                 and not any(o.scope.startswith(f"{c.scope}/") for o in self.calls)]
        for scope in inner:
            outer, _, leaf = scope.rpartition("/")
            name = f"{_name(outer) or 'the model'}, before {leaf}"
            points.append(validate.Point(name, entries[scope], scope + _torch_taps.INPUT))
        return sorted(points, key=lambda p: self.tap.place(p.candidate))

    def _side(self, session: Session) -> validate.Tap:
        def tap(names: Sequence[str]) -> dict[str, np.ndarray]:
            outputs: dict[str, np.ndarray] = {}
            values = dict(_torch_taps.record(lambda: outputs.update(session.run(self.feeds)),
                                             set(names)).values)
            values |= {f"output {name}": value for name, value in outputs.items()}
            return {name: self._kept(values[name]) for name in names}

        return tap

    def _kept(self, value: np.ndarray) -> np.ndarray:
        """What is content: rows and positions that are masked hold whatever they like."""
        masks = [self.feeds[t.name].astype(bool) for t in self.spec.inputs if t.role == "mask"]
        for mask in masks:
            if mask.all() or mask.ndim != 2:
                continue
            if value.ndim >= 3 and value.shape[:2] == mask.shape:
                return np.asarray(value[mask])
            if value.ndim and value.shape[0] == mask.shape[0]:
                return np.asarray(value[mask.any(axis=1)])
        return value

    def _named(self, culprit: validate.Culprit, points: Sequence[Point]) -> Bisection:
        point = culprit.probe.point
        place = self.tap.place(point.candidate)
        before = [p for p in points if self.tap.place(p.candidate) < place]
        self.stops = tuple(p.candidate for p in before)
        nodes = self.tap.nodes_between(point.candidate, self.stops)
        absent = self._absent()
        kind: Literal["layer", "absent", "output"] = (
            "output" if point.reference.startswith("output ") else "layer")
        layer, reason = culprit.name.partition(", before ")[0], culprit.probe.reason
        missing = self._absent_before(culprit, absent)
        if missing:
            kind, layer = "absent", missing
            reason = f"the graph computes nothing for it; {culprit.name}: {reason}"
        return Bisection(self.label, layer, kind, reason, culprit.before, culprit.chain, nodes,
                         absent, len(points))

    def _absent(self) -> tuple[str, ...]:
        """Layers with weights that have no live value in the graph; inner ones left out."""
        scopes = self.tap.scopes()
        if not any(c.scope in scopes for c in self.calls if c.scope):
            return ()
        missing = [c.scope for c in self.calls if c.weighty and c.scope and c.scope not in scopes]
        outer = [s for s in missing if not any(s.startswith(f"{o}/") for o in missing)]
        return tuple(_name(s) for s in outer)

    def _absent_before(self, culprit: validate.Culprit, absent: Sequence[str]) -> str:
        """The first layer without a value that ran between the last right one and the culprit."""
        begun = {_name(c.scope): c.start for c in self.calls}
        ended = {_name(c.scope): i for i, c in enumerate(self.calls)}
        scope = culprit.probe.point.reference.removesuffix(_torch_taps.INPUT)
        end = ended.get(_name(scope), len(self.calls))
        start = max((i for name, i in ended.items() if name == culprit.before), default=-1)
        between = [name for name in absent if start < ended[name] <= end]
        return min(between, key=lambda name: begun[name], default="")

    def _crashed(
        self, crash: _onnx_taps.NodeFailedError | None, points: Sequence[Point]
    ) -> Bisection:
        """The first node that raises although all it reads can be computed."""
        if crash is None:
            reason = "every layer and output is within the band in the cases that were tried"
            return Bisection(self.label, None, "none", reason, compared=len(points))
        seen: set[str] = set()
        while self.tap.has_node(crash.node) and crash.node not in seen:
            seen.add(crash.node)
            try:
                self._read_by(crash.node)
                break
            except _onnx_taps.NodeFailedError as earlier:
                crash = earlier
        index = self.tap.place_of_node(crash.node)
        before = [p for p in points if self.tap.place(p.candidate) < index]
        return Bisection(self.label, crash.node or "the graph", "node", str(crash),
                         before[-1].name if before else "", nodes=(crash.node,),
                         absent=self._absent(), compared=len(points))

    def _read_by(self, node: str) -> dict[str, np.ndarray]:
        """What a node reads, weights left out."""
        index = self.tap.place_of_node(node)
        return self._values(self.tap.inputs_of(index))

    def _values(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        found = self.tap.run(self.feeds, [n for n in names if n not in self.feeds])
        return {n: found[n] if n in found else self.feeds[n] for n in names}

    def written(self, found: Bisection, out: Path) -> Bisection:
        """Write the part of the graph between the last right values and the culprit."""
        if self.culprit is None:
            return self._written_crash(found, out)
        point = self.culprit.probe.point
        inputs = self._values(self.tap.boundary(point.candidate, self.stops))
        content = validate.Reproduction(
            self.tap.cut(point.candidate, inputs), "cut.onnx", inputs,
            self._values([point.candidate])[point.candidate], self._expected(point.reference))
        validate.write_reproduction(out, self.culprit, content)
        return replace(found, reproduction=str(out))

    def _written_crash(self, found: Bisection, out: Path) -> Bisection:
        """The node alone with what it read; there are no outputs to show."""
        name = found.layer or ""
        if found.nodes != (name,) or not self.tap.has_node(name):
            return found
        index = self.tap.place_of_node(name)
        inputs = self._read_by(name)
        output = self.tap.output_of(index)
        probe = validate.Probe(validate.Point(name, output, ""), False, reason=found.reason)
        nothing = np.zeros(0, np.float32)
        content = validate.Reproduction(self.tap.cut(output, inputs), "cut.onnx", inputs,
                                        nothing, nothing)
        culprit = validate.Culprit(probe, found.before, (probe,), found.compared)
        validate.write_reproduction(out, culprit, content)
        return replace(found, reproduction=str(out))

    def _expected(self, name: str) -> np.ndarray:
        outputs: dict[str, np.ndarray] = {}
        values = _torch_taps.record(lambda: outputs.update(self.reference.run(self.feeds)),
                                    {name}).values
        return values[name] if name in values else outputs[name.removeprefix("output ")]


class _held:  # noqa: N801 - reads as the function it stands for
    """Two sessions, open for as long as the block lasts."""

    def __init__(self, *openers: Opener) -> None:
        self._openers = openers
        self._open: list[Session] = []

    def __enter__(self) -> list[Session]:
        self._open = [opener() for opener in self._openers]
        return self._open

    def __exit__(self, *_: object) -> None:
        for session in self._open:
            session.close()


def _name(scope: str) -> str:
    """A scope as the name of a module in the user's model."""
    return scope.replace("/", ".").removeprefix(".model").removeprefix(".")


def _view(found: Bisection) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if found.layer is None:
        return Text(found.reason)
    head = Text(f"first wrong: {found.layer}", style="bold red")
    lines = [head, Text(found.reason), Text(f"in {found.case}", style="dim")]
    table = Table(box=None, pad_edge=False)
    for title in ("", "layer", "ρ", "error / allowed"):
        table.add_column(title, justify="left" if title in ("", "layer") else "right")
    for probe in found.chain:
        table.add_row(
            Text("ok", style="green") if probe.inside else Text("FAIL", style="red"),
            probe.point.name,
            *("–" if v is None else f"{v:.3g}" for v in (probe.rho, probe.excess)))
    shown = found.nodes[-12:]
    nodes = [Text(f"  {node}", style="dim") for node in shown]
    if nodes:
        more = f", the last {len(shown)}" if len(found.nodes) > len(shown) else ""
        nodes.insert(0, Text(f"{len(found.nodes)} nodes compute it{more}:"))
    where = [Text(f"reproduction: {found.reproduction}")] if found.reproduction else []
    return Group(*lines, *([table] if found.chain else []), *nodes, *where)
