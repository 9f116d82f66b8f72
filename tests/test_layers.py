"""Imports point one way: cli → pipeline → the parts → session, spec → errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import modelport
import pytest

ROOT = Path(modelport.__file__).parent

# A module may import what stands at a lower level, and its own package. Equal levels may not
# meet: exporters and runtimes never import each other, validate and benchmark open no session.
LEVELS = {
    "errors": 0,
    "plugins": 1,
    "recordings": 1,
    "spec": 1,
    "session": 2,
    "profiles": 2,
    "gpu": 2,
    "checkpoints.model": 2,
    "artifacts": 3,
    "destinations": 4,
    "checkpoints": 4,
    "transforms": 4,
    "validate": 5,
    "bark": 5,
    "exporters": 6,
    "runtimes": 6,
    "predict": 7,
    "doctor": 7,
    "pipeline": 8,
    "console": 8,
    "commands": 9,
    "cli": 10,
}
SOURCES = sorted(
    p for p in ROOT.rglob("*.py")
    if (first := p.relative_to(ROOT).parts[0]) not in {"tests", "benchmarks", "build", "examples"}
    and not first.startswith(".")  # environments, and what benchmarks leave
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str) -> tuple[str, int]:
    """The layer a module belongs to: the longest name in LEVELS that contains it."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LEVELS:
            return prefix, LEVELS[prefix]
    raise AssertionError(f"{module} has no place in LEVELS; give it one")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of ours that a file imports, for type checking included, with the line."""
    name = name_of(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [p for p in package if p]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            elif (node.module or "").split(".")[0] == "modelport":
                target = ".".join((node.module or "").split(".")[1:])
            else:
                continue
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").exists() or (
                    ROOT / Path(*inner.split("."))
                ).is_dir()
                found = inner if is_module else target
                if found:
                    yield node.lineno, found


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_imports_point_downwards(path: Path) -> None:
    name = name_of(path)
    if name in {"", "__main__"}:
        return
    layer, level = place(name)
    for line, target in imports(path):
        other, other_level = place(target)
        same = layer.split(".")[0] == other.split(".")[0]
        assert same or other_level < level, f"{path}:{line} {name} imports {target}"


def test_the_test_can_fail(tmp_path: Path) -> None:
    assert place("exporters.onnx")[1] == place("runtimes.onnxruntime")[1]
    assert place("validate.judge")[1] < place("runtimes.torch_eager")[1]
    with pytest.raises(AssertionError, match="no place"):
        place("unheard_of")


def test_only_the_cli_names_the_package() -> None:
    """Everything else is relative, so that `python cli.py` and an install are the same code."""
    allowed = {"cli.py", "__main__.py"}
    for path in SOURCES:
        if path.name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "modelport", f"{path}:{node.lineno}"
