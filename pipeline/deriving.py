"""Derive an artifact from another by a transform of its graph; weights go from file to file."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts, checkpoints, transforms, validate
from ..errors import UsageError
from ..spec import terms
from .opening import open_session
from .texts import CORPUS, TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np

    from ..artifacts import Ancestor, Artifact, ParitySummary
    from ..checkpoints import LoadedModel
    from ..exporters import Derivation, Exporter
    from ..spec import ModelSpec

MOST_KEPT = 16
"""Layers left in float32 before giving up on a budget."""

FOUR_BITS = validate.EffectBudget(sqnr_db=10.0, agreement=0.95, agreement_low=0.93)
"""4 bits leave a layer alone about 20 dB, and a dozen in a row half of that; the usual 20 dB at the
end of the model would turn nearly every layer back into 8."""

UNKNOWN = 0.2
"""Share of unknown tokens at which a calibration text is in the wrong language."""

CALIBRATION_LINES = 256

ROWS = 240
"""The lower end of 95 % Wilson's interval reaches 0.97 with 125 of 125; with random weights a third
of the rows is undecided."""

MEASURED = {"batch": 8, "sequence": 128}
"""Sizes that effects are measured at while layers are chosen, where there is no text."""

MADE = {"tokens", "mask", "segments"}
"""Roles of what a tokenizer makes."""

LONGEST = 512
"""Sizes of the largest sample drawn for measuring ranges."""


def derive(
    exporter: Exporter[Any],
    model: LoadedModel,
    parent: Artifact,
    root: Path,
    step: Derivation,
) -> Artifact:
    """Apply one transform to ``parent`` and write the result, with its manifest, into ``root``.

    Args:
        exporter: of the parent's format; reads back what was written.
        model: what the parent was exported from.
        root: an empty directory.
        step: which transform, its settings, and the options that describe the result.

    Raises:
        UsageError: the parent's graph cannot be transformed like that.
        ClaimError: what was written is not what was asked for.
    """
    transform = transforms.get(step.transform)
    before = parent.manifest
    metadata = {"modelport.parent": before.identity, "modelport.transform": transform.name}
    results = _applied(model, parent, root, step, metadata)
    written = exporter.read_back(model, root, step.result)
    for sidecar in model.sidecars:
        shutil.copyfile(sidecar, root / sidecar.name)
    shared = {"strategy", "traced"} & set(before.facts)
    facts = {name: before.facts[name] for name in shared}
    facts |= {**written.facts, "made_by": transform.name}
    components = {
        name: dataclasses.replace(found, facts={
            **found.facts, "traced": before.components[name].facts["traced"],
            transform.name: dict(results[name].notes)})
        for name, found in written.components.items()
    }
    if not components:
        facts[transform.name] = dict(results[""].notes)
    made = next((r.precision for r in results.values() if r.precision), None)
    if precision := made or before.facts.get("precision"):
        facts["precision"] = precision
    targets = {key: value for result in results.values() for key, value in result.target.items()}
    manifest = artifacts.Manifest(
        format=before.format,
        spec=written.spec,
        source=before.source,
        options={**before.options, **_plain(step.result)},
        facts=facts,
        tools=before.tools,
        files=artifacts.collect(root),
        attempts=before.attempts,
        parent=before.identity,
        target={**before.target, **targets},
        lineage=(*before.lineage, ancestor(parent)),
        components=components,
    )
    return artifacts.write_manifest(root, manifest)


def _applied(
    model: LoadedModel, parent: Artifact, root: Path, step: Derivation, metadata: Mapping[str, str]
) -> dict[str, transforms.TransformResult]:
    """Transform every graph of the parent and write them; results by component, ``""`` for one
    graph alone. Each component is relaxed by itself, the others as their parent has them; one that
    has nothing to transform stays as it is, unless none has."""
    from ..artifacts import onnx_files

    if not parent.components:
        _require_reader((model,), step)
        return {"": _kept_within_budget(model, parent, root, step, metadata)}
    results = _idle(parent, transforms.get(step.transform))
    if len(results) == len(parent.components):
        results = {}  # the transform itself says that there is nothing to do
    _require_reader((model.parts[name] for name in parent.components if name not in results), step)
    with tempfile.TemporaryDirectory(prefix=".component-", dir=root) as place:
        for name, view in parent.components.items():
            if name not in results:
                results[name] = _kept_within_budget(
                    model.parts[name], view, Path(place), step, metadata)
    graphs = {str(view.graph): results[name].model for name, view in parent.components.items()}
    onnx_files.save_all(graphs, root, metadata=metadata)
    return results


def _idle(
    parent: Artifact, transform: transforms.Transform
) -> dict[str, transforms.TransformResult]:
    """The components in which a transform has nothing to do, as they are."""
    from ..artifacts import onnx_files

    found = {}
    for name, view in parent.components.items():
        file = parent.root / str(view.graph)
        notes = transform.idle(onnx_files.load(file))
        if notes is not None:
            found[name] = transforms.TransformResult(onnx_files.load(file), False, notes)
    return found


def _kept_within_budget(
    model: LoadedModel, parent: Artifact, place: Path, step: Derivation, metadata: Mapping[str, str]
) -> transforms.TransformResult:
    """Transform one graph and write it to ``place``, with more and more layers left alone until
    the budget holds, where the transform has layers to leave alone."""
    from ..artifacts import onnx_files

    transform = transforms.get(step.transform)
    settings: dict[str, Any] = dict(step.settings)
    if transform.measures:
        texts = settings.pop("texts", None)
        settings["samples"] = samples(model, Path(texts) if texts else None)
    file = parent.graph or "model.onnx"
    kept = 0
    while True:
        result = transform.apply(
            onnx_files.load(parent.root / file), {**settings, "keep": kept})
        judged = transform.relaxes and kept < MOST_KEPT
        if judged or parent.graph is None:
            onnx_files.save(result.model, place, name=file, metadata=metadata)
        if not judged or _holds(parent, place, result, step):
            return result
        kept = kept * 2 or 1
        # The layers are the same as before: measuring them takes most of a round.
        settings["measured"] = {
            name: layer["sqnr_db"] for name, layer in result.notes["layers"].items()}


def _holds(
    parent: Artifact, root: Path, result: transforms.TransformResult, step: Derivation
) -> bool:
    """Whether a graph just written keeps the effect budget against the artifact it came from.

    Decides only how many layers to leave alone; the verdict is Gate C's, against the original.
    """
    manifest = dataclasses.replace(parent.manifest, target=dict(result.target),
                                   facts={**parent.manifest.facts, "precision": result.precision})
    candidate = artifacts.Artifact(root, manifest, parent.graph)
    effects = validate.measure_effects(
        lambda: open_session(candidate),
        lambda: open_session(parent),
        text_cases(parent.spec, parent.root) or _drawn(parent.spec),
        spec=parent.spec,
        budget=budget_of(dataclasses.asdict(step.result)),
    )
    return not any(effect.broken for effect in effects)


def budget_of(options: Mapping[str, Any]) -> validate.EffectBudget:
    """The budget an artifact was made under; the default where its options name none."""
    text = str(options.get("budget") or "")
    if text:
        return dataclasses.replace(validate.read_budget(text), set_by="export")
    return FOUR_BITS if options.get("quantize") == "int4-weights" else validate.EffectBudget()


def settled(options: Any) -> Any:
    """The options of an export, the files that they name checked before there is any work.

    The file of a budget is replaced by the limits in it: an artifact is judged by them wherever it
    is validated, whatever becomes of the file.

    Raises:
        UsageError: a budget with a limit that is none, or a file that holds no text.
    """
    if texts := getattr(options, "texts", ""):
        _lines(Path(texts))
    if text := getattr(options, "budget", ""):
        limits = dataclasses.asdict(validate.read_budget(text))
        if limits.pop("set_by") == "file":
            budget = ",".join(f"{name}={limit}".lower() for name, limit in limits.items())
            return dataclasses.replace(options, budget=budget)
    return options


def text_cases(spec: ModelSpec, root: Path) -> tuple[validate.Case, ...]:
    """Cases of real text, where there is a tokenizer and nothing but text goes in; as many as a
    proportion's interval needs rows, and no text twice."""
    if not _reads_text(spec, root):
        return ()
    found: list[validate.Case] = []
    tokenize, rows, size = _tokenizing(spec, root), 0, 1
    if "batch" in spec.dims:
        size = min(max(MEASURED["batch"], spec.dims["batch"].min), spec.dims["batch"].max)
    for start in range(0, max(1, len(CORPUS) - size + 1), size):
        if rows >= ROWS:
            break
        texts = CORPUS[start : start + size]
        for case in validate.text_cases(spec, texts, tokenize, batches=(size,)):
            found.append(dataclasses.replace(case, seed=start))
            rows += _rows(spec, case)
    return tuple(found)


