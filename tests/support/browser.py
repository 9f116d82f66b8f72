"""A page looked at with a real browser: headless Chromium, driven by its command line alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
ABSENT = None if PROGRAM else "there is no Chromium here: apt-get install chromium"
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\] (.*)")
_OF_THE_BROWSER = "not an origin"
"""What the network log names as the initiator where no page made the request."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a page.

    Attributes:
        dom: the document once its scripts had run.
        console: everything it said there, errors nobody caught included.
        requests: every URL it asked for besides itself.
    """

    dom: str
    console: tuple[str, ...]
    requests: tuple[str, ...]
    screenshot: Path

    def charts(self) -> dict[str, int]:
        """How many marks each Vega chart has drawn, by the id of the element around it."""
        found = {}
        for part in re.split(r'(?=<div[^>]* id=")', self.dom):
            name = re.match(r'<div[^>]* id="([^"]+)"', part)
            if name and "<svg" in part:
                found[name[1]] = part.count('role="graphics-symbol" aria-roledescription')
        return found


def look(page: Path, folder: Path, *, width: int = 1280, height: int = 4000) -> Seen:
    """Open a file, let its scripts run for five seconds of its own time, and report."""
    assert PROGRAM is not None
    network, screenshot = folder / "network.json", folder / f"{page.stem}.png"
    done = subprocess.run(
        [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--log-level=0", f"--log-net-log={network}",
         f"--window-size={width},{height}", f"--screenshot={screenshot}",
         "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True)
    return Seen(done.stdout, tuple(_CONSOLE.findall(done.stderr)), _requests(network), screenshot)


def _requests(network: Path) -> tuple[str, ...]:
    log = json.loads(network.read_text("utf-8"))
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = (e.get("params", {}) for e in log["events"] if e["type"] == started)
    return tuple(p["url"] for p in asked
                 if "url" in p and p["initiator"] != _OF_THE_BROWSER and p["url"][:5] != "file:")
