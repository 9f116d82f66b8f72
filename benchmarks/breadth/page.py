"""What was measured, as a page, as JSON, and as the list of what is known not to export."""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from measure import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from measure import Record
    from pairs import Pair

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "coverage.md"
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
KNOWN = ROOT / "checkpoints" / "known_failures.json"
CAUSES: Sequence[tuple[str, str]] = [
    tuple(entry) for entry in json.loads((Path(__file__).parent / "causes.json").read_text())]
"""Patterns of what was said, with the few words they are grouped under; the first that fits."""

REST = {
    "no config": "its classes refuse small sizes, and their own defaults are refused or too large",
    "not eager": "the original does not run on the inputs derived for it",
    "failed": "capture or translation fails",
}
"""Where no pattern fits, by outcome."""

NEAR = 10.0
"""Times the allowed error below which another size may well pass."""

RAN = ("right", "wrong", "failed")
"""Outcomes of pairs whose original ran eagerly."""


def write(records: Sequence[Record], every: Sequence[Pair]) -> None:
    """Write the page, the records and the known failures; the same records, the same files."""
    ordered = sorted(records, key=lambda r: (r.kind, r.model_type, r.task))
    RESULTS.write_text(placeless(json.dumps(
        {"environment": environment(), "pairs": len(every),
         "records": [asdict(r) for r in ordered]}, indent=0)) + "\n", encoding="utf-8")
    PAGE.write_text(markdown(ordered, every), encoding="utf-8")
    KNOWN.write_text(json.dumps(known_failures(ordered), indent=1, sort_keys=True) + "\n",
                     encoding="utf-8")


def placeless(text: str) -> str:
    """Without the directories of this machine: of a file below them, its name."""
    places = "|".join(re.escape(str(p)) for p in (tempfile.gettempdir(), ROOT, sys.prefix))
    return re.sub(rf"(?:{places})(?:/[\w.+-]+)*/([\w.+-]+)", r"\1", text)


def environment() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")}}


def cause(record: Record) -> str:
    """A few words for what went wrong."""
    if record.outcome == "no config" and "library" not in record.cause:
        return REST[record.outcome]
    for pattern, words in CAUSES:
        if re.search(pattern, record.cause):
            return words
    return REST.get(record.outcome, "no reason given")


def known_failures(records: Iterable[Record]) -> dict[str, object]:
    """Pairs that every way of capture was tried on in vain, with what works of the same model.

    An error that is near what is allowed is no reason to refuse a model of another size.
    """
    found: dict[str, dict[str, dict[str, object]]] = {}
    right: dict[str, list[str]] = {}
    for record in records:
        if record.outcome == "right":
            right.setdefault(record.model_type, []).append(record.task)
    for record in records:
        tried = {a.strategy for a in record.attempts}
        if record.outcome not in ("wrong", "failed") or not {"trace", "dynamo"} <= tried:
            continue
        if 0 < _excess(record) < NEAR:
            continue
        entry: dict[str, object] = {"cause": cause(record)}
        if record.torchscript == "right":
            entry["torchscript"] = True
        if record.model_type in right:
            entry["tasks"] = sorted(right[record.model_type])
        found.setdefault(record.model_type, {})[record.task] = entry
    return {"transformers": environment()["transformers"], "onnx": found}


def _excess(record: Record) -> float:
    """How many times the allowed error the first that failed is; 0 where nothing was compared."""
    found = re.search(r"([\d.e+]+) times what is allowed", record.cause)
    return float(found.group(1)) if found else 0.0


