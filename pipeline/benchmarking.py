"""Measure artifacts side by side with their source, and keep the evidence with them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from .. import artifacts, checkpoints, runtimes
from ..artifacts.digest import digests
from ..checkpoints import standins
from ..errors import ModelportError, UsageError
from ..runtimes import benchmark
from ..spec import ModelSpec, terms
from .opening import open_artifact
from .request import ModelRequest, Notify
from .sources import spelled, told_apart

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, Source
    from ..runtimes.benchmark import Cell, CorpusSource, RunReport, Subject, Work
    from ..session import Session

EAGER = "torch_eager"
"""Runs the source as it was published."""
DEFAULT_RUNTIMES = ("onnxruntime", "torchscript", "aotinductor", "tensorrt", EAGER)
"""What is measured unless ``--runtimes`` says otherwise; the rest is for comparison."""

_SIZES = {"batches": ("batch", "--batch-sizes"), "corpus_batches": ("batch", "--batch-sizes"),
          "sequences": ("sequence", "--seq-lens")}


@dataclass(frozen=True, slots=True)
class Entrant:
    """A runtime with options, as :class:`Grid` spells it.

    Attributes:
        text: how it was spelled; names the column where there are options.
    """

    text: str
    runtime: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, text: str) -> Entrant:
        """Read ``name:option=value:…``.

        Raises:
            UsageError: there is no such runtime or option.
        """
        name, *pairs = text.split(":")
        options = {key: _value(value) for key, _, value in (p.partition("=") for p in pairs)}
        known = runtimes.get(name)
        asked = {k: v for k, v in options.items()
                 if k != "dtype" or runtimes.CHECKPOINT not in known.formats}
        known.resolve_options(asked)
        return cls(text, name, options)

    def name(self, subject: str, *, alone: bool) -> str:
        """The column's name: the subject's where nothing else could be meant."""
        return subject if alone and not self.options else f"{subject}/{self.text}"


def _value(text: str) -> Any:
    """A number, ``true`` or ``false``, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True, slots=True)
class Grid:
    """What to measure, as the command line says it.

    Attributes:
        baseline: model that the artifacts are compared with, run by the runtimes of a checkpoint;
            None compares with the first artifact.
        runtimes: names, each with options of its own where wanted
            (``openvino:precision=bf16``; ``dtype`` too for a runtime of the source); one that is
            absent here becomes an empty column with its reason.
        usual: axes (``batch``, ``sequence``) whose sizes nobody named: those that a model does
            not take are left out, where others would be refused.
        corpus: text file, one sentence a line; None is the built-in one.
        sweep: everything that the sweep itself takes; ``subjects`` and ``corpus`` are filled in.
    """

    baseline: ModelRequest | None = None
    runtimes: tuple[str, ...] = DEFAULT_RUNTIMES
    usual: tuple[str, ...] = ()
    corpus: Path | None = None
    sweep: Mapping[str, Any] = field(default_factory=dict)


def bench(
    roots: Sequence[Path], output: Path, grid: Grid, *, notify: Notify = lambda _: None
) -> RunReport:
    """Measure every artifact with every runtime that opens it.

    Finished cells are on disk at once; the same call again measures only what is missing. The
    report is kept in ``output`` and, where an artifact was measured, in the artifact.

    Args:
        roots: artifacts, verified before anything runs; or bare model files that somebody else
            made, which are held to the contract of the first artifact, or else of the baseline.

    Raises:
        UsageError, UnsafeError: an artifact cannot be read, its files were changed, it generates,
            or it does not take the sizes that were named.
    """
    files = [root for root in roots if root.is_file()]
    measured = [artifacts.verify(root) for root in roots if not root.is_file()]
    if several := next((a for a in measured if a.manifest.components), None):
        raise UsageError(f"{several.root} generates, which is measured in other ways",
                         allowed="artifacts of one graph, without others beside them",
                         hint=f"modelport bench {several.root}")
    source = _baseline(grid, measured)
    contract = _contract(files, source, measured)
    contracts = {str(a.root): a.spec for a in measured} or {str(files[0]): contract}
    wanted = [Entrant.of(text) for text in grid.runtimes]
    subjects = [
        *_of_artifacts(measured, wanted),
        *_of_files(files, contract, wanted),
        *_of_baseline(source, wanted),
    ]
    options = _fitting(grid, contracts)
    if grid.corpus is not None:
        homes = [a.root for a in measured] + ([source.root] if source else [])
        options["corpus"] = _corpus(grid.corpus, homes, contract)
    request = benchmark.SweepRequest(
        tuple(subjects),
        output,
        baseline=next((s.name for s in subjects
                       if s.parity == benchmark.SOURCE and s.runtime == EAGER), None),
        work=_work(subjects, measured, source),
        **options,
    )
    report: RunReport = benchmark.run_sweep(
        request, lambda result, done, total: notify(f"{done}/{total} {result.cell.label()}")
    )
    text = (output / artifacts.BENCHMARK).read_text(encoding="utf-8")
    for artifact in measured:
        artifacts.with_report(artifact, artifacts.BENCHMARK, text)
    return report


