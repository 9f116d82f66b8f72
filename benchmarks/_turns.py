"""Contenders in processes of their own that take turns, call by call.

The speed of a shared machine swings within seconds by more than what two runtimes differ in. Here
a call of one follows a call of the other, in an order drawn anew for each round, and only ratios
within a round count. A process that waits is stopped, so that its idle threads don't spin beside
another's; the first call of a turn finds caches cold and is not counted where it is short.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TURN = 0.15
"""Seconds of a turn, at least; one call where that takes longer."""
SHORT = 0.5
"""Seconds of a call up to which a turn begins with one that is not counted."""
SIZE = 2048
"""Of the square matrices whose product is the ceiling."""

Job = Mapping[str, Any]
"""Of a contender: ``path`` and ``runtime`` as :func:`pipeline.open_path` takes them, or
``product``, a library that multiplies float32 matrices; and ``threads``."""


class Contender:
    """A process that holds one session and answers with seconds."""

    def __init__(self, job: Job) -> None:
        from modelport.runtimes.benchmark.cell import THREAD_VARIABLES

        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(dict(job))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(job["threads"]))})
        self._answer()

    def ask(self, **question: Any) -> Any:
        """Let it go on until it has answered.

        Raises:
            RuntimeError: its process ended.
        """
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # said below, with its status
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with status {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        # Until the last of its threads stands still; an end of it is left for the next question.
        found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if found and found.si_code == os.CLD_STOPPED:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()  # closes its pipes, too


@contextlib.contextmanager
def contenders(jobs: Mapping[str, Job]) -> Iterator[dict[str, Contender]]:
    """Open all of them, each before the next starts."""
    opened: dict[str, Contender] = {}
    try:
        for name, job in jobs.items():
            opened[name] = Contender(job)
        yield opened
    finally:
        for contender in opened.values():
            contender.close()


def race(
    jobs: Mapping[str, Job],
    shapes: Sequence[tuple[int, int]],
    record: Path,
    *,
    generations: int,
    rounds: int,
    notify: Callable[[str], None],
) -> None:
    """Let all take turns at every shape.

    What is measured goes to ``record``, one line of JSON for each generation and shape, with the
    seconds of a call by contender and round; lines that are there are not measured again.

    Args:
        generations: how often all processes are started anew.
        rounds: turns of each at a shape in one generation.
    """
    done = {(r["generation"], *r["shape"]) for r in records(record)}
    for generation in range(generations):
        left = [shape for shape in shapes if (generation, *shape) not in done]
        if not left:
            continue
        with contenders(jobs) as opened:
            for shape in left:
                for contender in opened.values():
                    contender.ask(shape=shape)
                seconds: dict[str, list[float]] = {name: [] for name in jobs}
                rng = random.Random(f"{generation} {shape}")
                for _ in range(rounds):
                    for name in rng.sample(list(jobs), len(jobs)):
                        seconds[name].append(opened[name].ask(turn=TURN))
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"generation": generation, "shape": list(shape),
                                           "seconds": seconds}) + "\n")
                notify(f"{generation} {shape[0]}×{shape[1]} " + ", ".join(
                    f"{name} {statistics.median(s) * 1e3:.1f} ms" for name, s in seconds.items()))


def records(path: Path) -> list[dict[str, Any]]:
    """What :func:`race` has measured so far."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] \
        if path.exists() else []


def _bind(job: Job) -> Callable[[int, int], Callable[[], Any]]:
    """A function that makes the call to time from a batch size and a sequence length."""
    if library := job.get("product"):
        from modelport.runtimes.benchmark import ceilings

        call = ceilings.products(job["threads"])["float32", library](SIZE)
        return lambda batch, sequence: call
    from modelport import pipeline, runtimes
    from modelport.runtimes.benchmark import feeds

    known = runtimes.get(job["runtime"]).options
    options = {"threads": job["threads"]} if "threads" in known else {}
    session = pipeline.open_path(job["path"], runtime=job["runtime"], device="cpu", options=options)
    return lambda batch, sequence: session.bind(feeds.draw(session.spec, batch, sequence))


def _serve(job: Job) -> None:
    """Answer on standard output, which nothing else gets to see."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from modelport.runtimes.benchmark.cell import PR_SET_PDEATHSIG

    # A stopped process doesn't see that its parent is gone.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    bind, call, usual = _bind(job), None, 0.0
    answer: Any = "open"
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        question = json.loads(line)
        if shape := question.get("shape"):
            call = None  # what it holds is free before the next one is bound
            call = bind(*shape)
            call()
            answer = usual = _seconds(call)
        else:
            assert call is not None
            if usual < SHORT:
                call()
            end, taken = time.perf_counter() + question["turn"], []
            while not taken or time.perf_counter() < end:
                taken.append(_seconds(call))
            answer = statistics.median(taken)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
