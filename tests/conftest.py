"""Tiny checkpoints, built once a session; every test has a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"),
                     help="where the conformance suites run what they export")  # fmt: skip


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(kind, task, **build options)`` → directory; the same arguments, the same directory."""
    made: dict[object, Path] = {}

    def get(kind: str, task: str | None = None, **options: object) -> Path:
        task = task or tiny_models.TASKS[kind]
        key = (kind, task, *sorted(options.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{task}") / "model"
            made[key] = tiny_models.build(kind, task, directory, **options)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
