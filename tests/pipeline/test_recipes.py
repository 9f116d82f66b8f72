"""A recipe's plan, its resumption, and what fails without stopping the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from modelport.cli import execute
from modelport.errors import IncompleteError, UsageError
from modelport.pipeline import recipes

FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"


def write(directory: Path, **content: object) -> Path:
    file = directory / "pipeline.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The program, but for its work: an export copies the frozen artifact."""
    import shutil

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

    monkeypatch.setattr(recipes.subprocess, "run", run)
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
    assert execute(["run", str(recipe), "--text", "x"]) == 2
    assert execute(["run", str(FROZEN)]) == 2, "an artifact needs a text"


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
