"""Entry point of a section's process."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import grid
import sentences

TINY = {"model": "demo", "weights": "pretrained", "task": "feature-extraction"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("grid", "sentences", "t5", "bark"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--work", type=Path, required=True, help="shared: artifacts are kept there")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.what in ("t5", "bark"):
        import generating

        measured = getattr(generating, arguments.what)
        found = measured(arguments.device, arguments.small, arguments.work)
        arguments.result.write_text(json.dumps(found, indent=1), "utf-8")
        return
    plan = grid.Plan(device=arguments.device, seconds=arguments.seconds)
    if arguments.small:
        plan = replace(plan, **TINY, shapes=((1, 16), (2, 32)), rounds=2, cell_seconds=0.05)
    if arguments.what == "sentences":
        count, batches = (8, (1, 4)) if arguments.small else (500, sentences.BATCHES)
        passes = tuple(grid.Pass(count, o, b) for b in batches for o in sentences.ORDERS)
        plan = replace(plan, shapes=(), passes=passes, names=sentences.FORMATS,
                       rounds=min(plan.rounds, 3))  # fmt: skip
    found = grid.run(plan, arguments.work)
    if arguments.what == "sentences":
        rows = sentences.table(found)
        more = {"rows": rows, "claims": sentences.claims(rows)}
    else:
        rows, warm = grid.table(found), grid.warm_up(found)
        more = {"rows": rows, "warm_up": warm, "claims": grid.claims(rows, warm)}
    arguments.result.write_text(json.dumps({**found, **more}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