def texts_of(
    spec: ModelSpec, root: Path, texts: Sequence[str]
) -> tuple[validate.Case, ...]:
    """The texts as cases; none without a tokenizer, or where something else goes in."""
    if not _reads_text(spec, root):
        return ()
    return validate.text_cases(spec, texts, _tokenizing(spec, root))


def _reads_text(spec: ModelSpec, root: Path) -> bool:
    """Whether a tokenizer makes everything that goes in: neither pixels nor boxes of words."""
    roles = {tensor.role for tensor in spec.inputs}
    return ("input_ids" in spec.input_names and roles <= MADE
            and set(spec.dims) <= {"batch", "sequence"} and checkpoints.has_tokenizer(root))


def _tokenizing(
    spec: ModelSpec, root: Path
) -> Callable[[Sequence[str]], Mapping[str, np.ndarray]]:
    """What makes feeds of texts, cut where the model ends; its tokenizer is loaded once."""
    loaded = checkpoints.tokenizer(root)
    longest = spec.dims["sequence"].max if "sequence" in spec.dims else None
    return lambda texts: checkpoints.tokenize(root, texts, spec.input_names, longest, loaded)


def _rows(spec: ModelSpec, case: validate.Case) -> int:
    """Rows that a case of text adds to the scores that have fewest: one for each text, or one for
    each token."""
    sizes = dict(case.sizes)
    once = any(validate.is_scores(t) and "sequence" not in t.shape[:-1] for t in spec.outputs)
    mask = next((t.name for t in spec.inputs if t.role == "mask"), None)
    if once or mask is None or case.feeds is None:
        return sizes.get("batch", 1)
    return int(case.feeds[mask].sum())


