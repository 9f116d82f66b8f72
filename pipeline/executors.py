"""Where the stages of a recipe run: processes of this machine, or a Ray cluster.

An executor gets stages that do not depend on each other and says of each how it ended, as it ends.
It schedules nothing itself: the one has a pool of threads, the other has Ray.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ..errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from .recipes import Stage
    from .request import Notify

PROGRAM: Final = ("-m", "modelport")
BENCHMARK: Final = "benchmark"
"""Resource of which every node that measures offers one: one benchmark at a time on each."""
ACCELERATOR: Final = "ray.io/accelerator-type"
"""Label by which Ray names what a node has, such as ``H100``; Ray sets it where it finds a GPU."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a stage asks of the machine that runs it.

    Attributes:
        accelerator: type, as the node's label names it; None for any node.
        cpus, gpus: reserved for the stage.
    """

    accelerator: str | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.accelerator is not None and not isinstance(self.accelerator, str):
            raise UsageError(f"accelerator is {self.accelerator!r}", allowed="a name, such as H100")
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise UsageError(f"{name} is {value!r}", allowed="a number")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stage ended: what went wrong, or nothing, and on which node."""

    problem: str = ""
    node: str = ""


class Executor(ABC):
    """Runs stages; used as a context."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @abstractmethod
    def run(self, stages: Sequence[Stage], notify: Notify) -> Iterator[tuple[Stage, Ended]]:
        """Run stages of one kind; each with its end, in the order in which they end."""


class Local(Executor):
    """Processes of this machine.

    Args:
        jobs: how many at a time; benchmarks run one at a time with nothing beside them.
        inherited: descriptor that each process keeps open until it ends.
    """

    def __init__(self, jobs: int, inherited: int) -> None:
        self._jobs = jobs
        self._inherited = inherited

    def run(self, stages: Sequence[Stage], notify: Notify) -> Iterator[tuple[Stage, Ended]]:
        alone = bool(stages) and stages[0].kind == "bench"
        with ThreadPoolExecutor(1 if alone else self._jobs) as pool:
            futures = {pool.submit(self._one, stage, notify): stage for stage in stages}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:  # after Ctrl-C nothing more is started
                pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, stage: Stage, notify: Notify) -> Ended:
        notify(f"{stage.kind} {stage.cell}")
        return Ended(program(PROGRAM, stage.arguments, inherited=self._inherited))


class RayCluster(Executor):
    """The nodes of a running Ray cluster, which share the file system that the recipe writes to.

    Each stage is one task. Ray places it by the label of the accelerator and the processors it
    asks for; a benchmark takes the node's one slot besides. A task whose node is lost runs again on
    another: stages appear whole or not at all.

    Raises:
        BackendUnavailable: Ray is not installed, or there is no cluster.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise BackendUnavailable(
                "--executor ray needs ray, which is not installed",
                hint='pip install "modelport[ray]"',
            ) from error
        self._ray: Any = ray
        address = os.environ.get("RAY_ADDRESS") or "auto"
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _knock(address)  # Ray would try for minutes
            ray.init(address=address, log_to_driver=False, logging_level="ERROR",
                     configure_logging=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise BackendUnavailable(
                f"no Ray cluster answers ({str(error).strip().splitlines()[0]})",
                allowed="a running cluster: its address in RAY_ADDRESS, or one on this machine",
                hint=f"ray start --head --resources='{{\"{BENCHMARK}\": 1}}'",
            ) from error
        finally:
            if main:  # Ray puts its own in the place of the command line's
                signal.signal(signal.SIGTERM, handler)

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def run(self, stages: Sequence[Stage], notify: Notify) -> Iterator[tuple[Stage, Ended]]:
        for stage in stages:
            self._require_place(stage)
        task = self._ray.remote(_on_node)
        where = os.getcwd()  # noqa: PTH109 - plain text for another process
        pending = {}
        for stage in stages:
            needs = stage.needs
            options: dict[str, Any] = {
                "num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": 2,
                "name": f"{stage.kind} {stage.cell}",
            }
            if stage.kind == "bench":
                options["resources"] = {BENCHMARK: 1}
            if needs.accelerator is not None:
                options["label_selector"] = {ACCELERATOR: needs.accelerator}
            call = task.options(**options).remote(PROGRAM, stage.arguments, where, stage.tools)
            pending[call] = stage
        try:
            while pending:
                (call,), _ = self._ray.wait(list(pending), num_returns=1)
                stage = pending.pop(call)
                ended = self._result(call)
                notify(f"{stage.kind} {stage.cell} ended on node {ended.node[:12] or 'unknown'}")
                yield stage, ended
        finally:
            for call in pending:
                self._ray.cancel(call)

    def _result(self, call: Any) -> Ended:
        try:
            return Ended(*self._ray.get(call))
        except self._ray.exceptions.RayError as error:
            return Ended(f"Ray could not run it: {str(error).strip().splitlines()[0]}")

    def _require_place(self, stage: Stage) -> None:
        """Refuse what no node could ever run, which Ray would wait for without end."""
        needs = stage.needs
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus,
                  BENCHMARK: 1.0 if stage.kind == "bench" else 0.0}
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        for node in nodes:
            label = node.get("Labels", {}).get(ACCELERATOR)
            enough = all(node["Resources"].get(name, 0) >= n for name, n in wanted.items())
            if enough and needs.accelerator in (None, label):
                return
        asked = ", ".join(f"{n:g} {name}" for name, n in wanted.items() if n)
        kind = f" with {ACCELERATOR}={needs.accelerator}" if needs.accelerator else ""
        offered = "; ".join(_described(node) for node in nodes)
        raise BackendUnavailable(
            f"no node of the cluster can run {stage.kind} {stage.cell}: it needs {asked}{kind}",
            allowed=f"the nodes there are: {offered}",
            hint=f"ray start --address=… --labels=\"{ACCELERATOR}=…\" "
            f"--resources='{{\"{BENCHMARK}\": 1}}'",
        )


