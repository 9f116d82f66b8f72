"""A recipe's plan, its resumption, and what fails without stopping the rest."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from modelport import artifacts
from modelport.cli import execute
from modelport.errors import BackendUnavailable, IncompleteError, UsageError
from modelport.pipeline import executors, recipes

FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"


def write(directory: Path, **content: object) -> Path:
    file = directory / "pipeline.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The program, but for its work: an export copies the frozen artifact."""
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        words = command[3:]
        called.append(words)
        if words[0] == "export":
            if "broken" in words:
                text = json.dumps({"error": {"found": "no such model"}})
                return subprocess.CompletedProcess(command, 6, text, "")
            target = words[words.index("--output") + 1]
            shutil.copytree(FROZEN, target, dirs_exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(executors.subprocess, "run", run)
    return called


def test_the_plan_is_the_matrix(tmp_path):
    recipe = write(tmp_path, models=["demo", {"model": "camembert-base", "weights": "random"}],
                   formats=["onnx"], precisions=["fp32", "fp16"],
                   profiles={"old": {"opset": 11}, "new": {"opset": 17}},
                   publish={"destination": "file:///models:{cell}", "require": "benchmark"})
    stages = recipes.plan(recipe)
    assert len(stages) == 2 * 2 * 2 * 2
    assert [s.kind for s in stages] == ["export"] * 8 + ["publish"] * 8
    assert len({s.key for s in stages}) == 16
    first = stages[0]
    assert first.cell == "demo-onnx-fp32-old"
    assert first.arguments[:8] == ("export", "onnx", "--model", "demo", "--dtype", "fp32",
                                   "--opset", "11")
    assert stages[8].arguments[2] == "file:///models:demo-onnx-fp32-old"
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again(tmp_path, program):
    recipe = write(tmp_path, models=["demo"], precisions=["fp32", "fp16"],
                   publish={"destination": "file:///models:{cell}"})
    recipes.run(recipe, jobs=2)
    assert sorted(w[0] for w in program) == ["export", "export", "publish", "publish"]
    program.clear()
    recipes.run(recipe)
    assert program == []
    (tmp_path / "out" / "demo-onnx-fp16" / "config.json").write_text("{}")
    recipes.run(recipe)
    assert [w[0] for w in program] == ["export"], "what is damaged is made again"
    program.clear()
    recipe = write(tmp_path, models=["demo"], precisions=["fp32", "fp16"],
                   profiles={"": {"opset": 11}}, publish={"destination": "file:///models:{cell}"})
    recipes.run(recipe)
    assert len(program) == 4, "other options are other stages"


def test_what_another_run_has_replaced_is_done_again(tmp_path, monkeypatch):
    called = []

    def program(_, arguments, **__):
        called.append(arguments[0])
        place = Path(arguments[arguments.index("--output") + 1] if arguments[0] == "export"
                     else arguments[1])
        if arguments[0] == "export":
            shutil.copytree(FROZEN, place, dirs_exist_ok=True)
        if arguments[0] == "bench":
            artifacts.with_report(artifacts.read(place), artifacts.BENCHMARK, str(arguments))
        return ""

    monkeypatch.setattr(executors, "program", program)

    def run(**bench):
        called.clear()
        recipes.run(write(tmp_path, models=["demo"], bench=bench,
                          publish={"destination": "file:///models:{cell}"}))
        return tuple(called)

    assert run(rounds=1) == ("export", "bench", "publish")
    assert run(rounds=1) == ()
    assert run(rounds=2) == ("bench", "publish")
    assert run(rounds=1) == ("bench", "publish"), "the other's figures are there"
    place = tmp_path / "out" / "demo-onnx"
    artifacts.with_report(artifacts.read(place), artifacts.BENCHMARK, "by hand")
    assert run(rounds=1) == ("bench",), "what was published is there again"


def test_a_stage_is_named_by_all_that_it_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, texts, code = tmp_path / "model", tmp_path / "texts", tmp_path / "own" / "net.py"
    (model / "1_Pooling").mkdir(parents=True)
    code.parent.mkdir()
    for file in (model / "1_Pooling" / "config.json", texts, code):
        file.write_text("one")

    def keys():
        found = []
        for name in ("~/model", f"{code}:net"):
            recipe = write(tmp_path, models=[name], profiles={"": {"texts": str(texts)}},
                           bench={"corpus": str(texts)}, output=str(model / "out"))
            found.append([stage.key for stage in recipes.plan(recipe)])
        return found

    before = keys()
    (model / "out").mkdir()
    (model / "out" / "made").write_text("by a run")
    (model / ".git").mkdir()
    (model / ".git" / "index").write_text("by git")
    assert keys() == before
    for number, file in enumerate((model / "1_Pooling" / "config.json", code, texts)):
        file.write_text("two!")
        after = keys()
        changed = [old != new for old, new in zip(before, after, strict=True)]
        assert changed == [number in (0, 2), number in (1, 2)]
        before = after
    (code.parent / "run.log").write_text("of the run")
    (code.parent / "data").mkdir()
    (code.parent / "data" / "more.csv").write_text("made by a run")
    assert keys() == before
    for file in ("weights.pt", "config.yaml", "data/layers.py"):
        (code.parent / file).write_text("what the file loads")
        after = keys()
        assert [old != new for old, new in zip(before, after, strict=True)] == [False, True]
        before = after


def test_a_stage_is_the_same_from_another_directory(tmp_path, monkeypatch):
    recipe = write(tmp_path, models=["demo"], bench={"rounds": 1},
                   publish={"destination": "file:///models:{cell}"})
    keys = [stage.key for stage in recipes.plan(recipe)]
    monkeypatch.chdir(tmp_path)
    assert [stage.key for stage in recipes.plan(Path(recipe.name))] == keys


def test_what_runs_a_graph_is_part_of_a_stage(tmp_path, monkeypatch):
    """A new runtime proves and measures anew."""
    import importlib.metadata

    recipe = write(tmp_path, models=["demo"], bench={})
    before = [stage.key for stage in recipes.plan(recipe)]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: "99" if name == "onnxruntime" else version(name))
    assert all(old != stage.key for old, stage in zip(before, recipes.plan(recipe), strict=True))