def markdown(records: Sequence[Record], every: Sequence[Pair]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    ran = [r for r in records if r.outcome in RAN]
    right = [r for r in ran if r.outcome == "right"]
    lines = [
        "# Coverage of transformers",
        "",
        f"Written by `make coverage` from its own records, with {versions}. A pair is a model type "
        "of transformers' auto mappings with a task it has a class for. Each was built from its "
        "config class with small sizes and seeded weights, run eagerly, exported, and compared "
        "with the original at batches of 1, 3 and 7 and lengths that tracing never saw, with left "
        "and right padding, in a process of its own.",
        "",
        f"- {len(every)} pairs are listed, {len(records)} were measured, "
        f"{len(every) - len(records)} were not reached;",
        f"- {len(ran)} ran eagerly from a tiny config; of these **{len(right)} "
        f"({_share(len(right), len(ran))}) were exported to ONNX and proven right**;",
        f"- {_count(records, 'not eager')} did not run on inputs derived from the model, and of "
        f"{_count(records, 'no config')} no tiny model could be made: nothing is claimed of them;",
        f"- {_count(records, 'other state')} generate from another state than keys and values of "
        "attention (recurrent, convolutional, hidden states) and are refused by name; shares are "
        "of the others.",
    ]
    partly = sum(r.outcome != "right" and len(r.attempts) < len(STRATEGIES) for r in ran)
    if partly:
        lines.append(f"- {partly} of those that are not right were not tried by every way of "
                     "capture, so that nothing is said of what the others would make of them;")
    timed = [r for r in right if r.processor]
    if timed:
        seconds = median(r.processor for r in timed)
        lines += [f"- median processor time of a pair that is right: {seconds:.1f} s on one core "
                  "for building, reference, export and proof together, imports not included "
                  f"({len(timed)} pairs; time by the clock says little here, for the machine did "
                  "other work besides)."]
    lines += ["", "## By kind", "", *_by_kind(records, every), "", "## The required list", "",
              "Every task that these model types have; a dash is a task they have not.", "",
              *_required(records, every), "", "## What is not right, by cause", "",
              *_by_cause(records), "", "## Every pair", "", *_all(records), ""]
    return "\n".join(lines)


def _by_kind(records: Sequence[Record], every: Sequence[Pair]) -> list[str]:
    kinds = sorted({r.kind for r in records})
    lines = ["| kind | measured | ran eagerly | right | share | TorchScript right, of tried |",
             "| --- | --- | --- | --- | --- | --- |"]
    for kind in kinds:
        mine = [r for r in records if r.kind == kind]
        ran = [r for r in mine if r.outcome in RAN]
        right = [r for r in ran if r.outcome == "right"]
        scripts = [r for r in mine if r.torchscript]
        lines.append(
            f"| {kind} | {len(mine)} | {len(ran)} | {len(right)} "
            f"| {_share(len(right), len(ran))} | {sum(r.torchscript == 'right' for r in scripts)} "
            f"of {len(scripts)} |")
    return lines


def _required(records: Sequence[Record], every: Sequence[Pair]) -> list[str]:
    found = {(r.model_type, r.task): r for r in records}
    must = [p for p in every if p.must]
    done = [found[p.model_type, p.task] for p in must if (p.model_type, p.task) in found]
    right = sum(r.outcome == "right" for r in done)
    lines = [f"{len(must)} pairs, {len(done)} measured, {right} right.", ""]
    rest: dict[str, list[str]] = {}
    for pair in must:
        record = found.get((pair.model_type, pair.task))
        if record is None:
            rest.setdefault(pair.model_type, []).append(f"{pair.task}: not reached")
        elif record.outcome != "right":
            rest.setdefault(pair.model_type, []).append(
                f"{pair.task}: {record.outcome}, {cause(record)}")
    complete = [m for m in dict.fromkeys(p.model_type for p in must) if m not in rest]
    lines += [f"Right in every task: {', '.join(complete) or 'none'}.", ""]
    if rest:
        lines += ["| model type | what is not right |", "| --- | --- |"]
        lines += [f"| {model} | {_cell('; '.join(said))} |" for model, said in rest.items()]
    return lines


def _by_cause(records: Sequence[Record]) -> list[str]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.outcome != "right":
            groups.setdefault((record.outcome, cause(record)), []).append(record)
    lines = ["| outcome | cause | pairs | model types |", "| --- | --- | --- | --- |"]
    for (outcome, words), members in sorted(groups.items(), key=lambda g: -len(g[1])):
        types = Counter(r.model_type for r in members)
        shown = ", ".join(list(types)[:8]) + (f" and {len(types) - 8} more" if len(types) > 8
                                              else "")
        lines.append(f"| {outcome} | {_cell(words)} | {len(members)} | {shown} |")
    return lines


def _all(records: Sequence[Record]) -> list[str]:
    lines = ["| kind | model type | task | ONNX | strategy | opset | worst ρ | TorchScript | s | "
             "cause |", "| --- " * 10 + "|"]
    for r in records:
        worst = f"{r.worst:.2f}" if r.worst is not None else ""
        script = r.torchscript if r.torchscript in ("", "right") else "no"
        lines.append(f"| {r.kind} | {r.model_type} | {r.task} | {r.outcome} | {r.strategy} "
                     f"| {r.opset or ''} | {worst} | {script} | {r.seconds:.1f} "
                     f"| {_cell('' if r.outcome == 'right' else cause(r))} |")
    return lines


def _count(records: Sequence[Record], outcome: str) -> int:
    return sum(r.outcome == outcome for r in records)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
