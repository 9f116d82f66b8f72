"""The command line: exit codes, streams, and what each kind of bad input says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import modelport
import pytest
from modelport.cli import execute
from tiny_models import pickled, truncated, with_nan

ROOT = Path(modelport.__file__).parent


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture
def bert(tiny: Callable[..., Path]) -> Path:
    return tiny("bert", "fill-mask")


def corrupt(source: Path, target: Path) -> Path:
    """A copy whose safetensors header is not JSON any more."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    return target


def without_shard(tiny: Callable[..., Path], target: Path) -> Path:
    """A sharded checkpoint that lost its last file."""
    shutil.copytree(tiny("bert", "fill-mask", shards=2), target)
    sorted(target.glob("*.safetensors"))[-1].unlink()
    return target


def export(model: Path | str, out: Path, *more: str) -> int:
    return execute(["export", "onnx", "--model", str(model), "--output", str(out), *more])


def test_export_then_inspect_verify_validate_and_run_in_json(
    bert: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(bert, out, "--opset", "11", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["proven"] is True
    assert document["manifest"]["facts"]["opset"] == 11
    for command in (["inspect"], ["verify"], ["validate"]):
        assert execute([*command, str(out), "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_script_in_the_clone_is_the_program(bert: Path, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "export", "onnx", "--model", str(bert), "--output", str(out),
         "--no-validate"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not validated" in done.stdout
    assert execute(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "found", "helps"),
    [
        (["--opset", "9"], 2, "opset 9", "11 to 25"),
        (["--opset", "26"], 2, "opset 26", "11 to 25"),
        (["--opset", "99"], 2, "opset 99", "--opset 25"),
        (["--opset", "11", "--strategy", "dynamo"], 2, "opset 11", "--strategy trace"),
        (["--task", "paint-a-picture"], 2, "paint-a-picture", "fill-mask"),
        (["--task", "text-classification"], 2, "classifier", "fill-mask"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_cannot_work_is_refused_with_what_can(
    bert: Path, out: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], code: int, found: str, helps: str,
) -> None:
    assert export(bert, out, *arguments) == code
    said = capsys.readouterr().err
    assert found in said
    assert helps in said
    assert "Traceback" not in said
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("damage", "code", "found"),
    [
        (lambda tiny, to: truncated(tiny("bert", "fill-mask"), to), 2, "model.safetensors"),
        (lambda tiny, to: corrupt(tiny("bert", "fill-mask"), to), 2, "model.safetensors"),
        (without_shard, 2, "-of-0000"),
        (lambda tiny, to: pickled(tiny("bert", "fill-mask"), to), 4, "--allow-pickle"),
        (lambda tiny, to: with_nan(tiny("bert", "fill-mask"), to,
                                   "bert.encoder.layer.0.attention.self.query.weight"),
         2, "bert.encoder.layer.0.attention.self.query.weight"),
    ],
    ids=["truncated", "corrupt", "missing-shard", "pickle", "nan"],
)
def test_damaged_checkpoints_leave_the_destination_untouched(
    tiny: Callable[..., Path], bert: Path, tmp_path: Path, out: Path,
    capsys: pytest.CaptureFixture[str], damage: Callable[..., Path], code: int, found: str,
) -> None:
    assert export(bert, out, "--no-validate") == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    broken = damage(tiny, tmp_path / "broken")
    assert export(broken, out, "--force") == code
    said = capsys.readouterr().err
    assert found in said
    assert "try:" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) in (
        ["artifact", "broken"], ["artifact", "broken", "cache"])


def test_an_unknown_model_without_network(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert export("nobody/nothing", out) == 6
    said = capsys.readouterr().err
    assert "nobody/nothing" in said
    assert "--weights random" in said
    assert not out.exists()


def test_an_existing_destination_needs_force(
    bert: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(bert, out, "--no-validate") == 0
    assert export(bert, out, "--no-validate") == 2
    assert "--force" in capsys.readouterr().err
    assert export(bert, out, "--no-validate", "--force", "--opset", "18") == 0
    assert json.loads((out / "manifest.json").read_text())["facts"]["opset"] == 18


def test_errors_are_json_too(bert: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(bert, out, "--opset", "9", "--json", "--quiet") == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["kind"] == "UsageError"
    assert said.err == ""


def test_usage_errors_of_the_parser_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["export", "onnx"]) == 2
    assert execute(["export", "nothing"]) == 2
    assert execute(["nothing"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_tampered_artifact_is_refused(
    bert: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(bert, out, "--no-validate") == 0
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    for command in ("verify", "validate"):
        assert execute([command, str(out)]) == 4
        assert "model.safetensors" in capsys.readouterr().err


def _heeds_ctrl_c() -> None:
    """A suite that a shell runs in the background is told to ignore Ctrl-C, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _terminal(process: subprocess.Popen[str]) -> None:
    """Ctrl-C reaches the children as well."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [(_terminal, 130, "interrupted"), (subprocess.Popen.terminate, 143, "")],
    ids=["ctrl-c", "sigterm"],
)
def test_what_ends_an_export_leaves_nothing(
    tiny: Callable[..., Path], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch,
    end: Callable[[subprocess.Popen[str]], None], code: int, says: str,
) -> None:
    """Ended at the first word of validation, on a model that takes seconds to validate."""
    model = tiny("bert", "fill-mask", num_hidden_layers=8, max_position_embeddings=512)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "modelport", "export", "onnx", "--model", str(model),
               "--output", str(out), "-v"]  # fmt: skip
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heeds_ctrl_c
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "validating" in line:
                break
        end(process)
        said = process.stderr.read()  # until the children have closed it, too
    assert process.returncode == code, said
    assert says in said
    assert not list(tmp_path.glob("*artifact*"))
    assert {p.name for p in temporary.iterdir()} <= {".ses"}  # which ONNX Runtime leaves
