"""The CI example calls the program as it is: every command and option in it exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from modelport.cli import cli
from modelport.pipeline import recipes

WORKFLOWS = sorted((Path(__file__).parents[2] / "examples" / "ci").glob("*.yml"))


def commands(workflow: Path) -> list[list[str]]:
    document = yaml.safe_load(workflow.read_text())
    steps = [s for job in document["jobs"].values() for s in job["steps"]]
    lines = "\n".join(s["run"] for s in steps if "run" in s).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.strip().startswith("modelport "):
            line = re.sub(r"\$\{\w+:\+(.*?)\}", r"\1", re.split("[|>]", line)[0])
            found.append(shlex.split(line)[1:])
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_every_command_and_option_exists(workflow):
    found = commands(workflow)
    assert [words[0] for words in found] == ["export", "validate", "bench", "publish", "publish"]
    for words in found:
        command, rest = cli, list(words)
        while hasattr(command, "get_command"):
            context = command.make_context("modelport", [], resilient_parsing=True)
            command = command.get_command(context, rest.pop(0))
            assert command is not None, words
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert {w for w in rest if w.startswith("--")} <= known, words


def test_nothing_but_its_own_secrets_is_used():
    for workflow in WORKFLOWS:
        text = workflow.read_text()
        assert "pull_request_target" not in text
        assert set(re.findall(r"secrets\.(\w+)", text)) <= {"GITHUB_TOKEN"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_it_is_a_workflow(workflow, tmp_path):
    """By GitHub's own schema, which the checker brings along; a misspelt key is none."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(workflow.read_text().replace("runs-on:", "run-on:"))
    for file, code in ((workflow, 0), (wrong, 1)):
        done = subprocess.run(
            [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
             "vendor.github-workflows", str(file)],
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == code, done.stdout


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_its_shell_is_shell(workflow):
    # GitHub's own default lacks pipefail: a refusal before a pipe would pass.
    assert yaml.safe_load(workflow.read_text())["defaults"]["run"]["shell"] == "bash"
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                text = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
                done = subprocess.run(["bash", "-n"], input=text, text=True, check=False,
                                      capture_output=True)
                assert done.returncode == 0, done.stderr


def test_the_recipe_is_one(tmp_path):
    """The local counterpart has a plan: its keys, options and destination are right."""
    stages = recipes.plan(WORKFLOWS[0].with_name("pipeline.yaml"))
    assert [stage.kind for stage in stages] == ["export", "bench", "publish"]
    for stage in stages:
        command = cli.get_command(click.Context(cli), stage.arguments[0])
        assert command is not None
        words = [w for w in stage.arguments[1:] if w.startswith("--")]
        if stage.kind == "export":
            command = command.get_command(click.Context(command), stage.arguments[1])
        assert set(words) <= {name for p in command.params for name in p.opts}
