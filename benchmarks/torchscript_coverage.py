"""Which architectures become TorchScript archives and AOTInductor packages, proven by parity.

    python benchmarks/torchscript_coverage.py               # TorchScript: about 5 minutes
    python benchmarks/torchscript_coverage.py --compile     # AOTInductor too: about 10 minutes
    python benchmarks/torchscript_coverage.py --compile --only t5,vit    # the rest as it was

Each model is a small one of its architecture with seeded weights. Each export goes through the
whole flow, validation over the shape matrix included. The table goes to ``docs/torchscript.md``,
the records to ``benchmarks/results/torchscript_coverage.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
PAGE = ROOT / "docs" / "torchscript.md"
RESULTS = ROOT / "benchmarks" / "results"
FAMILIES = {
    "camembert": "encoder, tied projection",
    "bert": "encoder, segments",
    "distilbert": "encoder",
    "albert": "encoder, one layer repeated",
    "electra": "encoder, factored embedding",
    "mpnet": "encoder, bucketed relative positions",
    "deberta-v2": "encoder, disentangled attention",
    "gpt2": "decoder, transposed weights",
    "mixtral": "decoder, rotary positions, experts",
    "t5": "encoder and decoder",
    "vit": "image transformer",
    "resnet": "convolutions, batch norm",
    "wav2vec2": "waveform, strided convolutions",
}
COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "trace, sdpa": ("torchscript", {"mode": "trace", "attention": "sdpa"}),
    "trace, eager": ("torchscript", {"mode": "trace", "attention": "eager"}),
    "script, sdpa": ("torchscript", {"mode": "script", "attention": "sdpa"}),
    "script, eager": ("torchscript", {"mode": "script", "attention": "eager"}),
}
COMPILED = {"aotinductor, fp32": ("aotinductor", {})}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One export of one family.

    Attributes:
        route: what made the graph; empty where nothing did.
        verdict: of parity, or ``failed``.
        reason: why it is not ``pass``.
        worst_rho: largest ratio of the artifact's rounding error to the original's.
    """

    family: str
    column: str
    route: str
    verdict: str
    reason: str
    worst_rho: float | None
    comparisons: int
    seconds: float


def attempt(source: Path, family: str, column: str, out: Path) -> Outcome:
    from modelport import artifacts, exporters, pipeline
    from modelport.errors import ModelportError

    name, given = {**COLUMNS, **COMPILED}[column]
    options = exporters.get(name).options_type(**given)
    start = time.monotonic()
    try:
        request = pipeline.ModelRequest(str(source))
        pipeline.export(name, request, out, options, validate=False)
        report = pipeline.validate_artifact(out)
    except ModelportError as error:
        seconds = round(time.monotonic() - start, 1)
        return Outcome(family, column, "", "failed", error.found, None, 0, seconds)
    artifact = artifacts.read(out)
    summary = artifact.manifest.parity
    return Outcome(
        family, column, artifact.manifest.facts["route"], report.verdict,
        "; ".join(r.reason for r in report.failures[:2]), summary and summary.worst_rho,
        report.comparisons, round(time.monotonic() - start, 1),
    )  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """Families down, columns across; a cell is the verdict, and the reason is below."""
    ran = {o.column for o in outcomes}
    columns = [column for column in (*COLUMNS, *COMPILED) if column in ran]
    lines = [
        "| architecture | what is special | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    found = {(o.family, o.column): o for o in outcomes}
    for family, special in FAMILIES.items():
        cells = []
        for column in columns:
            outcome = found.get((family, column))
            if outcome is None:
                cells.append("not run")
                continue
            worst = f", {outcome.worst_rho:.2f}" if outcome.worst_rho is not None else ""
            cells.append(f"{outcome.verdict}{worst}")
        lines.append(f"| {family} | {special} | " + " | ".join(cells) + " |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.verdict != "pass":
            reasons.setdefault((outcome.family, outcome.reason), []).append(outcome.column)
    for (family, reason), failed in reasons.items():
        which = "all" if len(failed) == len(columns) else "; ".join(failed)
        lines += ["", f"{family} ({which}): {reason}"]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip


def write(outcomes: list[Outcome]) -> None:
    found = versions()
    total = sum(o.comparisons for o in outcomes)
    text = (
        f"Written by `benchmarks/torchscript_coverage.py` with torch {found['torch']} and "
        f"transformers {found['transformers']}: {len(outcomes)} exports, {total} comparisons at "
        "shapes never traced, with padding on both sides. The number is the largest ratio of the "
        "artifact's rounding error to the original's own.\n\n" + table(outcomes)
    )
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split("<!-- outcomes:", 1)
    marker, _, tail = rest.partition(" -->")
    tail = tail.split("<!-- /outcomes -->", 1)[1]
    PAGE.write_text(
        f"{head}<!-- outcomes:{marker} -->\n\n{text}\n\n<!-- /outcomes -->{tail}", encoding="utf-8"
    )
    RESULTS.mkdir(exist_ok=True)
    record: dict[str, Any] = {"versions": found, "outcomes": [asdict(o) for o in outcomes]}
    path = RESULTS / "torchscript_coverage.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def recorded() -> list[Outcome]:
    """The outcomes of the run before."""
    path = RESULTS / "torchscript_coverage.json"
    return [Outcome(**o) for o in json.loads(path.read_text(encoding="utf-8"))["outcomes"]]


def kept(outcomes: list[Outcome], only: list[str], columns: list[str]) -> list[Outcome]:
    """Earlier outcomes that a run of some architectures in some columns does not replace."""
    return [o for o in outcomes if o.family not in only or o.column not in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="AOTInductor as well")
    parser.add_argument("--only", default=",".join(FAMILIES), help="architectures to run again")
    chosen = parser.parse_args()
    only = chosen.only.split(",")
    if unknown := sorted(set(only) - set(FAMILIES)):
        parser.error(f"no such architecture: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    warnings.simplefilter("ignore")
    import tiny_models

    columns = [*COLUMNS, *(COMPILED if chosen.compile else ())]
    outcomes = kept(recorded(), only, columns) if len(only) < len(FAMILIES) else []
    with tempfile.TemporaryDirectory(prefix="coverage-") as work:
        for family in only:
            task = tiny_models.TASKS.get(family, "feature-extraction")
            source = tiny_models.build(family, task, Path(work) / family)
            for column in columns:
                outcome = attempt(source, family, column, Path(work) / f"{family} {column}")
                outcomes.append(outcome)
                print(outcome, flush=True)
    write(outcomes)


if __name__ == "__main__":
    main()
