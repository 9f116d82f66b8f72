"""One pair, measured in this process: built, run eagerly, exported, proven at unseen shapes."""

from __future__ import annotations

import copy
import json
import os
import re
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pairs import Pair, by_main_input
from shrink import DEGREES, EXCEPTIONS, NOISE, Degree, tiny

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modelport.session import Session
    from modelport.spec import ModelSpec
    from modelport.validate import ParityReport

OPSET = 17
STRATEGIES = (("trace", OPSET), ("dynamo", OPSET), ("transformers", 18))
"""Cheapest first, each with the opset it is asked for."""

GENERATION = EXCEPTIONS["(generation)"]
TORCHSCRIPT = "torchscript"
NO_CACHE = "keeps no keys and values"
"""Said of decoders whose state is recurrent, convolutional or hidden states."""

WHATEVER_SIZE = (NO_CACHE, "needs inputs that can't be derived", "none of the inputs")
"""Said where another size would change nothing."""

LARGEST = 60_000_000
"""Parameters beyond which a model that could not be made small is not measured."""

Outcome = Literal["right", "wrong", "failed", "not eager", "no config", "other state"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way of capture: what became of it."""

    strategy: str
    opset: int
    outcome: Literal["right", "wrong", "failed"]
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured of a pair.

    Attributes:
        outcome: right: exported and proven. wrong: exported, parity failed. failed: no strategy
            gave an artifact. not eager: the model itself does not run on inputs derived from it.
            no config: its config class makes no model that is small enough. other state: it
            generates from something else than keys and values, and is refused by name.
        opset, strategy: of the artifact that was kept.
        comparisons, worst: samples compared, and the largest ratio of errors (ρ).
        torchscript: the same of the archive: ``right``, or what went wrong.
        cause: of what is not right, as it was said.
        seconds: by the clock, for everything in the process of the pair.
        processor: seconds of processor time of that process and of those it started; 0 where
            they were not counted.
    """

    model_type: str
    task: str
    class_name: str
    kind: str
    must: bool
    outcome: Outcome
    strategy: str = ""
    opset: int = 0
    comparisons: int = 0
    worst: float | None = None
    attempts: tuple[Attempt, ...] = ()
    torchscript: str = ""
    cause: str = ""
    seconds: float = 0.0
    processor: float = 0.0
    inputs: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Record:
        known = {**value, "inputs": tuple(value.get("inputs") or ()),
                 "attempts": tuple(Attempt(**a) for a in value["attempts"])}
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Original:
    """The unpatched model with its real weights, in both precisions; none of one in parts."""

    spec: ModelSpec
    reference: Session | None = None
    truth: Session | None = None


def measure(pair: Pair, work: Path, strategies: Sequence[str]) -> Record:
    """Build the pair's tiny model below ``work`` and take it through the whole flow."""
    start = time.monotonic()
    record = Record(pair.model_type, pair.task, pair.class_name, pair.kind, pair.must, "no config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = None
        for degree in DEGREES:
            found: dict[str, Any] = {}
            try:
                root, kind = build(pair, work / f"checkpoint-{degree}", degree)
                found = {"kind": kind, "outcome": "not eager"}
                source = original(root, pair.task)
            except Exception as error:  # noqa: BLE001 - the finding; another degree may do
                if NO_CACHE in str(error):
                    found["outcome"] = "other state"
                if degree == DEGREES[0] or (found and record.outcome == "no config"):
                    record = replace(record, cause=said(error), **found)
                if isinstance(error, ImportError) or any(s in str(error) for s in WHATEVER_SIZE):
                    break
                continue
            record = replace(record, kind=kind, cause="", inputs=source.spec.input_names)
            break
        if source is None:
            return _done(record, start)
        if any(strategy in strategies for strategy, _ in STRATEGIES):
            record = _exported(record, source, root, work, strategies)
        torchscript = ""
        if TORCHSCRIPT in strategies and source.reference is not None:
            attempt, _ = _attempt(TORCHSCRIPT, {"mode": "trace"}, 0, source, root, pair.task, work)
            torchscript = attempt.reason or attempt.outcome
    return _done(record, start, torchscript=torchscript)


def _done(record: Record, start: float, **changes: Any) -> Record:
    return replace(record, seconds=round(time.monotonic() - start, 2),
                   processor=round(sum(os.times()[:4]), 2), **changes)


def build(pair: Pair, root: Path, degree: Degree) -> tuple[Path, str]:
    """A checkpoint with seeded weights, so small as the degree says; and the kind of model.

    Raises:
        Exception: what the classes of the config and the model raise, or ValueError where the
            model is larger than :data:`LARGEST`.
    """
    import torch
    import transformers

    cls = getattr(transformers, pair.class_name)
    config = tiny(cls.config_class(), pair.model_type, pair.task, degree)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters at the smallest")
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    noise = EXCEPTIONS["(noise)"].get(pair.model_type, {"": NOISE})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=next(
                    size for pattern, size in noise.items() if re.search(pattern, name)))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
            elif name.endswith("codebook.embed"):  # a table that training fills
                buffer.normal_()
    model.save_pretrained(root)
    if pair.model_type in GENERATION:
        (root / "generation_config.json").write_text(
            json.dumps(GENERATION[pair.model_type]), "utf-8")
    return root, pair.kind if pair.kind != "other" else by_main_input(model)


def original(root: Path, task: str) -> Original:
    """Load the original and run it twice on inputs derived from it.

    Raises:
        Exception: whatever it raises, or ValueError where it returns NaN or infinity, or other
            numbers the second time.
    """
    import torch
    from modelport import runtimes
    from modelport.checkpoints import load_reference, resolve

    kind = json.loads((root / "config.json").read_text("utf-8"))["model_type"]
    if reason := EXCEPTIONS["(not eager)"].get(kind):
        raise ValueError(reason)
    # As validation has it: eager attention in float64 makes NaN of rows that are masked whole.
    model = load_reference(resolve(str(root), task=task), attention="sdpa")
    for part in model.parts.values() or (model,):
        # A number, such as how many logits are wanted, is an array without axes.
        tensors = [torch.as_tensor(part.samples[name]) for name in part.spec.input_names]
        with torch.no_grad():
            outputs, again = (part.module(*tensors) for _ in range(2))
        for name, value, other in zip(part.spec.output_names, outputs, again, strict=True):
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"{name} of the original holds NaN or infinity")
            if not torch.allclose(value.double(), other.double(), rtol=1e-3, atol=1e-3):
                raise ValueError(f"{name} of the original is another each time: it draws random "
                                 "numbers")
    if model.parts:
        return Original(model.spec)
    doubled = replace(model, module=copy.deepcopy(model.module).double())
    eager = runtimes.get("torch_eager")
    return Original(model.spec, eager.open(model), eager.open(doubled))


