"""The Markdown view of benchmarks/results/validator.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    parts = {"faults": _faults, "alarms": _alarms, "precisions": _precisions,
             "precision_alarms": _precision_alarms, "peers": _peers,
             "constants": _constants, "speed": _speed}
    lines = ["# The validator, measured", "",
             "Recomputed by `python benchmarks/validator.py`. Tiny models of three layers with "
             "seeded weights; every number is a count of this run.", ""]
    for name, show in parts.items():
        if name in result:
            lines += [*show(result[name]["result"]), "", _conditions(result[name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(part: Mapping[str, Any]) -> str:
    env = part["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    load = "/".join(f"{v:.1f}" for v in part["load"])
    return (f"<sub>{env['cpu']}, {env['cores']} cores shared with other work (load average at the "
            f"end {load}); {versions}; {part['seconds']} s.</sub>")


def _rate(found: Mapping[str, Any]) -> tuple[int, int]:
    every = [o for kinds in found.values() for o in kinds.values()]
    return sum(not o["accepted"] for o in every), len(every)


def _faults(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Faults rejected, float32", "", "| where | kinds of fault | mutants | rejected |",
             "| --- | --- | --- | --- |"]
    for place, title in (("onnx", "ONNX graph"), ("torch", "torch module"),
                         ("faint", "of the size of rounding (no claim)")):
        hit, count = _rate(found[place])
        lines.append(f"| {title} | {len(found[place])} | {count} | {hit} ({hit / count:.0%}) |")
    lines += ["", "| fault in the graph | smallest … largest ρ | architectures | rejected |",
              "| --- | --- | --- | --- |"]
    for name, kinds in (found["onnx"] | found["faint"]).items():
        rhos = sorted(o["rho"] for o in kinds.values() if o["rho"] is not None)
        span = f"{rhos[0]:.3g} … {rhos[-1]:.3g}" if rhos else "Gate 0"
        hit = sum(not o["accepted"] for o in kinds.values())
        lines.append(f"| {name} | {span} | {len(kinds)} | {hit} |")
    return lines


def _alarms(every: list[Mapping[str, Any]]) -> list[str]:
    # What the runtime refuses to open is no correct export, and its rejection no alarm.
    found = [r for r in every if "Load model from" not in r["by"]]
    closed = sorted({f"{r['kind']} {r['runtime'].rpartition(' ')[0]}" for r in every
                     if r not in found})
    wrong = [r for r in found if not r["accepted"]]
    excess = max(r["excess"] for r in found if r["excess"] is not None)
    comparisons = sum(r["comparisons"] for r in found)
    upper = 3 / len(found)
    lines = ["## False alarms, float32", "",
             f"{len(wrong)} of {len(found)} validations of correct exports ({comparisons} "
             "comparisons: 6 architectures × 3 seeds × 4 opsets × 3 optimisation levels, "
             "TorchScript and eager; up to 24 cases each). With none in "
             f"{len(found)} the rate is below {upper:.1%} at 95 % confidence. " if not wrong else
             f"{len(wrong)} of {len(found)} validations of correct exports. ",
             f"The largest error was {excess:.2f} of what is allowed.", "",
             *([f"Not counted: {len(every) - len(found)} runs of exports that ONNX Runtime refuses "
                f"to open ({', '.join(closed)}), rejected as they should be.", ""]
               if closed else []),
             "| runtime | runs | alarms | largest error / allowed |", "| --- | --- | --- | --- |"]
    for runtime in dict.fromkeys(r["runtime"] for r in found):
        some = [r for r in found if r["runtime"] == runtime]
        top = max(r["excess"] for r in some if r["excess"] is not None)
        lines.append(f"| {runtime} | {len(some)} | {sum(not r['accepted'] for r in some)} | "
                     f"{top:.2f} |")
    return lines


def _precisions(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Reduced precision, Gate B alone", "",
             "Gate B never passes alone: it needs Gate A on the float32 parent, which rejects "
             "every one of these faults. What it would see by itself (fp16 and int8 run by ONNX "
             "Runtime, bf16 by OpenVINO):", "",
             "| precision | faults rejected | could not be made | correct ones rejected |",
             "| --- | --- | --- | --- |"]
    missed = []
    for label, kinds in found.items():
        faults = [(n, o) for k in kinds.values() for n, o in k.items() if n]
        judged = [(n, o) for n, o in faults if o["accepted"] is not None]
        accepted = Counter(n for n, o in judged if o["accepted"])
        hit = len(judged) - accepted.total()
        good = [k[""] for k in kinds.values()]
        alarms = sum(o["accepted"] is False for o in good)
        lines.append(f"| {label} | {hit} of {len(judged)} ({hit / max(1, len(judged)):.0%}) | "
                     f"{len(faults) - len(judged)} | {alarms} of {len(good)} |")
        of = Counter(n for n, _ in judged)
        shown = (f"{n} ({count} of {of[n]})" for n, count in accepted.most_common())
        missed += ["", f"Accepted in {label}: {', '.join(shown)}."]
    return [*lines, *missed]


def _precision_alarms(found: list[Mapping[str, Any]]) -> list[str]:
    lines = ["## Reduced precision, correct artifacts", "",
             "Gate B on artifacts without a fault, by architecture and seed.", "",
             "| precision | artifacts | comparisons | rejected | largest error / allowed |",
             "| --- | --- | --- | --- | --- |"]
    for label in dict.fromkeys(r["precision"] for r in found):
        some = [r for r in found if r["precision"] == label]
        judged = [r for r in some if r["accepted"] is not None]
        wrong = [f"{r['kind']} seed {r['seed']}" for r in judged if not r["accepted"]]
        top = max(r["excess"] for r in judged if r["excess"] is not None)
        lines.append(f"| {label} | {len(judged)} | {sum(r['comparisons'] for r in judged)} | "
                     f"{len(wrong)}{': ' * bool(wrong)}{', '.join(wrong)} | {top:.2f} |")
    return lines


def _peers(found: Mapping[str, Any]) -> list[str]:
    verdicts = found["verdicts"]
    names = list(verdicts["modelport"])
    good = [n for n in names if n.split("|")[1].startswith("level ")]
    bad = [n for n in names if n not in good]
    lines = ["## Other tools on the same files", "",
             "Polygraphy and torch get the outputs of both sides in every case, masked positions "
             "set to zero on both; optimum-onnx draws its own inputs, as it always does. Defaults "
             "everywhere. A case that raises counts as rejected. torch.onnx.verification measures "
             "and does not judge; the verdict is torch's own test assertion.", "",
             "| tool | faults rejected | could not judge | correct exports rejected | could not "
             "judge |", "| --- | --- | --- | --- | --- |"]
    for tool, seen in verdicts.items():
        cells = []
        for group in (bad, good):
            judged = [n for n in group if seen.get(n) in ("accepted", "rejected")]
            hit = sum(seen[n] == "rejected" for n in judged)
            share = f" ({hit / len(judged):.0%})" if judged else ""
            cells += [f"{hit} of {len(judged)}{share}", str(len(group) - len(judged))]
        lines.append(f"| {tool} | {' | '.join(cells)} |")
    for tool, versions in found["versions"].items():
        shown = ", ".join(f"{k} {v}" for k, v in versions.items())
        missed = [n.replace("|", ": ") for n in bad if verdicts[tool].get(n) == "accepted"]
        lines += ["", f"{tool}: {shown}. Accepted faults: {'; '.join(missed) or 'none'}."]
    return lines


def _constants(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Constants", "", f"Fitted on {', '.join(found['fit'])}; checked on "
             f"{', '.join(found['check'])}.", "",
             "| m | k | fit: alarms | check: alarms | fit: faults missed | check: faults missed |",
             "| --- | --- | --- | --- | --- | --- |"]
    pairs = dict.fromkeys((r["m"], r["k"]) for r in found["table"])
    for m, k in pairs:
        cells: dict[str, list[str]] = {"alarms": [], "missed": []}
        for group in ("fit", "check"):
            rows = [r for r in found["table"] if (r["m"], r["k"], r["group"]) == (m, k, group)]
            cells["alarms"].append(f"{sum(r['alarms'] for r in rows)} of "
                                   f"{sum(r['runs'] for r in rows)}")
            faults = sum(r["faults"] or 0 for r in rows)
            cells["missed"].append(f"{sum(r['missed'] or 0 for r in rows)} of {faults}"
                                   if faults else "–")
        lines.append(f"| {m:g} | {k:g} | {' | '.join(cells['alarms'] + cells['missed'])} |")
    return lines


def _speed(found: Mapping[str, Any]) -> list[str]:
    before = "/".join(f"{v:.1f}" for v in found["load_before"])
    after = "/".join(f"{v:.1f}" for v in found["load_after"])
    imports = median(found["imports_s"])
    lines = ["## Time and memory", "",
             "`modelport validate` as a whole, no cache: this process and the one the artifact "
             f"runs in. Importing torch and transformers alone takes {imports:.1f} s. Median [min, "
             f"max]; memory is the most held at once. Load average before {before}, after {after}.",
             "",
             "| artifact | runs | wall | wall without imports | CPU | peak | cases | comparisons | "
             "left out |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name in ("camembert-base", "tiny"):
        runs = found[name]
        walls, cpu = [r["wall_s"] for r in runs], median(r["cpu_s"] for r in runs)
        peak = max(r["peak_mb"] for r in runs)
        lines.append(f"| {name} | {len(runs)} | {median(walls):.1f} s [{min(walls):.1f}, "
                     f"{max(walls):.1f}] | {median(walls) - imports:.1f} s | {cpu:.1f} s | "
                     f"{peak:.0f} MB | {runs[0]['cases']} | {runs[0]['comparisons']} | "
                     f"{len(runs[0]['left_out'])} |")
    return lines