def test_each_cell_is_measured_in_a_directory_of_its_own(tmp_path):
    recipe = write(tmp_path, models=["demo"], precisions=["fp32", "fp16"], bench={})
    benches = [s.arguments for s in recipes.plan(recipe) if s.kind == "bench"]
    places = {words[words.index("--output") + 1] for words in benches}
    assert len(places) == 2
    recipe = write(tmp_path, models=["demo"], bench={"output": "mine"})
    (words,) = [s.arguments for s in recipes.plan(recipe) if s.kind == "bench"]
    assert words.count("--output") == 1


def test_a_release_is_compared_with_that_of_its_own_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path, models=[{"model": "net.py:make"}], publish={
        "destination": "file:///models/{cell}:latest", "max-regression": "5%",
        "against": "file:///models/{cell}:previous"})
    (words,) = [s.arguments for s in recipes.plan(recipe) if s.kind == "publish"]
    assert words[2] == "file:///models/net.py-make-onnx:latest"
    assert words[words.index("--against") + 1] == "file:///models/net.py-make-onnx:previous"


def test_a_failure_is_told_and_stops_only_its_own_cell(tmp_path, program):
    recipe = write(tmp_path, models=["broken", "demo"],
                   publish={"destination": "file:///models:{cell}"})
    with pytest.raises(IncompleteError, match=r"1 of 2 cells failed.*exit code 6: no such") as e:
        recipes.run(recipe)
    assert e.value.exit_code == 5
    assert [w[0] for w in program] == ["export", "export", "publish"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"models": []}, "names no models"),
        ({"models": ["demo"], "model": "x"}, "has model"),
        ({"models": ["demo"], "formats": ["unheard-of"]}, "unheard-of"),
        ({"models": ["demo"], "profiles": {"a": {"opsets": 1}}}, "no option opsets"),
        ({"models": ["demo"], "publish": {"require": "benchmark"}}, "destination"),
        ({"models": ["demo", "x/demo"]}, "twice"),
        ({"models": ["demo"], "formats": []}, "no cell"),
        ({"models": "demo"}, "has models: demo"),
        ({"models": ["demo"], "precisions": "fp16"}, "has precisions: fp16"),
        ({"models": [{"id": "demo"}]}, "has a model"),
        ({"models": ["demo"], "bench": True}, "has bench: True"),
        ({"models": ["demo"], "profiles": {"a": "opset"}}, "has a profile a: opset"),
        ({"models": ["demo"], "publish": {"destination": "file:///x:{name}"}}, "destination"),
        ({"models": ["demo"], "publish": {"destination": "models"}}, "not a place"),
        ({"models": ["demo"], "publish": {"destination": "file:///x", "against": "y"}}, "place"),
        ({"models": ["demo"], "placement": {"tensorrt": {"gpus": 1}}}, "places tensorrt"),
        ({"models": ["demo"], "placement": {"onnx": {"gpu": 1}}}, "placement of onnx has gpu"),
        ({"models": ["demo"], "placement": {"onnx": "H100"}}, "placement of onnx has H100"),
        ({"models": ["demo"], "placement": {"onnx": {"cpus": -1}}}, "cpus is -1"),
    ],
)
def test_a_recipe_that_is_wrong_runs_nothing(tmp_path, program, content, match):
    with pytest.raises(UsageError, match=match):
        recipes.run(write(tmp_path, **content))
    assert program == []