def _drawn(spec: ModelSpec) -> tuple[validate.Case, ...]:
    """Cases without meaning, for models without a tokenizer; rows enough for an interval."""
    sizes = {name: tuple(s for s in (dim.min, dim.opt) if s <= MEASURED.get(name, s)) or (dim.min,)
             for name, dim in spec.free.items()}
    return enough(validate.plan(spec, sizes=sizes).cases)


def enough(cases: tuple[validate.Case, ...]) -> tuple[validate.Case, ...]:
    """The same cases and as many more, drawn anew, as a proportion's interval needs rows.

    A model that answers once for each member of a batch has one row for it.
    """
    def size(case: validate.Case) -> int:
        return dict(case.sizes).get("batch", 1)

    rows, added, seed = sum(map(size, cases)), list(cases), len(cases)
    largest = max(cases, key=size)
    while rows < ROWS:
        seed += 1
        added.append(dataclasses.replace(largest, seed=seed))
        rows += size(largest)
    return tuple(added)


def translated(artifact: Artifact) -> ParitySummary | None:
    """The verdict of Gate A on the nearest ancestor that has one, which Gate B rests on."""
    for ancestor in reversed(artifact.manifest.lineage):
        if ancestor.parity is not None and "precision" not in ancestor.facts:
            current = ancestor.parity.identity == ancestor.identity
            return ancestor.parity if current else None
    return None


def samples(model: LoadedModel, texts: Path | None = None) -> list[Mapping[str, np.ndarray]]:
    """Feeds to measure a graph's values on: short and long, with padding, and real text.

    Args:
        texts: the user's own, one a line; nothing else is measured on then, unless the graph reads
            something else than text.

    Raises:
        UsageError: the file is empty or not text, the model has no tokenizer, or its tokenizer
            does not know the script that most of the text is in.
    """
    spec = model.spec
    if texts is not None and _reads_lines(model):
        return _from_file(model, texts)
    feeds: list[Mapping[str, np.ndarray]] = [model.samples]
    for seed, padding in enumerate(validate.PADDINGS[:2]):
        sizes = largest(spec)
        case = validate.Case(tuple(sorted(sizes.items())), padding, seed)
        if validate.admits(spec, sizes, padding):
            feeds.append(validate.draw(spec, case))
    if checkpoints.has_tokenizer(model.checkpoint.root) and _reads_lines(model):
        feeds.append(_tokenized(model, TEXTS))
    return feeds


