"""A recipe on a Ray cluster of this machine: three nodes whose accelerators are only labels."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from modelport import artifacts
from modelport.cli import execute
from modelport.errors import BackendUnavailable, IncompleteError
from modelport.pipeline import executors, recipes

ray = pytest.importorskip("ray", reason="ray is not installed (modelport[ray])")
pytestmark = [
    pytest.mark.slow,
    # Ray's own: files it leaves to the collector, and its plans for CUDA_VISIBLE_DEVICES.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning",
                               "ignore::pytest.PytestUnraisableExceptionWarning"),
]
FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"

# The program but for its work: what ran, where, from when to when.
PROGRAM = """
import json, os, shutil, sys, time
from pathlib import Path

words, frozen, log = sys.argv[1:], Path({frozen!r}), Path({log!r})
start = time.time()
time.sleep(float(os.environ.get("PACE", "0.4")))
if words[0] == "export":
    shutil.copytree(frozen, words[words.index("--output") + 1], dirs_exist_ok=True)
if words[0] == "bench":
    from modelport import artifacts
    artifacts.with_report(artifacts.read(Path(words[1])), artifacts.BENCHMARK, "{{}}")
with log.open("a") as file:
    file.write(json.dumps({{
        "kind": words[0], "words": words, "start": start, "end": time.time(),
        "threads": os.environ.get("OMP_NUM_THREADS"), "parent": os.getppid(),
    }}) + "\\n")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False,
                        "object_store_memory": 80 << 20},
    )
    for kind, gpus in (("A100", 1), ("H100", 2)):
        made.add_node(num_cpus=4, num_gpus=gpus, resources={executors.BENCHMARK: 1},
                      labels={executors.ACCELERATOR: kind}, object_store_memory=80 << 20)
    yield made
    made.shutdown()