def _exported(
    record: Record, source: Original, root: Path, work: Path, strategies: Sequence[str]
) -> Record:
    attempts: list[Attempt] = []
    for strategy, opset in STRATEGIES:
        if strategy not in strategies:
            continue
        options = {"opset": opset, "strategy": strategy}
        attempt, report = _attempt("onnx", options, opset, source, root, record.task, work)
        attempts.append(attempt)
        if attempt.outcome == "right":
            assert report is not None
            worst = max((r.rho for r in report.results if r.rho is not None), default=None)
            return replace(record, outcome="right", strategy=strategy, opset=opset,
                           comparisons=report.comparisons, worst=worst, attempts=tuple(attempts))
    wrong = next((a for a in attempts if a.outcome == "wrong"), None)
    return replace(record, outcome="wrong" if wrong else "failed", attempts=tuple(attempts),
                   cause=(wrong or attempts[0]).reason)


def _attempt(
    name: str, given: Mapping[str, Any], opset: int, source: Original, root: Path, task: str,
    work: Path,
) -> tuple[Attempt, ParityReport | None]:
    from modelport import exporters, pipeline, validate

    start = time.monotonic()
    report = None
    outcome: Literal["right", "wrong", "failed"]
    try:
        options = exporters.get(name).options_type(**given)
        request = pipeline.ModelRequest(str(root), task=task)
        artifact = pipeline.export(name, request, work / name, options, validate=False, force=True)
        if source.reference is None:  # each part by its own matrix, then the whole
            report = pipeline.validate_artifact(
                work / name, limits=pipeline.Limits(max_seconds=CASES_SECONDS))
        else:
            plan = validate.plan(artifact.spec, sizes=sizes(artifact.spec),
                                 max_seconds=CASES_SECONDS)
            essential = validate.Plan(tuple(c for c in plan.cases if c.essential),
                                      max_seconds=CASES_SECONDS)
            with pipeline.open_session(artifact) as session:
                report = validate.judge(session, source.reference, source.truth, essential,
                                        spec=artifact.spec)
        outcome = "right" if report.verdict == "pass" and report.comparisons else "wrong"
        reason = "" if outcome == "right" else "; ".join(dict.fromkeys(
            f"{r.output}: {r.reason} ({r.case})" for r in report.failures[:2])) or "; ".join(
                (report.verdict, *report.notes))
    except Exception as error:  # noqa: BLE001 - the finding
        outcome, reason = "failed", said(error)
    seconds = round(time.monotonic() - start, 2)
    strategy = str(given.get("strategy", given.get("mode")))
    return Attempt(strategy, opset, outcome, reason[:400], seconds), report


CASES_SECONDS = 600.0
WANTED = {"batch": (1, 3, 7), "choices": (2, 5), "sequence": (1, 3, 17, 31), "target": (1, 6, 11),
          "frames": (33, 57, 64), "samples": (2001, 4000)}


def sizes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The sizes to prove at: batches of 1, 3 and 7, odd lengths, none of them traced."""
    found = {}
    for name, dim in spec.free.items():
        inside = [s for s in WANTED.get(name, ()) if dim.min <= s <= dim.max]
        if name == "samples":
            inside = [dim.min, *(dim.min + extra for extra in WANTED[name])]
        if inside:
            found[name] = tuple(inside)
    return found


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else "no message"
    found = getattr(error, "found", None)
    return (str(found) if found else f"{type(error).__name__}: {text}")[:400]