def takes_sequence(root: Path) -> bool:
    """Whether what an artifact takes has a sequence, as images have not; True where it is none."""
    try:
        return "sequence" in benchmark.ranges(artifacts.read(root).spec)
    except ModelportError:
        return True


def open_path(
    path_or_model: str,
    *,
    runtime: str | None,
    device: str,
    options: Mapping[str, Any],
) -> Session:
    """What a measured process opens: an artifact's directory, or what :func:`bench` spells as a
    JSON object: a source (fields of :class:`ModelRequest`, and ``dtype``), or a bare file with its
    ``spec``."""
    if not path_or_model.startswith("{"):
        return open_artifact(
            Path(path_or_model), runtime=runtime, device=device, options=options
        )[1]
    fields = json.loads(path_or_model)
    if "file" in fields:
        spec: ModelSpec = TypeAdapter(ModelSpec).validate_python(fields["spec"])
        opened = runtimes.get(str(runtime))
        return opened.open_file(Path(fields["file"]), spec, device, options)
    dtype = fields.pop("dtype", "float32")
    model = checkpoints.load_reference(
        ModelRequest(**fields).resolve(), dtype=dtype, attention="sdpa"
    )
    chosen = runtimes.get(runtime or EAGER)
    return chosen.open(model, device, options)


def _baseline(grid: Grid, measured: Sequence[Artifact]) -> Checkpoint | None:
    if grid.baseline is None:
        return None
    request = grid.baseline
    if request.task is None and measured:
        request = replace(request, task=measured[0].manifest.source.task)
    return request.resolve()


def _fitting(grid: Grid, contracts: Mapping[str, ModelSpec]) -> dict[str, Any]:
    """The sweep with sizes that every model takes.

    Raises:
        UsageError: a size that was named does not fit, or there is no sequence to have one.
    """
    options: dict[str, Any] = {
        f.name: f.default for f in fields(benchmark.SweepRequest)
        if f.name in (*_SIZES, "batchings", "traffic")}
    options |= grid.sweep
    corpus = bool(options["batchings"] or options["traffic"])
    taken = {name: benchmark.ranges(spec) for name, spec in contracts.items()}
    still = [name for name, found in taken.items() if "sequence" not in found]
    if still:
        _require_still(grid, options, still, len(taken))
        options["sequences"] = (0,) if options["batches"] else ()
    for key, (axis, flag) in _SIZES.items():
        named = key in grid.sweep and axis not in grid.usual and (corpus or key != "corpus_batches")
        for name, found in taken.items():
            if axis not in found or (axis == "sequence" and still):
                continue
            least, most = found[axis]
            fits = tuple(size for size in options[key] if least <= size <= most)
            if named and len(fits) < len(options[key]):
                wrong = ", ".join(str(s) for s in options[key] if s not in fits)
                raise UsageError(f"{name} does not take a {axis} of {wrong}",
                                 allowed=f"{least} to {most}", hint=f"{flag} within that")
            options[key] = fits or ((most,) if options[key] else ())
    return options


