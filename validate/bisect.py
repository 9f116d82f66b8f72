"""Finding the first intermediate value that leaves the band, and writing it down to be rerun.

How values are obtained is not known here: a tap runs a model and returns the values it is asked
for (module hooks on the one side, extra graph outputs on the other).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import DestinationExists, UsageError
from .compare import error_stats, is_float, nonfinite_differences, unit_roundoff
from .rule import Decision, Rule, decide

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .inputs import Feeds


class Tap(Protocol):
    """Runs one side on the failing case's inputs and returns intermediate values by name."""

    def __call__(self, names: Sequence[str], /) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class Point:
    """A value that both sides compute.

    Attributes:
        name: for people: the layer's or node's name.
        candidate: its name in the candidate.
        reference: its name in reference and truth.
    """

    name: str
    candidate: str
    reference: str


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found at one point.

    Attributes:
        inside: whether the error is within the band.
        rho, excess: see :class:`~.rule.Decision`; None without numbers.
        reason: why it is outside, or why it could not be compared (then ``inside`` is True, since
            nothing is known against it).
    """

    point: Point
    inside: bool
    rho: float | None = None
    excess: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first point outside the band.

    Attributes:
        probe: what was found there.
        before: name of the last point before it that is inside; empty for the very first.
        chain: the probes around it, in order of computation.
        runs: how many points were looked at.
    """

    probe: Probe
    before: str
    chain: tuple[Probe, ...]
    runs: int

    @property
    def name(self) -> str:
        """Layer or node that first went wrong."""
        return self.probe.point.name


def find_first(
    points: Sequence[Point],
    candidate: Tap,
    reference: Tap,
    truth: Tap | None,
    *,
    rule: Rule | None = None,
    at_once: int = 0,
    around: int = 3,
) -> Culprit | None:
    """The first of ``points`` at which the candidate leaves the band; None if none does.

    Looking at everything in one run is cheapest where values fit in memory. Otherwise at most
    ``at_once`` values are asked for in one run and the place is found by binary search, which
    takes log2 of the number of points and relies on an error, once made, not vanishing; the answer
    is then a point that is outside while the one before it is inside.

    Args:
        points: in order of computation.
        truth: None compares with the reference under a fixed allowance.
        at_once: values per run; 0 for all.
        around: points to show on each side of the culprit.

    Raises:
        UsageError: a tap does not return a value it was asked for.
    """
    search = _Search(points, candidate, reference, truth, rule or Rule())
    if not points:
        return None
    if at_once <= 0 or at_once >= len(points):
        search.look(range(len(points)))
    elif not search.narrow(at_once):
        return None
    first = search.first()
    if first is None:
        return None
    low, high = max(0, first - around), min(len(points), first + around + 1)
    search.look(range(low, high), at_once)
    # Filling in the chain can show an earlier one outside, where an error did vanish in between.
    first = search.first()
    assert first is not None
    chain = tuple(search.found[i] for i in range(low, high) if i in search.found)
    inside = [i for i in sorted(search.found) if i < first and search.found[i].inside]
    return Culprit(search.found[first], points[inside[-1]].name if inside else "", chain,
                   len(search.found))


