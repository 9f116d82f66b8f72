"""Help, inspect and verify work where no framework is installed, and every module imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import modelport
import pytest

HEAVY = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "onnxsim",
    "tensorrt", "openvino", "safetensors", "tokenizers", "scipy", "pandas",
)  # fmt: skip


def without(*packages: str) -> str:
    """Code after which importing one of these fails as if it were not installed."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


FROZEN = Path(__file__).parent / "fixtures" / "artifact-schema-1"


def bare(
    *arguments: str, lacking: tuple[str, ...] = HEAVY
) -> subprocess.CompletedProcess[str]:
    call = f"sys.exit(execute({list(arguments)!r}))"
    code = f"{without(*lacking)}\nfrom modelport.cli import execute\n{call}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_environment_really_lacks_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{without(*HEAVY)}\nimport torch"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("--version",), ("export", "--help"), ("export", "onnx", "--help"),
     ("inspect", "--help"), ("verify", "--help"), ("validate", "--help"), ("doctor", "--help"),
     ("run", "--help")],
    ids=" ".join,
)  # fmt: skip
def test_every_help_page(arguments: tuple[str, ...]) -> None:
    done = bare(*arguments)
    expected = 2 if arguments == () else 0  # click's code for a missing command
    assert done.returncode == expected, done.stderr
    assert "Usage: modelport" in done.stdout + done.stderr or "version" in done.stdout


@pytest.mark.parametrize(("command", "shown"), [
    (("inspect",), "model.onnx"), (("inspect", "--tree"), "pass, worst ρ 2.53"),
    (("verify",), "files are those"),
], ids=["inspect", "tree", "verify"])  # fmt: skip
def test_an_artifact_is_read_without_any_framework(command: tuple[str, ...], shown: str) -> None:
    done = bare(*command, str(FROZEN))
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("lacking", [HEAVY, ("torch",)], ids=["all", "torch"])
@pytest.mark.parametrize("task", [(), ("--task", "feature-extraction")], ids=["detected", "given"])
def test_export_without_torch_says_what_is_missing(
    lacking: tuple[str, ...], task: tuple[str, ...]
) -> None:
    done = bare("export", "onnx", "--model", "demo", *task, lacking=lacking)
    assert done.returncode == 6, done.stderr
    assert f"{'transformers' if 'transformers' in lacking else 'torch'} is not installed" in (
        done.stderr)
    assert "pip install torch" in done.stderr
    assert "Traceback" not in done.stderr


def modules() -> list[str]:
    root = Path(modelport.__file__).parent
    skip = {"tests", "benchmarks", "build", "examples"}
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in skip or parts[0].startswith(".") or parts == ("__main__",):
            continue
        found.append(".".join(["modelport", *(p for p in parts if p != "__init__")]))
    return found


@pytest.mark.parametrize("module", modules())
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)
