"""Which of transformers' models export, measured: every model type with every task it has.

    make coverage                                   # everything that has no record yet
    python benchmarks/breadth --again --only bert   # these again
    python benchmarks/breadth --failed              # what is not right again
    python benchmarks/breadth --torchscript         # that column, of what is right and lacks it
    python benchmarks/breadth --page                # only write the page from the records

Each pair is measured in a process of its own, forked from one that has imported torch and
transformers, with limits on its time and memory; a record is written as soon as it is made, so an
interrupted run goes on where it was. Of two records of a pair the later one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))

import page  # noqa: E402
from measure import TORCHSCRIPT, Record, measure  # noqa: E402
from modelport.checkpoints.tasks import TASKS  # noqa: E402
from pairs import Pair, pairs  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = HERE.parent.parent
STATE = ROOT / "out" / "coverage" / "records.jsonl"
CPU_SECONDS, WALL_SECONDS, MEMORY = 90, 1200, 6 << 30


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no pair is left running
    arguments = _arguments()
    found = records(arguments.records)
    if not arguments.page:
        chosen = _chosen(arguments, pairs(), found)
        warm()
        started = time.monotonic()
        for done, record in enumerate(run(chosen, arguments), 1):
            key = record.model_type, record.task
            if arguments.torchscript:
                record = replace(found[key], torchscript=record.torchscript or record.cause)
            found[key] = record
            append(arguments.records, record)
            spent = time.monotonic() - started
            tried = " ".join(a.strategy for a in record.attempts)
            print(f"[{done}/{len(chosen)} {spent / 60:.0f} min] {record.model_type} {record.task}: "
                  f"{record.outcome} ({tried}) {record.processor:.1f} of {record.seconds:.1f} s "
                  f"{record.cause[:140]}",
                  flush=True)
    if not arguments.no_page:
        page.write(list(found.values()), pairs())
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--tasks", default="", help="tasks, by commas")
    parser.add_argument("--kinds", default="", help="kinds of model, by commas")
    parser.add_argument("--failed", action="store_true", help="what has a record that is not right")
    parser.add_argument("--cause", default="", help="with --failed: whose cause holds this")
    parser.add_argument("--strategies", default="trace,dynamo,transformers,torchscript",
                        help="ways of capture to try, by commas")
    parser.add_argument("--torchscript", action="store_true",
                        help="only add the archive to records that are right without it")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--no-page", action="store_true", help="only measure")
    parser.add_argument("--again", action="store_true", help="what has a record, too")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=1e9, help="start no pair after these")
    parser.add_argument("--cpu-seconds", type=int, default=CPU_SECONDS, help="limit of one pair")
    parser.add_argument("--records", type=Path, default=STATE)
    return parser.parse_args()


def _chosen(
    arguments: argparse.Namespace, every: Sequence[Pair], found: dict[tuple[str, str], Record]
) -> list[Pair]:
    wanted = {name: set(filter(None, getattr(arguments, name).split(",")))
              for name in ("only", "tasks", "kinds")}
    result = []
    for pair in every:
        record = found.get((pair.model_type, pair.task))
        if wanted["only"] and pair.model_type not in wanted["only"]:
            continue
        if wanted["tasks"] and pair.task not in wanted["tasks"]:
            continue
        if wanted["kinds"] and pair.kind not in wanted["kinds"]:
            continue
        if arguments.failed:
            if (record is not None and record.outcome != "right"
                    and arguments.cause.lower() in record.cause.lower()):
                result.append(pair)
        elif arguments.torchscript:
            if record is not None and record.outcome == "right" and not record.torchscript and (
                    TASKS[pair.task].parts is None):
                result.append(pair)
        elif record is None or arguments.again:
            result.append(pair)
    return result


def records(file: Path) -> dict[tuple[str, str], Record]:
    """The last record of each pair; a clone starts from those that were committed."""
    if file.is_file():
        values = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    elif file == STATE and page.RESULTS.is_file():
        values = json.loads(page.RESULTS.read_text("utf-8"))["records"]
    else:
        return {}
    made = [Record.of(value) for value in values]
    return {(r.model_type, r.task): r for r in made}


def append(file: Path, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(record.to_json() + "\n")


def warm() -> None:
    """Import what every pair needs, once; no operator runs here, so no thread is started."""
    import importlib

    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    for name in ("modelport.checkpoints.loader", "modelport.pipeline", "modelport.exporters.onnx",
                 "modelport.exporters._onnx_capture", "modelport.exporters.torchscript",
                 "modelport.runtimes.onnxruntime", "modelport.runtimes.torch_eager",
                 "modelport.runtimes.torchscript", "modelport.artifacts.onnx_files",
                 "transformers.modeling_utils", "transformers.masking_utils", "onnxruntime",
                 "onnx.version_converter", "onnx_ir", "onnxscript", "torch.onnx", "torch.export",
                 "torch.onnx._internal.exporter._core", "safetensors.torch", "scipy.optimize"):
        importlib.import_module(name)


@dataclass
class _Child:
    pair: Pair
    work: Path
    started: float


def run(chosen: Sequence[Pair], arguments: argparse.Namespace) -> Iterator[Record]:
    """Measure the pairs, so many at a time; yields a record as each process ends."""
    workers = arguments.workers
    strategies = [TORCHSCRIPT] if arguments.torchscript else arguments.strategies.split(",")
    waiting, running = list(reversed(chosen)), dict[int, _Child]()
    deadline = time.monotonic() + arguments.minutes * 60
    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < workers and time.monotonic() < deadline:
                child = _Child(waiting.pop(), Path(tempfile.mkdtemp(prefix="coverage-")),
                               time.monotonic())
                running[_fork(child, strategies, arguments.cpu_seconds)] = child
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    child = running.pop(pid)
                    yield _result(child, status, arguments.cpu_seconds)
                    shutil.rmtree(child.work, ignore_errors=True)
                elif time.monotonic() - running[pid].started > WALL_SECONDS:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        for pid, child in running.items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shutil.rmtree(child.work, ignore_errors=True)


def _fork(child: _Child, strategies: Sequence[str], seconds: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = os.open(child.work / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["MODELPORT_CACHE"] = str(child.work / "cache")
        record = measure(child.pair, child.work, strategies)
        partial = child.work / "record.part"
        partial.write_text(record.to_json(), "utf-8")
        partial.rename(child.work / "record.json")
        status = 0
    except BaseException as error:  # noqa: BLE001 - a fork must not return into the parent's code
        with contextlib.suppress(OSError):
            (child.work / "error").write_text(f"{type(error).__name__}: {error}", "utf-8")
    finally:
        os._exit(status)


def _result(child: _Child, status: int, limit: int) -> Record:
    file = child.work / "record.json"
    pair = child.pair
    seconds = round(time.monotonic() - child.started, 2)
    if file.is_file():
        return Record.of(json.loads(file.read_text("utf-8")))
    cause = "the process ended without a record"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        cause = {signal.SIGXCPU: f"more than {limit} s of processor time",
                 signal.SIGKILL: "more than its time or memory"}.get(
            number, f"the process died of signal {number}")  # type: ignore[call-overload]
    elif (child.work / "error").is_file():
        cause = (child.work / "error").read_text("utf-8")[:400]
    return Record(pair.model_type, pair.task, pair.class_name, pair.kind, pair.must, "failed",
                  cause=cause, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main())
