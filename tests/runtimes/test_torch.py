"""What every runtime on torch shares."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES = """
import resource
import torch, hand_made
from modelport import runtimes

WIDTH = 8_000_000  # 64 MB for two, above what glibc ever keeps by itself

class Wide(torch.nn.Module):
    def forward(self, values):
        return (torch.sin(values[:, :1].expand(-1, WIDTH)),)

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

spec = hand_made.spec(hand_made.VALUES, output=("batch", WIDTH))
model = hand_made.loaded(Wide(), spec)
feeds = hand_made.feeds(spec, batch=2, length=5)
with runtimes.get("torch_eager").open(model) as session:
    unbound = min(faults(lambda: session.run(feeds)) for _ in range(20))
    launch = session.bind(feeds)
    print(unbound, min(faults(launch) for _ in range(20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_bound_session_keeps_its_memory_from_call_to_call() -> None:
    import hand_made

    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True,
                          check=False, cwd=hand_made.__file__.rpartition("/")[0])
    assert done.returncode == 0, done.stderr
    unbound, bound = map(int, done.stdout.split())
    assert unbound > 10_000
    assert bound < 100
