"""kill -9 at random moments: what is at the destination is absent or verifies."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

RUNNER = """
import os, random, signal, sys, time
from pathlib import Path
from modelport.artifacts import Manifest, Source, collect, directory, read, stage, verify
from modelport.artifacts import with_report, write_manifest
from modelport.spec import ModelSpec

destination, mode, rounds = Path(sys.argv[1]) / "out", sys.argv[2], int(sys.argv[3])
if mode == "aside":
    directory.exchange = lambda *_: False
source = Source("m", "t", "random", "d")

def write(number):
    with stage(destination, force=True) as staging:
        for part in range(4):
            (staging.root / f"part{part}").write_text(str(number) * 100)
        manifest = Manifest("onnx", ModelSpec((), ()), source, {}, {"number": number}, {},
                            collect(staging.root))
        write_manifest(staging.root, manifest)
        staging.commit()

def child():
    number = os.getpid()
    while True:
        number += 1
        if mode == "report":
            with_report(read(destination), "parity.json", "x" * (number % 100))
        else:
            write(number)

write(0)
seen = set()
random.seed(1)
span = 0.01
for turn in range(rounds):
    pid = os.fork()
    if not pid:
        try:
            child()
        finally:
            os._exit(3)
    time.sleep(random.uniform(0.0, span))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the child ended by itself"
    # Whatever the machine's speed, about half of the kills come after a commit.
    count = len(seen)
    if destination.exists():
        found = verify(destination).manifest
        seen.add((found.facts["number"], found.files.get("parity.json")))
    else:
        assert mode == "aside", "the destination vanished"
    span = min(span * (1.3 if len(seen) == count else 0.8), 1.0)
try:
    with stage(destination):
        pass
except Exception as error:
    assert type(error).__name__ == "DestinationExists", error
verify(destination)
assert sorted(os.listdir(destination.parent)) == ["out"], os.listdir(destination.parent)
print(len(seen))
"""


@pytest.mark.parametrize("mode", ["exchange", "aside", "report"])
def test_fifty_kills(tmp_path: Path, mode: str):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path), mode, "50"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5, "the kills came too early to test anything"
