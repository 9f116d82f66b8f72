"""Which families of models that generate are exported to ONNX and proven, part by part and whole.

    python benchmarks/generation_families.py                 # a few minutes on two cores
    python benchmarks/generation_families.py --only llama,t5   # the rest as it was

Each model is a small one of its architecture with seeded weights. Each goes through the whole flow
with the whole shape matrix: the parts, every step's logits, and the tokens of greedy, sampled and
beam search. The table goes to ``docs/generation.md``, the records to
``benchmarks/results/generation_families.json`` after each family.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
PAGE = ROOT / "docs" / "generation.md"
RECORD = ROOT / "benchmarks" / "results" / "generation_families.json"
TEXT, SEQ2SEQ = "text-generation", "text2text-generation"
FAMILIES = {
    "gpt2": ("GPT-2", TEXT, "learned positions, tied head"),
    "gpt_neox": ("GPT-NeoX", TEXT, "partly rotary, parallel residual"),
    "opt": ("OPT", TEXT, "learned positions from the mask"),
    "llama": ("Llama", TEXT, "rotary, grouped heads"),
    "qwen2": ("Qwen2", TEXT, "rotary, grouped heads, biases"),
    "qwen3": ("Qwen3", TEXT, "norms of queries and keys"),
    "mistral": ("Mistral", TEXT, "sliding window"),
    "gemma": ("Gemma", TEXT, "one key-value head, scaled embeddings"),
    "phi": ("Phi", TEXT, "partly rotary, parallel residual"),
    "t5": ("T5", SEQ2SEQ, "relative positions"),
    "mt5": ("mT5", SEQ2SEQ, "relative positions, gated"),
    "bart": ("BART", SEQ2SEQ, "learned positions"),
    "marian": ("Marian", SEQ2SEQ, "fixed positions"),
    "m2m_100": ("M2M-100", SEQ2SEQ, "fixed positions, forced first token"),
    "whisper": ("Whisper", "automatic-speech-recognition", "features of a recording in"),
    "bark": ("Bark", "text-to-audio", "three transformers and a codec"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One family.

    Attributes:
        graphs: names of the components.
        verdict: of parity, or ``failed``.
        reason: why it is not ``pass``.
        worst_rho: largest ratio of the artifact's rounding error to the original's.
        gates: verdict of each.
        seconds: of export and validation together.
    """

    family: str
    graphs: tuple[str, ...]
    verdict: str
    reason: str
    worst_rho: float | None
    comparisons: int
    gates: dict[str, str]
    seconds: float


def source(family: str, task: str, directory: Path) -> Path:
    if family == "bark":
        import tiny_bark

        built: Path = tiny_bark.build(directory)
        return built
    import tiny_models

    # The library's own generate fails where a decoder has more layers than its encoder. Marian as
    # the library draws it hardly hears its encoder; drawn much wider, scores are so large that
    # rounding decides which position is attended to, and errors say nothing.
    options = {"mt5": {"num_decoder_layers": 2}, "marian": {"init_std": 0.1}}.get(family, {})
    return tiny_models.build(family, task, directory, **options)


def attempt(family: str, work: Path) -> Outcome:
    from modelport import artifacts, pipeline
    from modelport.errors import ModelportError

    _, task, _ = FAMILIES[family]
    start = time.monotonic()
    request = pipeline.ModelRequest(str(source(family, task, work / family)), task=task)
    out = work / "out"
    try:
        pipeline.export("onnx", request, out, validate=False, force=True)
        report = pipeline.validate_artifact(out)
    except ModelportError as error:
        seconds = round(time.monotonic() - start, 1)
        return Outcome(family, (), "failed", error.found, None, 0, {}, seconds)
    graphs = tuple(artifacts.read(out).manifest.components)
    reason = "; ".join(r.reason for r in report.failures[:2])
    return Outcome(family, graphs, report.verdict, reason, report.worst_rho, report.comparisons,
                   dict(report.gates), round(time.monotonic() - start, 1))


def table(outcomes: dict[str, Outcome]) -> str:
    lines = ["| family | task | what is special | graphs | parity | worst ρ | comparisons |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    reasons = []
    for family, (name, task, special) in FAMILIES.items():
        found = outcomes.get(family)
        if found is None:
            lines.append(f"| {name} | {task} | {special} | | not run | | |")
            continue
        rho = "" if found.worst_rho is None else f"{found.worst_rho:.2f}"
        lines.append(f"| {name} | {task} | {special} | {', '.join(found.graphs)} | {found.verdict}"
                     f" | {rho} | {found.comparisons:,} |")
        if found.reason:
            reasons += ["", f"{name}: {found.reason}"]
    return "\n".join(lines + reasons)


def write(outcomes: dict[str, Outcome]) -> None:
    import torch
    import transformers

    RECORD.write_text(json.dumps({
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "outcomes": [asdict(outcomes[family]) for family in FAMILIES if family in outcomes],
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    total = sum(o.comparisons for o in outcomes.values())
    text = (f"Written by `benchmarks/generation_families.py` with torch {torch.__version__} and "
            f"transformers {transformers.__version__}: small models with seeded weights, "
            f"{total:,} comparisons. ρ is the largest ratio of the artifact's rounding error to "
            f"the original's own.\n\n{table(outcomes)}")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- families -->")
    _, _, tail = rest.partition("<!-- /families -->")
    PAGE.write_text(f"{head}<!-- families -->\n\n{text}\n\n<!-- /families -->{tail}",
                    encoding="utf-8")


def recorded() -> dict[str, Outcome]:
    """The outcomes of the run before."""
    if not RECORD.exists():
        return {}
    outcomes = json.loads(RECORD.read_text(encoding="utf-8"))["outcomes"]
    return {o["family"]: Outcome(**{**o, "graphs": tuple(o["graphs"])}) for o in outcomes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(FAMILIES), help="families to run again")
    only = parser.parse_args().only.split(",")
    if unknown := sorted(set(only) - set(FAMILIES)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    warnings.simplefilter("ignore")
    outcomes = recorded()
    for family in only:
        with tempfile.TemporaryDirectory(prefix="families-") as work:
            outcomes[family] = attempt(family, Path(work))
        write(outcomes)
        found = outcomes[family]
        print(f"{family}: {found.verdict} {found.reason} {found.seconds} s", flush=True)


if __name__ == "__main__":
    main()