def _reads_lines(model: LoadedModel) -> bool:
    """Whether a graph reads what the checkpoint's tokenizer makes, and a past at most.

    Bark's read tokens of each other, or a text's with an offset.
    """
    spec = model.spec
    return (model.checkpoint.task != "text-to-audio" and "input_ids" in spec.input_names
            and set(spec.free) <= {"batch", "sequence", "past"})


def _require_reader(models: Iterable[LoadedModel], step: Derivation) -> None:
    """Refuse texts to measure on where no graph would be measured on them."""
    texts = step.settings.get("texts")
    if texts and transforms.get(step.transform).measures and not any(map(_reads_lines, models)):
        raise UsageError(f"{texts} is of no use: no graph that is measured reads text alone",
                         allowed="texts for encoders and decoders of text",
                         hint="leave --texts out to calibrate on drawn values")


def largest(spec: ModelSpec) -> dict[str, int]:
    """Sizes of the largest sample: two rows of up to :data:`LONGEST`, within every sum's limit."""
    sizes = {name: max(dim.min, 2) if name == "batch" else min(dim.max, max(LONGEST, dim.min))
             for name, dim in spec.free.items()}
    for name, dim in spec.dims.items():
        parts = terms(name)
        if sizes.keys() >= {*parts} and sum(sizes[part] for part in parts) > dim.max:
            sizes |= {part: max(spec.dims[part].min, dim.max // len(parts)) for part in parts}
    return sizes


def _tokenized(
    model: LoadedModel, lines: Sequence[str], loaded: Any = None
) -> dict[str, np.ndarray]:
    """Feeds of text; a past is empty, and what else no tokenizer makes is 0."""
    import numpy as np

    spec, root = model.spec, model.checkpoint.root
    text = [t.name for t in spec.inputs if t.role in MADE]
    longest = spec.dims["sequence"].max if "sequence" in spec.dims else None
    made = checkpoints.tokenize(root, lines, text, longest, loaded)
    batch, length = made[text[0]].shape
    sizes = {"past": 0, "batch": batch, "sequence": length}
    return {t.name: made[t.name] if t.name in made else
            np.zeros(spec.shape(t, sizes), t.dtype) for t in spec.inputs}


def _lines(path: Path) -> list[str]:
    """The texts of a file, one a line, as far as they are calibrated on.

    Raises:
        UsageError: the file is empty or not text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}",
                         allowed="UTF-8 text, one sample a line") from error
    lines = [line for line in lines if line][:CALIBRATION_LINES]
    if not lines:
        raise UsageError(f"{path} holds no text", allowed="UTF-8 text, one sample a line",
                         hint="leave --texts out to calibrate on the built-in sentences")
    return lines


def _from_file(model: LoadedModel, path: Path) -> list[Mapping[str, np.ndarray]]:
    lines = _lines(path)
    loaded = checkpoints.tokenizer(model.checkpoint.root)
    unknown = getattr(loaded, "unk_token_id", None)
    feeds: list[Mapping[str, np.ndarray]] = []
    lost = total = 0
    for start in range(0, len(lines), 8):
        made = _tokenized(model, lines[start : start + 8], loaded)
        feeds.append(made)
        ids = made.get("input_ids")
        if ids is not None and unknown is not None:
            lost, total = lost + int((ids == unknown).sum()), total + ids.size
    if total and lost > UNKNOWN * total:
        raise UsageError(
            f"{lost} of {total} tokens of {path} are unknown to this model's tokenizer",
            allowed=f"at most {UNKNOWN:.0%}: text in a language the model was trained on")
    return feeds


def ancestor(artifact: Artifact) -> Ancestor:
    """What a descendant's manifest says of an artifact."""
    manifest = artifact.manifest
    return artifacts.Ancestor(
        identity=manifest.identity,
        made_by=str(manifest.facts.get("made_by", "export")),
        options=manifest.options,
        facts=manifest.facts,
        parity=manifest.parity if manifest.parity_is_current else None,
    )


def _plain(options: Any) -> dict[str, Any]:
    return dataclasses.asdict(options)