def test_the_command_line_shows_the_plan(tmp_path, capsys):
    recipe = write(tmp_path, models=["demo"])
    assert execute(["run", str(recipe), "--dry-run", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)
    assert stage["state"] == "to do"
    assert stage["arguments"][:2] == ["export", "onnx"]
    for option in (["--text", "x"], ["--device", "cpu"], ["--audio", "x.wav"], ["--beams", "2"],
                   ["--sample"], ["--seed", "0"], ["--max-new-tokens", "3"]):
        assert execute(["run", str(recipe), "--dry-run", *option]) == 2
        assert f"{option[0]} goes with an artifact" in capsys.readouterr().err
    for option in (["--dry-run"], ["--jobs", "1"], ["--executor", "local"]):
        assert execute(["run", str(FROZEN), "--text", "x", *option]) == 2
        assert f"{option[0]} goes with a pipeline" in capsys.readouterr().err
    assert execute(["run", str(FROZEN), "--text", "x", "--beams", "2"]) == 2
    assert "--beams goes with an artifact that generates" in capsys.readouterr().err
    assert execute(["run", str(FROZEN)]) == 2, "an artifact needs a text"


def test_what_is_allowed_for_a_model_is_allowed_in_its_benchmark(tmp_path):
    recipe = write(tmp_path, models=[{"model": "demo", "allow_pickle": True}, "camembert-base"],
                   bench={"rounds": 1})
    asked = {s.cell: s.arguments for s in recipes.plan(recipe) if s.kind == "bench"}
    assert ["--allow-pickle" in words for words in asked.values()] == [True, False]
    assert all("--any-kind" in words for words in asked.values())


def test_what_a_stage_asks_of_a_node(tmp_path):
    recipe = write(tmp_path, models=["demo"], formats=["onnx", "tensorrt"],
                   precisions=["fp32", "fp16"], profiles={"a": {}, "b": {"opset": 17}},
                   bench={"device": "cuda"}, placement={
                       "onnx": {"cpus": 4}, "fp16": {"accelerator": "H100"}, "b": {"cpus": 8}})
    recipe.write_text(recipe.read_text().replace("b:\n    opset: 17\n", "b: {}\n"))
    needs = {(s.kind, s.cell): s.needs for s in recipes.plan(recipe)}
    assert needs["bench", "demo-onnx-fp32-a"] == executors.Needs(None, 4, 1)
    assert needs["bench", "demo-onnx-fp16-b"] == executors.Needs("H100", 8, 1)
    assert needs["export", "demo-tensorrt-fp16-a"] == executors.Needs("H100", 1, 1)
    recipe = write(tmp_path, models=["demo"], publish={"destination": "file:///x:{cell}"},
                   placement={"onnx": {"accelerator": "H100"}})
    assert [s.needs for s in recipes.plan(recipe)] == [
        executors.Needs("H100"), executors.Needs()], "a publication runs anywhere"


SLOWLY = """
import os, random, shutil, sys, time
from pathlib import Path
from modelport import artifacts
FROZEN, LOG = Path({frozen!r}), Path({log!r})
words = sys.argv[1:]
with LOG.open("a") as log:
    log.write(words[0] + "\\n")
if words[0] == "export":
    target = Path(words[words.index("--output") + 1])
    with artifacts.stage(target, force=True) as staging:
        for path in sorted(FROZEN.iterdir()):
            shutil.copyfile(path, staging.root / path.name)
            time.sleep(0.03)
        staging.commit()
time.sleep(0.05)
"""

DRIVER = """
import sys
from pathlib import Path
from modelport.pipeline import executors, recipes
executors.PROGRAM = ({script!r},)
recipes.run(Path({recipe!r}), jobs=2)
"""


def test_a_run_that_is_killed_at_random_moments(tmp_path):
    """kill -9 of the run alone: what it had started goes on, and the next run waits for it."""
    recipe = write(tmp_path, models=["demo"], profiles={n: {"opset": 11 + i} for i, n in
                                                        enumerate("abcd")},
                   publish={"destination": "file:///models:{cell}"})
    script, log = tmp_path / "slowly.py", tmp_path / "log"
    script.write_text(SLOWLY.format(frozen=str(FROZEN), log=str(log)))
    code = DRIVER.format(script=str(script), recipe=str(recipe))
    stages = recipes.plan(recipe)
    generator = random.Random(5)
    partly = []
    for _ in range(12):
        known = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 120
        # Killed from the first stage on that it starts, however long a busy machine takes to it.
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) <= known:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 1))
        process.kill()
        process.wait()
        for stage in stages:
            if stage.artifact.exists():
                artifacts.verify(stage.artifact)
        partly.append(sum(stage.done for stage in stages))
        if partly[-1] == len(stages):
            break
    assert partly == sorted(partly), "what was done stays done"
    assert any(0 < count < len(stages) for count in partly), "no kill came in between"
    before = partly[-1]
    log.write_text("")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(stage.done for stage in stages)
    assert len(log.read_text().split()) <= len(stages) - before + 2, "two may have been under way"
    assert not [p for p in (tmp_path / "out").iterdir() if ".partial" in p.name]