@pytest.fixture
def placed(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], dict[str, str]]:
    """Runs a recipe on the cluster: ``"bench demo-…"`` → the accelerator of the node it ran on."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(frozen=str(FROZEN), log=str(tmp_path / "log")))
    monkeypatch.setattr(executors, "PROGRAM", (str(script),))

    def run(recipe: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        real = executors.RayCluster._result

        def result(self: executors.RayCluster, call: Any) -> executors.Ended:
            ended = real(self, call)
            labels = {n["NodeID"]: n["Labels"].get(executors.ACCELERATOR) for n in ray.nodes()}
            found.setdefault(ended.node, labels.get(ended.node))
            return ended

        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(executors.RayCluster, "_result", result)
            recipes.run(recipe, where="ray", notify=told.append)
        where = {node[:12]: label for node, label in found.items()}
        return {
            line.partition(" ended")[0]: where[line.rpartition(" ")[2]]
            for line in told if " ended on node " in line
        }

    return run


def log(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def write(directory: Path, **content: object) -> Path:
    file = directory / "pipeline.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_stages_go_where_their_accelerator_is_and_measure_one_at_a_time(placed, tmp_path):
    recipe = write(
        tmp_path, models=["demo"], bench={"batch-sizes": [1]},
        profiles={n: {"opset": 11 + i} for i, n in enumerate("abcd")},
        publish={"destination": "file:///models:{cell}"},
        placement={"a": {"accelerator": "A100"}, "b": {"accelerator": "H100", "gpus": 2},
                   "c": {"accelerator": "H100"}, "d": {"accelerator": "A100", "cpus": 3}},
    )
    where = placed(recipe)
    for kind in ("export", "bench"):
        assert {n: where[f"{kind} demo-onnx-{n}"] for n in "abcd"} == {
            "a": "A100", "b": "H100", "c": "H100", "d": "A100"}
    assert len([n for n in where if n.startswith("publish")]) == 4
    assert all(stage.done for stage in recipes.plan(recipe))
    ran = log(tmp_path)
    benches = [entry for entry in ran if entry["kind"] == "bench"]
    exports = [entry for entry in ran if entry["kind"] == "export"]
    assert len(benches) == len(exports) == 4
    assert max(e["end"] for e in exports) <= min(b["start"] for b in benches), "nothing beside"
    by_node: dict[str, list[dict[str, Any]]] = {}
    for entry in benches:
        by_node.setdefault(where[f"bench {Path(entry['words'][1]).name}"], []).append(entry)
    for entries in by_node.values():
        first, second = sorted(entries, key=lambda entry: entry["start"])
        assert first["end"] <= second["start"], "one benchmark at a time on a node"
    assert {entry["threads"] for entry in benches} == {None}, "Ray's limit is not the benchmark's"
    (tmp_path / "log").unlink()
    assert placed(recipe) == {}, "what is done is not done again"


def test_what_no_node_could_ever_run_is_refused(placed, tmp_path):
    for need in ({"accelerator": "B200"}, {"accelerator": "A100", "gpus": 2}, {"cpus": 64}):
        with pytest.raises(BackendUnavailable, match="no node of the cluster") as caught:
            placed(write(tmp_path, models=["demo"], placement={"onnx": need}))
        assert "A100 (4 CPU, 1 GPU, 1 benchmark)" in caught.value.allowed
        assert not (tmp_path / "log").exists()


def test_a_stage_that_fails_and_a_node_of_other_versions(placed, tmp_path, monkeypatch):
    recipe = write(tmp_path, models=["demo"])
    (tmp_path / "program.py").write_text(
        "import json, sys\nprint(json.dumps({'error': {'found': 'no such model'}}))\nsys.exit(6)")
    with pytest.raises(IncompleteError, match="exit code 6: no such model"):
        placed(recipe)
    monkeypatch.setattr(recipes, "tool_versions", lambda: {"torch": "0.1"})
    with pytest.raises(IncompleteError, match=r"the node has \w+ "):
        placed(recipe)


def test_a_stage_whose_node_is_lost_runs_on_another(cluster, placed, tmp_path):
    nodes = [
        cluster.add_node(num_cpus=4, labels={executors.ACCELERATOR: "L4"},
                         object_store_memory=80 << 20)
        for _ in range(2)
    ]
    recipe = write(tmp_path, models=["demo"], placement={"onnx": {"accelerator": "L4"}})
    script = tmp_path / "program.py"
    script.write_text(
        "import os, psutil\nfrom pathlib import Path\n"
        f"began = Path({str(tmp_path)!r}, 'began')\nfirst = not began.exists()\n"
        "began.write_text(str(psutil.Process(os.getppid()).ppid()))\n"  # the node's own process
        "import time\ntime.sleep(60 * first)\n" + script.read_text()
    )
    lost = []

    def lose() -> None:
        while not (tmp_path / "began").exists() or not (tmp_path / "began").read_text():
            time.sleep(0.05)
        pid = int((tmp_path / "began").read_text())
        for node in nodes:
            if node.all_processes["raylet"][0].process.pid == pid:
                lost.append(node)
                cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    assert placed(recipe) == {"export demo-onnx": "L4"}
    thread.join()
    assert len(lost) == 1
    assert recipes.plan(recipe)[0].done


def test_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(BackendUnavailable, match="no Ray cluster answers"):
        recipes.run(write(tmp_path, models=["demo"]), where="ray")


def test_really(cluster, tiny, tmp_path, monkeypatch):
    """The program itself, on a node, from the command line."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    shutil.copytree(tiny("bert", "feature-extraction"), tmp_path / "model")
    recipe = write(
        tmp_path, models=[str(tmp_path / "model")], placement={"onnx": {"accelerator": "H100"}},
        publish={"destination": f"file://{tmp_path}/models:{{cell}}"},
    )
    assert execute(["run", str(recipe), "--executor", "ray"]) == 0
    assert artifacts.verify(tmp_path / "out" / "model-onnx").manifest.proven
    assert execute(["pull", f"file://{tmp_path}/models:model-onnx", str(tmp_path / "x")]) == 0