def _knock(address: str) -> None:
    """Look whether anything listens where a cluster is said to be.

    Raises:
        OSError: nothing does.
    """
    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=10).close()


def _described(node: Mapping[str, Any]) -> str:
    parts = [f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU", BENCHMARK)]
    return f"{node.get('Labels', {}).get(ACCELERATOR, 'no accelerator')} ({', '.join(parts)})"


def _on_node(
    program_: tuple[str, ...], arguments: tuple[str, ...], where: str, tools: Mapping[str, str]
) -> tuple[str, str]:
    """What runs on a node: the program, if it is of the same versions as where the recipe is."""
    import ray

    from .exporting import tool_versions

    node = ray.get_runtime_context().get_node_id()
    here = tool_versions()
    differing = sorted(n for n in {*here, *tools} if here.get(n) != tools.get(n))
    if differing:
        name = differing[0]
        return f"the node has {name} {here.get(name)}, not {tools.get(name)}", node
    # Ray sets one thread per reserved processor; a benchmark has the node and sets its own.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"
                   or arguments[0] != "bench"}
    return program(program_, arguments, where=where, environment=environment), node


def program(
    program_: tuple[str, ...], arguments: tuple[str, ...], *, where: str | None = None,
    environment: Mapping[str, str] | None = None, inherited: int | None = None,
) -> str:
    """Run the program in a process of its own; what went wrong, or nothing."""
    done = subprocess.run(
        [sys.executable, *program_, *arguments, "--json", "--quiet"],
        capture_output=True, text=True, check=False, cwd=where, env=environment,
        pass_fds=() if inherited is None else (inherited,),
    )
    if not done.returncode:
        return ""
    try:
        found = json.loads(done.stdout)["error"]["found"]
    except (ValueError, KeyError, TypeError):  # it had a result first, and tells the error there
        said = done.stderr.strip().splitlines() or ["no message"]
        found = next((x.removeprefix("error: ") for x in said if x.startswith("error: ")), said[-1])
    return f"exit code {done.returncode}: {found}"
