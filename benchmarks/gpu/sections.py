"""What is measured, each section in a process of its own with a limit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large; ``small`` tries the whole path in a minute.

    Attributes:
        without: variants that are left out.
    """

    device: str
    small: bool
    work: Path
    without: str = ""

    def flags(self) -> list[str]:
        return [*(["--small"] if self.small else []), "--without", self.without]


def unavailable(device: str) -> str | None:
    """Why nothing can be measured, in one sentence; None when it can."""
    try:
        import modelport  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not installed: pip install -e '.[gpu,report,dev]'"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here; --device cpu --small tries the same path"
    return None


def environment() -> dict[str, Any]:
    from modelport.runtimes.benchmark import environment as env

    return dataclasses.asdict(env.read())


def kept(path: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of an earlier run with the same software on the same kind of machine."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text("utf-8"))

    def kind(found: Mapping[str, Any]) -> list[Any]:
        env = found["environment"]
        return [found["device"], found["small"], env["packages"], env["cpu"],
                [gpu["name"] for gpu in env["gpus"]]]  # fmt: skip

    return dict(before["sections"]) if kind(before) == kind(now) else {}


def run(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Run one section; never raises for what happens in it."""
    result = setting.work / f"{name}.json"
    result.unlink(missing_ok=True)
    log = setting.work / f"{name}.log"
    command = SECTIONS[name].command(setting, seconds, result)
    start = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            status = process.wait(seconds + 5)
            reason = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status, reason = process.wait(), f"killed after {seconds:.0f} s"
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if result.exists():
        found["result"] = json.loads(result.read_text("utf-8"))
    if status not in SECTIONS[name].fine or not result.exists():
        said = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
        return {**found, "status": "failed", "reason": f"{reason}: {said[0][:300]}"}
    return {**found, "status": "ok"}


def prepare(setting: Setting, chosen: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start to export what these sections measure."""
    with (setting.work / "prepare.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / "prepare.py"), setting.device, str(setting.work),
             *setting.flags(), "--sections", ",".join(chosen)],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """``fine``: exit statuses after which the result counts."""

    share: float
    command: Callable[[Setting, float, Path], list[str]]
    fine: tuple[int, ...] = (0,)


def _correct(setting: Setting, seconds: float, result: Path) -> list[str]:
    return [sys.executable, str(HERE / "correct.py"), setting.device, str(result),
            *(["--small"] if setting.small else [])]  # fmt: skip


def _measured(what: str, place: str) -> Callable[[Setting, float, Path], list[str]]:
    """A section of ``measure.py``; what is exported for one is there for the next in its place."""

    def command(setting: Setting, seconds: float, result: Path) -> list[str]:
        return [sys.executable, str(HERE / "measure.py"), what, "--device", setting.device,
                "--seconds", f"{seconds - 8:.0f}", "--work", str(setting.work / place),
                "--result", str(result), *setting.flags()]  # fmt: skip

    return command


UNTIMED = "correct"
SECTIONS: Mapping[str, Section] = {
    UNTIMED: Section(1.5, _correct, fine=(0, 1)),
    "grid": Section(2.6, _measured("grid", "encoder")),
    "sentences": Section(3.0, _measured("sentences", "encoder")),
    "t5": Section(1.0, _measured("t5", "t5")),
    "bark": Section(1.5, _measured("bark", "bark")),
}
NAMES = tuple(SECTIONS)
SHARES = {name: section.share for name, section in SECTIONS.items()}
