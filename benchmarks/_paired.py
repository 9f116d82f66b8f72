"""Time whole processes side by side: interleaved, with the operating system's own accounting."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: wall seconds, CPU seconds, peak resident MB, exit status, last words.

    ``peak_mb`` is the largest single process among the command and its children (wait4's
    ``ru_maxrss``), in 10^6 bytes.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    status: int
    stderr_tail: str = ""


def once(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end and account for it."""
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    return Run(
        round(wall, 3),
        round(usage.ru_utime + usage.ru_stime, 3),
        round(usage.ru_maxrss * 1024 / 1e6, 1),
        process.returncode,
        "" if process.returncode == 0 else " | ".join(tail)[-500:],
    )


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Median and spread of the successful runs, and how many there were."""
    good = [r for r in runs if r.status == 0]
    found: dict[str, Any] = {"runs": len(runs), "succeeded": len(good)}
    for name in ("wall_s", "cpu_s", "peak_mb"):
        values = [getattr(r, name) for r in good]
        if values:
            found[name] = {
                "min": min(values), "median": statistics.median(values), "max": max(values)
            }
    return found


def ratios(ours: Sequence[Run], theirs: Sequence[Run], name: str) -> dict[str, float] | None:
    """Ratio ours/theirs pair by pair, so that a drift of the machine cancels."""
    pairs = [
        getattr(a, name) / getattr(b, name)
        for a, b in zip(ours, theirs, strict=True)
        if a.status == b.status == 0
    ]
    if not pairs:
        return None
    return {
        "min": round(min(pairs), 3),
        "median": round(statistics.median(pairs), 3),
        "max": round(max(pairs), 3),
    }


def environment(packages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The machine, and the versions of the named packages in each interpreter."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {python: _versions(python, names) for python, names in packages.items()},
    }


def _versions(python: str, names: Sequence[str]) -> dict[str, str]:
    code = (
        "import json,sys\nfrom importlib.metadata import version, PackageNotFoundError\n"
        "found={'python':sys.version.split()[0]}\n"
        f"for n in {list(names)!r}:\n"
        " try: found[n]=version(n)\n except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def venv(directory: Path, requirements: Sequence[str]) -> Path:
    """A virtual environment with these packages; made once. Returns its interpreter."""
    python = directory / "bin" / "python"
    ready = directory / ".ready"
    if ready.exists() and ready.read_text() == "\n".join(requirements):
        return python
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    for requirement in requirements:
        subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
    ready.write_text("\n".join(requirements))
    return python


def records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as data."""
    return [asdict(r) for r in runs]