class _Search:
    def __init__(
        self,
        points: Sequence[Point],
        candidate: Tap,
        reference: Tap,
        truth: Tap | None,
        rule: Rule,
    ) -> None:
        self.found: dict[int, Probe] = {}
        self._points = points
        self._candidate = candidate
        self._reference = reference
        self._truth = truth
        self._rule = rule

    def first(self) -> int | None:
        """Index of the first point known to be outside."""
        return min((i for i, probe in self.found.items() if not probe.inside), default=None)

    def narrow(self, at_once: int) -> bool:
        """Look until the point before the first outside one is known to be inside."""
        low, high = -1, len(self._points)  # low is inside, high outside or past the end
        while high - low > 1:
            count = min(at_once, high - low - 1)
            places = sorted({low + (high - low) * (k + 1) // (count + 1) for k in range(count)})
            places = [i for i in places if low < i < high] or [low + 1]
            self.look(places)
            outside = [i for i in places if not self.found[i].inside]
            if outside:
                high = outside[0]
            low = max([low, *(i for i in places if i < high)])
        return high < len(self._points)

    def look(self, places: Sequence[int] | range, at_once: int = 0) -> None:
        """Probe the points not yet known, ``at_once`` of them in a run."""
        missing = [i for i in places if i not in self.found]
        step = at_once or len(missing) or 1
        for start in range(0, len(missing), step):
            chosen = missing[start : start + step]
            points = [self._points[i] for i in chosen]
            actual = _taken(self._candidate, [p.candidate for p in points])
            names = [p.reference for p in points]
            expected = _taken(self._reference, names)
            exact = None if self._truth is None else _taken(self._truth, names)
            for i, point in zip(chosen, points, strict=True):
                self.found[i] = compare_point(
                    point, actual[point.candidate], expected[point.reference],
                    None if exact is None else exact[point.reference], self._rule)


def compare_point(
    point: Point,
    candidate: np.ndarray,
    reference: np.ndarray,
    truth: np.ndarray | None,
    rule: Rule,
) -> Probe:
    """Judge one intermediate value; shapes that differ only by axes of size 1 are matched."""
    if candidate.size == reference.size and _squeezed(candidate) == _squeezed(reference):
        candidate = candidate.reshape(reference.shape)
    if candidate.shape != reference.shape or (truth is not None and truth.shape != reference.shape):
        return Probe(point, True, reason=f"not compared: shapes {list(candidate.shape)} and "
                                         f"{list(reference.shape)}")
    if not is_float(candidate.dtype):
        wrong = int(np.count_nonzero(candidate != reference))
        return Probe(point, not wrong, reason=f"{wrong} values differ" if wrong else "")
    if count := nonfinite_differences(candidate, reference):
        return Probe(point, False, reason=f"non-finite values differ at {count} positions")
    keep = np.isfinite(reference) if not np.isfinite(reference).all() else None
    target = reference if truth is None else truth
    noise = None if truth is None else error_stats(reference, truth, keep)
    error = error_stats(candidate, target, keep)
    if not error.elements:
        return Probe(point, True, reason="not compared: no finite values")
    decision = decide(rule, error, noise, unit_roundoff(str(candidate.dtype)))
    return Probe(point, decision.verdict == "pass", decision.rho, decision.excess,
                 _outside(decision))


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What a minimal reproduction holds.

    Attributes:
        graph: bytes of the graph cut at the culprit, empty if there is none.
        graph_name: its file name, ``cut.onnx``.
        inputs: the feeds of the failing case.
        candidate, reference: the culprit's value on both sides.
    """

    graph: bytes
    graph_name: str
    inputs: Feeds
    candidate: np.ndarray
    reference: np.ndarray


def write_reproduction(directory: Path, culprit: Culprit, content: Reproduction) -> Path:
    """Write a directory that shows the difference: ``python reproduce.py`` in it, NumPy only.

    Holds ``culprit.json`` (the chain, and the names of the numbered arrays), ``inputs.npz``,
    ``outputs.npz``, the cut graph, and the script, which also runs the graph where onnxruntime is
    installed.

    Raises:
        DestinationExists: the directory is there already.
        UsageError: the graph's name is not a plain file name.
    """
    if directory.exists():
        raise DestinationExists(f"{directory} exists", hint="remove it, or give another directory")
    if Path(content.graph_name).name != content.graph_name:
        raise UsageError(f"{content.graph_name} is not a plain file name", allowed="cut.onnx")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        _write_files(staging, culprit, content)
        staging.chmod(0o755)
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return directory


def _write_files(root: Path, culprit: Culprit, content: Reproduction) -> None:
    # Graph names hold slashes and dots, so members of the archives are numbered.
    names = list(content.inputs)
    numbered = {str(i): content.inputs[name] for i, name in enumerate(names)}
    np.savez(root / "inputs.npz", **numbered)  # type: ignore[arg-type]
    np.savez(root / "outputs.npz", candidate=_plain(content.candidate),
             reference=_plain(content.reference))
    if content.graph:
        (root / content.graph_name).write_bytes(content.graph)
    record = {"culprit": asdict(culprit), "inputs": names,
              "graph": content.graph_name if content.graph else None}
    (root / "culprit.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (root / "reproduce.py").write_text(_SCRIPT, encoding="utf-8")


def _taken(tap: Tap, names: Sequence[str]) -> dict[str, np.ndarray]:
    found = tap(names)
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"a tap returned no value for {missing[0]}",
                         allowed="every name it is asked for")
    return {name: np.asarray(found[name]) for name in names}


def _squeezed(value: np.ndarray) -> tuple[int, ...]:
    return tuple(size for size in value.shape if size != 1)


def _outside(decision: Decision) -> str:
    if decision.verdict == "pass":
        return ""
    if decision.excess is None:
        return "the error is not finite, or where the reference has none"
    return f"error {decision.excess:.3g} times what is allowed"


def _plain(value: np.ndarray) -> np.ndarray:
    """NumPy's own dtypes only, so that the script needs nothing else."""
    return value.astype(np.float32) if str(value.dtype) == "bfloat16" else value


_SCRIPT = '''"""Shows where two runs part, with NumPy and, for the graph, onnxruntime."""

import json
from pathlib import Path

import numpy as np

here = Path(__file__).parent
record = json.loads((here / "culprit.json").read_text(encoding="utf-8"))
for probe in record["culprit"]["chain"]:
    mark = "ok  " if probe["inside"] else "FAIL"
    print(mark, probe["point"]["name"], "rho", probe["rho"], probe["reason"])


def compare(name, value, reference):
    error = np.abs(value.astype(np.float64) - reference.astype(np.float64))
    print(f"{name}: largest error {np.max(error, initial=0.0):.6g} at index",
          [int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape)])


outputs = np.load(here / "outputs.npz", allow_pickle=False)
reference = outputs["reference"]
if reference.size:  # none where the graph raised
    compare("stored candidate", outputs["candidate"].reshape(reference.shape), reference)
if record["graph"]:
    try:
        import onnxruntime
    except ImportError:
        print("onnxruntime is not installed: the cut graph was not run")
    else:
        inputs = np.load(here / "inputs.npz", allow_pickle=False)
        feeds = {name: inputs[str(i)] for i, name in enumerate(record["inputs"])}
        session = onnxruntime.InferenceSession(str(here / record["graph"]),
                                               providers=["CPUExecutionProvider"])
        wanted = record["culprit"]["probe"]["point"]["candidate"]
        used = {i.name for i in session.get_inputs()}
        (value,) = session.run([wanted], {n: v for n, v in feeds.items() if n in used})
        if reference.size:
            compare("cut graph run now", value.reshape(reference.shape), reference)
'''
