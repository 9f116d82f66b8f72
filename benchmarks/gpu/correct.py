"""Correct first: every runtime held to its contract on the device, and what only a GPU can show.

    python correct.py DEVICE RESULT.json [--small]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


def main(device: str, result: Path, small: bool) -> int:
    if small:
        what = ["tests/conformance/test_runtimes.py", "-k", "torch_eager or onnxruntime"]
    else:
        what = ["tests/conformance/test_runtimes.py", "-m", "not slow"]
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        workers = ["-n", str(min(10, os.cpu_count() or 1))] if not small else []
        # Names as they come: a run that is killed for its time leaves nothing else. Plugins that
        # happen to be installed beside ours may turn a warning into an error.
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p",
                   "no:benchmark"]  # fmt: skip
        runs = [[*command, *what, "--device", device, *workers, f"--junit-xml={junit}"]]
        if not small:
            # What only a GPU can show: graphs replayed, engines built, providers that stay there.
            runs.append([*command, "tests/runtimes", "tests/exporters", "-m", "gpu",
                         f"--junit-xml={Path(scratch) / 'gpu.xml'}"])  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen(c, cwd=ROOT, env=environment) for c in runs]
        status = max(process.wait() for process in started)
        cases = [case for path in sorted(Path(scratch).glob("*.xml"))
                 for case in ElementTree.parse(path).iter("testcase")]  # fmt: skip
    outcomes: Counter[str] = Counter()
    absent: Counter[str] = Counter()
    failures = []
    for case in cases:
        skipped, failed = case.find("skipped"), case.find("failure")
        failed = case.find("error") if failed is None else failed
        if failed is not None:
            outcomes["failed"] += 1
            failures.append({"test": case.get("name"), "said": (failed.get("message") or "")[:300]})
        elif skipped is not None:
            outcomes["skipped"] += 1
            absent[skipped.get("message") or ""] += 1
        else:
            outcomes["passed"] += 1
    result.write_text(json.dumps({
        "outcomes": dict(outcomes), "absent": dict(absent), "failures": failures,
        "claims": [{
            "claim": f"every runtime keeps its contract on {device}",
            "found": ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())),
            "reached": bool(outcomes["passed"]) and not outcomes["failed"],
        }],
    }, indent=1), "utf-8")  # fmt: skip
    return status if status in (0, 1) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), "--small" in sys.argv))
