"""Everything on the GPU in one command, measured and checked, within nine minutes.

    make gpu                                  # or: python benchmarks/gpu
    python benchmarks/gpu --device cpu --small --output DIR     # the same path without a card

Sections, each with its share of the time, each leaving its file as soon as it is done; a section
that fails or has no time left says so in the report and the rest goes on. Nothing is installed:
what is absent is an empty column with its reason. Exports go on beside the section that times
nothing. Writes ``gpu.json``, ``gpu.md`` and plots; with ``--sections``, the others' results stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import report
import sections

HERE = Path(__file__).resolve().parent
SECONDS = 530.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the path")
    parser.add_argument("--sections", default=",".join(sections.NAMES))
    parser.add_argument("--without", default="", help="variants to leave out, by name; with ';'")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "gpu")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / ".bench" / "gpu")
    arguments = parser.parse_args()
    if reason := sections.unavailable(arguments.device):
        print(f"error: {reason}", file=sys.stderr)
        return 6
    start = time.monotonic()
    chosen = arguments.sections.split(",")
    if unknown := sorted(set(chosen) - set(sections.NAMES)):
        print(f"error: there is no section {', '.join(unknown)}; there are "
              f"{', '.join(sections.NAMES)}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    setting = sections.Setting(
        arguments.device, arguments.small, arguments.work, arguments.without)
    found = {"environment": sections.environment(), "device": arguments.device,
             "small": arguments.small, "sections": {}}
    found["sections"] = sections.kept(arguments.output / "gpu.json", found)
    preparing = sections.prepare(setting, chosen)
    for index, name in enumerate(chosen):
        if name != sections.UNTIMED:
            preparing.wait()
        left = arguments.seconds - (time.monotonic() - start)
        allowed = left * sections.SHARES[name] / sum(sections.SHARES[n] for n in chosen[index:])
        print(f"== {name}: {allowed:.0f} s", file=sys.stderr, flush=True)
        found["sections"][name] = sections.run(name, setting, allowed)
        (arguments.output / "gpu.json").write_text(json.dumps(found), "utf-8")
        report.write(found, arguments.output)
    print((arguments.output / "gpu.md").read_text("utf-8"))
    preparing.wait()
    failed = [n for n, s in found["sections"].items() if s["status"] != "ok"]
    return 5 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
