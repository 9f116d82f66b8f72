"""Measure artifacts side by side with their source, and keep the evidence with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from .. import artifacts, checkpoints, runtimes
from ..artifacts.digest import digests
from ..checkpoints import standins
from ..errors import UsageError
from ..runtimes import benchmark
from ..spec import ModelSpec
from .opening import open_artifact
from .request import ModelRequest, Notify
from .sources import spelled, told_apart

if TYPE_CHECKING:
    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, LoadedModel
    from ..runtimes.benchmark import Cell, CorpusSource, RunReport, Subject, Work
    from ..session import Session

EAGER = "torch_eager"
"""Runs the source as it was published."""
DEFAULT_RUNTIMES = ("onnxruntime", "torchscript", "aotinductor", "tensorrt", EAGER)
"""What is measured unless ``--runtimes`` says otherwise; the rest is for comparison."""


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
        corpus: text file, one sentence a line; None is the built-in one.
        sweep: everything that the sweep itself takes; ``subjects`` and ``corpus`` are filled in.
    """

    baseline: ModelRequest | None = None
    runtimes: tuple[str, ...] = DEFAULT_RUNTIMES
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
        UsageError, UnsafeError: an artifact cannot be read, or its files were changed.
    """
    files = [root for root in roots if root.is_file()]
    measured = [artifacts.verify(root) for root in roots if not root.is_file()]
    source = _baseline(grid, measured)
    contract = _contract(files, source, measured)
    wanted = [Entrant.of(text) for text in grid.runtimes]
    subjects = [
        *_of_artifacts(measured, wanted),
        *_of_files(files, contract, wanted),
        *_of_baseline(source, wanted),
    ]
    options = dict(grid.sweep)
    if grid.corpus is not None:
        homes = [a.root for a in measured] + ([source.root] if source else [])
        options["corpus"] = _corpus(grid.corpus, homes, contract)
    request = benchmark.SweepRequest(
        tuple(subjects),
        output,
        baseline=next((s.name for s in subjects
                       if s.parity == benchmark.SOURCE and s.runtime == EAGER), None),
        work=_work(source or _source(measured[0])),
        **options,
    )
    report: RunReport = benchmark.run_sweep(
        request, lambda result, done, total: notify(f"{done}/{total} {result.cell.label()}")
    )
    text = (output / artifacts.BENCHMARK).read_text(encoding="utf-8")
    for artifact in measured:
        artifacts.with_report(artifact, artifacts.BENCHMARK, text)
    return report


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


def _source(artifact: Artifact) -> Checkpoint | None:
    """The artifact's source, if it still can be had: only for counting its operations."""
    from ..errors import ModelportError

    try:
        return ModelRequest.of(artifact.manifest.source).resolve()
    except ModelportError:
        return None


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
                    weight_bytes=sum(manifest.facts.get("weight_bytes", {}).values()),
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
        for entrant in able:
            name = f"{file.parent.name}/{file.name}"
            found.append(
                benchmark.Subject(
                    name=entrant.name(name, alone=len(able) == 1),
                    path=json.dumps(content, sort_keys=True),
                    identity=_digest(file),
                    runtime=entrant.runtime,
                    dtype=_dtype(entrant, "float32"),
                    options=entrant.options,
                    parity="not validated",
                )
            )
    return found


def _digest(file: Path) -> str:
    """Of a bare model, and of the files beside it that may hold its weights."""
    beside = sorted(p for p in file.parent.iterdir()
                    if p.is_file() and p.name.startswith(file.stem))
    found = "".join(entry.sha256 for entry in digests(beside).values())
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


def _work(source: Checkpoint | None) -> Callable[[Cell], Work | None]:
    """Operations and bytes of a cell, counted on the source's module, which holds no weights."""
    if source is None:
        return lambda cell: None
    model: list[LoadedModel] = []

    @cache
    def counted(batch: int, sequence: int) -> Work:
        import torch

        if not model:
            model.append(checkpoints.load(source, attention="eager"))
        loaded = model[0]
        sizes = {name: dim.opt for name, dim in loaded.spec.dims.items()}
        sizes |= {"batch": batch, "sequence": sequence}
        inputs = tuple(
            torch.zeros(loaded.spec.shape(t, sizes), dtype=getattr(torch, t.dtype))
            for t in loaded.spec.inputs
        )
        weights = sum(ref.nbytes for ref in {id(r): r for r in loaded.weights.values()}.values())
        flops = standins.completed(benchmark.count_flops)(loaded.module, inputs)
        return benchmark.Work(float(flops), float(weights))

    return lambda cell: None if cell.batching else counted(cell.batch, cell.sequence)