def test_several_jobs_at_a_time_and_benchmarks_alone(tmp_path, monkeypatch):
    recipe = write(tmp_path, models=["demo"], profiles={n: {"opset": 11 + i} for i, n in
                                                        enumerate("abcd")}, bench={})
    running: list[str] = []
    seen: list[tuple[str, ...]] = []
    lock = threading.Lock()

    def program(_, arguments, **__):
        with lock:
            running.append(arguments[0])
            seen.append(tuple(running))
        time.sleep(0.2)
        with lock:
            running.remove(arguments[0])
        if arguments[0] == "export":
            shutil.copytree(FROZEN, arguments[arguments.index("--output") + 1])
        return ""

    monkeypatch.setattr(executors, "program", program)
    recipes.run(recipe, jobs=3)
    assert max(map(len, seen)) == 3
    assert ("export",) * 3 in seen
    assert {words for words in seen if "bench" in words} == {("bench",)}


def test_a_cluster_needs_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match="not installed") as caught:
        recipes.run(write(tmp_path, models=["demo"]), where="ray")
    assert "modelport[ray]" in caught.value.hint
    command = ["run", str(tmp_path / "pipeline.yaml"), "--executor", "ray"]
    assert execute([*command, "--jobs", "2"]) == 2
    assert execute(command) == 6


def test_really(tiny, tmp_path):
    """Two real cells, published to a directory and pulled; then nothing is left to do."""
    recipe = write(
        tmp_path, models=[str(tiny("bert", "feature-extraction"))],
        profiles={"a": {"opset": 11}}, publish={
            "destination": f"file://{tmp_path}/models:{{cell}}",
        },
    )
    command = [sys.executable, "-m", "modelport", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(stage.done for stage in recipes.plan(recipe))
    assert execute(["pull", f"file://{tmp_path}/models:model-onnx-a", str(tmp_path / "x")]) == 0