def _require_still(
    grid: Grid, options: Mapping[str, Any], still: Sequence[str], count: int
) -> None:
    """Models without a sequence are measured by batch size, and by themselves."""
    if len(still) < count:
        raise UsageError(f"{', '.join(still)} takes no sequence, and others do",
                         allowed="artifacts of models of one kind")
    asked = [flag for flag, key in (("--seq-lens", "sequences"), ("--batching", "batchings"),
                                    ("--scenario", "traffic"))
             if options[key] and not (key == "sequences" and "sequence" in grid.usual)]
    if grid.corpus is not None:
        asked = ["--corpus", *(flag for flag in asked if flag != "--batching")]
    if asked:
        raise UsageError(f"{still[0]} takes no sequence and no sentences",
                         hint=f"leave {' and '.join(asked)} out")


def _of_artifacts(measured: Sequence[Artifact], wanted: Sequence[Entrant]) -> list[Subject]:
    found = []
    for artifact in measured:
        manifest = artifact.manifest
        known = {r.name for r in runtimes.for_format(artifact.format)}
        able = [entrant for entrant in wanted if entrant.runtime in known]
        _require(able, artifact.root, known, wanted)
        for entrant in able:
            parity = manifest.parity.verdict if manifest.parity_is_current and manifest.parity \
                else "not validated"
            found.append(
                benchmark.Subject(
                    name=entrant.name(artifact.root.name, alone=len(able) == 1),
                    path=str(artifact.root.absolute()),
                    identity=manifest.identity,
                    runtime=entrant.runtime,
                    dtype=_dtype(entrant, str(manifest.facts.get("precision") or "float32")),
                    options=entrant.options,
                    parity=parity,
                    weight_bytes=sum(manifest.facts.get("weight_bytes", {}).values())
                    or sum(entry.size for entry in manifest.files.values()),
                )
            )
    return found


def _require(
    able: Sequence[Entrant], root: Path, known: Collection[str], wanted: Sequence[Entrant]
) -> None:
    """What was named is measured, or it is said at once why not."""
    if not able:
        raise UsageError(
            f"none of the runtimes {', '.join(e.text for e in wanted)} opens {root}",
            allowed=", ".join(sorted(known)) or "files of a runtime's own format")


def _contract(
    files: Sequence[Path], source: Checkpoint | None, measured: Sequence[Artifact]
) -> ModelSpec:
    """What goes in and out, as the first artifact says, or else the baseline."""
    if measured:
        return measured[0].spec
    if source is None:
        raise UsageError(
            f"{files[0]} does not say what goes in and out",
            hint="name the model it was made from: --baseline MODEL",
        )
    return checkpoints.load(source).spec


def _of_files(
    files: Sequence[Path], spec: ModelSpec, wanted: Sequence[Entrant]
) -> list[Subject]:
    found = []
    for file in files:
        known = {name for name in runtimes.names() if file.suffix in runtimes.get(name).suffixes}
        able = [entrant for entrant in wanted if entrant.runtime in known]
        _require(able, file, known, wanted)
        content = {"file": str(file.absolute()), "spec": to_jsonable_python(spec)}
        identity = _digest(file, content["spec"])
        for entrant in able:
            name = f"{file.parent.name}/{file.name}"
            found.append(
                benchmark.Subject(
                    name=entrant.name(name, alone=len(able) == 1),
                    path=json.dumps(content, sort_keys=True),
                    identity=identity,
                    runtime=entrant.runtime,
                    dtype=_dtype(entrant, "float32"),
                    options=entrant.options,
                    parity="not validated",
                    weight_bytes=sum(part.stat().st_size for part in _beside(file)),
                )
            )
    return found


def _beside(file: Path) -> list[Path]:
    """A bare model, and the files that may hold its weights."""
    return sorted(p for p in file.parent.iterdir()
                  if p.is_file() and p.name.startswith(file.stem))


