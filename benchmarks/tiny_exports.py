"""Seconds of `modelport export onnx` on tiny models, imports and full validation included.

    python benchmarks/tiny_exports.py               # 20 pairs, 3 rounds
    python benchmarks/tiny_exports.py --peer PYTHON # one that has optimum-onnx already

Pairs of model type and task are drawn at random from those that `make coverage` found right, and
built as it builds them. Each export is a process of its own with an empty cache of references, so
that nothing is known of the model, while the names in the installed transformers, kept since its
first import, are; beside it optimum-onnx exports the same directory and validates at the one shape
it traced. Results go to ``benchmarks/results/tiny_exports.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _paired import Run, environment, once, ratios, records, summary, venv
from export_cost import PACKAGES, PEER_REQUIREMENTS, RESULTS, WORK

SEED = 0
OURS, PEER = "modelport", "optimum-onnx"

BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import measure, pairs
wanted, task, root = sys.argv[2], sys.argv[3], Path(sys.argv[4])
pair = next(p for p in pairs.pairs() if (p.model_type, p.task) == (wanted, task))
for degree in measure.DEGREES:
    try:
        found, _ = measure.build(pair, root / degree, degree)
        measure.original(found, task)
    except Exception:
        continue
    print(found)
    break
"""

EXPORT = "import sys; from optimum.exporters.onnx import main_export; " \
         "main_export(sys.argv[1], sys.argv[3], task=sys.argv[2])"


def drawn(count: int) -> list[tuple[str, str]]:
    """Pairs that were found right, at random."""
    found = json.loads((RESULTS / "coverage.json").read_text())["records"]
    right = sorted((r["model_type"], r["task"]) for r in found if r["outcome"] == "right")
    return sorted(random.Random(SEED).sample(right, count))


def built(model_type: str, task: str) -> Path:
    """The checkpoint that `make coverage` would make of a pair."""
    root = WORK / "tiny" / f"{model_type}-{task}"
    shutil.rmtree(root, ignore_errors=True)
    command = [sys.executable, "-c", BUILD, str(Path(__file__).parent / "breadth"), model_type,
               task, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


def compare(python: Path, model_type: str, task: str, rounds: int) -> dict[str, Any]:
    """Both tools in turn; the first pair warms the disk cache and is not counted."""
    checkpoint = built(model_type, task)
    runs: dict[str, list[Run]] = {OURS: [], PEER: []}
    for number in range(rounds + 1):
        for name, made in runs.items():
            out, cache = WORK / "out" / name, WORK / "out" / "cache"
            for place in (out, out.with_name(f"{name}.rejected"), cache / "reference"):
                shutil.rmtree(place, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            command = (
                [sys.executable, "-m", "modelport", "export", "onnx", "--model", str(checkpoint),
                 "--task", task, "--output", str(out), "--quiet"]
                if name == OURS else [str(python), "-c", EXPORT, str(checkpoint), task, str(out)])
            run = once(command, WORK / f"{name}.log", {"MODELPORT_CACHE": str(cache)})
            print(f"{model_type} {task} {number} {name}: {run.wall_s} s, status {run.status} "
                  f"{run.stderr_tail[-120:]}", flush=True)
            if number:
                made.append(run)
    return {"model_type": model_type, "task": task,
            **{name: {**summary(made), "raw": records(made)} for name, made in runs.items()},
            "ratio": ratios(*runs.values(), "wall_s")}


def markdown(found: dict[str, Any]) -> str:
    """The table, with the medians over pairs below."""
    env = found["environment"]
    versions = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in of.items())
                         for name, of in env["versions"].items())
    lines = [
        "# Exports of tiny models",
        "",
        f"Written by `python benchmarks/tiny_exports.py`. {env['cpu']}, {env['cores']} cores, "
        f"{env['memory_gb']} GB, {env['system']}. {versions}.",
        "",
        f"Wall seconds of whole processes, in turn, median [least, most] of {found['rounds']}; a "
        "first round is not counted. modelport validates at every shape of its default matrix "
        "(references not yet known), optimum-onnx at the one it traced. A dash: it failed.",
        "",
        f"| model type | task | {OURS}, s | {PEER}, s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["pairs"]:
        ratio = f"{row['ratio']['median']:.2f}" if row["ratio"] else "–"
        lines.append(f"| {row['model_type']} | {row['task']} | {_seconds(row[OURS])} | "
                     f"{_seconds(row[PEER])} | {ratio} |")
    lines.append("")
    for name in (OURS, PEER):
        medians = [row[name]["wall_s"]["median"] for row in found["pairs"] if "wall_s" in row[name]]
        lines.append(f"- {name}: {len(medians)} of {len(found['pairs'])} exported, median "
                     f"{statistics.median(medians):.1f} s" if medians else f"- {name}: none")
    both = [row["ratio"]["median"] for row in found["pairs"] if row["ratio"]]
    if both:
        lines.append(f"- ratio where both did ({len(both)}): median {statistics.median(both):.2f}, "
                     f"{min(both):.2f} to {max(both):.2f}")
    return "\n".join(lines) + "\n"


def _seconds(found: dict[str, Any]) -> str:
    if "wall_s" not in found:
        return "–"
    wall = found["wall_s"]
    return f"{wall['median']:.1f} [{wall['min']:.1f}, {wall['max']:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="interpreter that has optimum-onnx already")
    given = parser.parse_args()
    python = given.peer or venv(WORK / "peer", PEER_REQUIREMENTS)
    names = {OURS: sys.executable, PEER: str(python)}
    versions = environment(dict.fromkeys(names.values(), PACKAGES))
    versions["versions"] = {name: versions["versions"][p] for name, p in names.items()}
    versions["versions"][PEER].pop(OURS, None)  # from the working directory
    found = {"environment": versions, "seed": SEED, "rounds": given.rounds,
             "pairs": [compare(python, *pair, given.rounds) for pair in drawn(given.pairs)]}
    text = json.dumps(found, indent=1).replace(str(WORK), ".bench")
    (RESULTS / "tiny_exports.json").write_text(text + "\n")
    (RESULTS / "tiny_exports.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
