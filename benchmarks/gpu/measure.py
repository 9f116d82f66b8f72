"""Entry point of a section's process."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import grid
import prepare
import sentences


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("grid", "sentences", "t5", "bark"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--work", type=Path, required=True, help="shared: artifacts are kept there")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--without", default="")
    arguments = parser.parse_args()
    if arguments.what in ("t5", "bark"):
        import generating

        measured = getattr(generating, arguments.what)
        found = measured(arguments.device, arguments.small, arguments.work)
        arguments.result.write_text(json.dumps(found, indent=1), "utf-8")
        return
    plan = grid.planned(arguments.device, arguments.small, arguments.seconds)
    if arguments.what == "sentences":
        count, batches = (8, (1, 4)) if arguments.small else (1000, sentences.BATCHES)
        # One at a time, the order changes nothing.
        passes = tuple(grid.Pass(count, o, b) for b in batches
                       for o in (sentences.ORDERS if b > 1 else sentences.ORDERS[:1]))
        plan = replace(plan, shapes=(), passes=passes, names=sentences.FORMATS)
    without = tuple(arguments.without.split(";"))
    named = plan.names
    plan = replace(plan, names=tuple(n for n in plan.names if n not in without))
    made = prepare.encoder(arguments.device, arguments.small, arguments.work.parent,
                           arguments.what, without)
    found = grid.run(plan, arguments.work, made)
    found["absent"] |= {name: "left out of this run" for name in without
                        if name in named}  # fmt: skip
    if arguments.what == "sentences":
        rows = sentences.table(found)
        more = {"rows": rows, "claims": sentences.claims(rows, found["absent"])}
    else:
        rows, warm = grid.table(found), grid.warm_up(found)
        more = {"rows": rows, "warm_up": warm, "claims": grid.claims(rows, warm, found["absent"])}
    arguments.result.write_text(json.dumps({**found, **more}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
