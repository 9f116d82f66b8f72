"""The CI example calls the program as it is: every command and option in it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from modelport.cli import cli

WORKFLOWS = sorted((Path(__file__).parents[2] / "examples" / "ci").glob("*.yml"))


def commands(workflow: Path) -> list[list[str]]:
    document = yaml.safe_load(workflow.read_text())
    steps = [s for job in document["jobs"].values() for s in job["steps"]]
    lines = "\n".join(s["run"] for s in steps if "run" in s).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.strip().startswith("modelport "):
            line = re.sub(r"\$\{\w+:\+(.*?)\}", r"\1", line.partition("|")[0])
            found.append(shlex.split(line)[1:])
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_every_command_and_option_exists(workflow):
    found = commands(workflow)
    assert [words[0] for words in found] == ["export", "validate", "bench", "publish"]
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
