"""The outcome table holds whatever was run, and a partial run leaves the rest as it was."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import modelport
import pytest

SCRIPT = Path(modelport.__file__).parent / "benchmarks" / "torchscript_coverage.py"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    specification = importlib.util.spec_from_file_location("torchscript_coverage", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["torchscript_coverage"] = module
    specification.loader.exec_module(module)
    return module


def test_a_partial_run_without_the_compiler_keeps_what_the_compiler_gave(
    coverage: ModuleType,
) -> None:
    before = coverage.recorded()
    columns = list(coverage.COLUMNS)
    left = coverage.kept(before, ["t5"], columns)
    assert {o.column for o in left if o.family == "t5"} == set(coverage.COMPILED)
    assert {o for o in before if o.family != "t5"} <= set(left)
    rerun = [o for o in before if o.family == "t5" and o.column in columns]
    assert coverage.table([*left, *rerun]) == coverage.table(before)


def test_what_was_not_run_is_said(coverage: ModuleType) -> None:
    some = [o for o in coverage.recorded()
            if (o.family, o.column) != ("bert", "aotinductor, fp32")]  # fmt: skip
    row = next(line for line in coverage.table(some).splitlines() if line.startswith("| bert "))
    assert row.endswith("| not run |")


def test_the_page_shows_the_recorded_outcomes(coverage: ModuleType) -> None:
    assert coverage.table(coverage.recorded()) in coverage.PAGE.read_text(encoding="utf-8")


def test_an_unknown_architecture_is_refused(
    coverage: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--only", "bert,brt"])
    with pytest.raises(SystemExit):
        coverage.main()
    assert "no such architecture: brt" in capsys.readouterr().err