def _digest(file: Path, spec: Any) -> str:
    """Of a bare model, of the files beside it that may hold its weights, and of its contract."""
    found = "".join(entry.sha256 for entry in digests(_beside(file)).values())
    found += json.dumps(spec, sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()


def _of_baseline(source: Checkpoint | None, wanted: Sequence[Entrant]) -> list[Subject]:
    if source is None:
        return []
    known = {r.name for r in runtimes.for_format(runtimes.CHECKPOINT)}
    able = [entrant for entrant in wanted if entrant.runtime in known]
    if not any(e.runtime == EAGER and _computed_in(e) == "float32" for e in able):
        # The others are compared with the model as it was published, whatever else is measured.
        able.append(Entrant.of(EAGER))
    found = []
    for entrant in able:
        dtype = _computed_in(entrant)
        found.append(
            benchmark.Subject(
                name=entrant.name(Path(source.origin.model).name, alone=False),
                path=spelled(source, dtype=dtype),
                identity=told_apart(source),
                runtime=entrant.runtime,
                dtype=dtype,
                options={k: v for k, v in entrant.options.items() if k != "dtype"},
                parity=benchmark.SOURCE if dtype == "float32" else "not validated",
                weight_bytes=sum(t.nbytes for t in source.tensors.values()),
            )
        )
    return found


def _computed_in(entrant: Entrant) -> str:
    """The dtype that a runtime of the source was asked for."""
    return str(entrant.options.get("dtype", "float32"))


def _dtype(entrant: Entrant, stated: str) -> str:
    """What the arithmetic is done in: the runtime's option for it has the last word."""
    named = {"bf16": "bfloat16", "fp32": "float32"}
    return named.get(str(entrant.options.get("precision")), stated)


def _corpus(path: Path, roots: Sequence[Path], spec: ModelSpec) -> CorpusSource:
    able = next((root for root in roots if checkpoints.has_tokenizer(root)), None)
    if able is None:
        raise UsageError(
            f"none of {', '.join(map(str, roots))} has a tokenizer to read {path} with",
            hint="leave --corpus out: the built-in one has lengths and needs no text",
        )
    tokenizer = checkpoints.tokenizer(able)
    longest = spec.dims["sequence"].max

    def encode(texts: Sequence[str]) -> list[list[int]]:
        made = tokenizer(list(texts), truncation=True, max_length=longest)
        return [list(ids) for ids in made["input_ids"]]

    return benchmark.from_text(path, encode)


def _work(
    subjects: Sequence[Subject], measured: Sequence[Artifact], source: Checkpoint | None
) -> Callable[[Cell], Work | str]:
    """Operations and bytes of a cell, or why they are unknown, counted on the subject's source."""
    counters: dict[tuple[str, str], Callable[[int, int], Work | str]] = {}
    weights = {subject.identity: subject.weight_bytes for subject in subjects}
    made = {a.manifest.identity: a.manifest.source for a in measured}
    # A bare file is held to the contract of the first artifact, or else of the baseline.
    usual = source.source if source else measured[0].manifest.source

    def counted(cell: Cell) -> Work | str:
        origin = made.get(cell.identity, usual)
        key = (origin.digest, origin.task)
        if key not in counters:
            counters[key] = _counter(origin, source)
        found = counters[key](cell.batch, cell.sequence)
        if isinstance(found, str):
            return found
        return replace(found, bytes=found.bytes + weights[cell.identity])

    return counted


def _counter(origin: Source, source: Checkpoint | None) -> Callable[[int, int], Work | str]:
    """Counts a call by batch and sequence, on a module without weights: its operations, and the
    bytes of what goes in and comes out.

    Args:
        source: taken where it is the same model, else it is looked for.
    """
    from .exporting import first_line

    same = source is not None and (source.source.digest, source.task) == (
        origin.digest, origin.task)
    try:
        found = source if same and source else ModelRequest.of(origin).resolve()
        loaded = checkpoints.load(found, attention="eager")
    except Exception as error:  # noqa: BLE001 - what was measured counts without it
        why = first_line(error)
        return lambda batch, sequence: why

    @cache
    def count(batch: int, sequence: int) -> Work | str:
        import torch

        spec = loaded.spec
        sizes = {name: dim.opt for name, dim in spec.dims.items()}
        sizes |= {"batch": batch, "sequence": sequence}
        try:
            inputs = tuple(torch.zeros(spec.shape(t, sizes), dtype=getattr(torch, t.dtype))
                           for t in spec.inputs)
            flops = standins.completed(benchmark.count_flops)(loaded.module, inputs)
        except Exception as error:  # noqa: BLE001 - some decide by values, and none are there
            return first_line(error)
        written = [t for t in spec.outputs
                   if all(isinstance(d, int) or set(terms(d)) <= sizes.keys() for d in t.shape)]
        moved = sum(math.prod(spec.shape(t, sizes)) * getattr(torch, t.dtype).itemsize
                    for t in (*spec.inputs, *written))
        return benchmark.Work(float(flops), float(moved))

    return count
