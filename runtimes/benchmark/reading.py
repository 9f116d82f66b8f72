"""A report that was written earlier: of graphs, or of models that generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from ...errors import UsageError
from .generation import GENERATION, GenerationReport
from .report import REPORT, RunReport

Report = RunReport | GenerationReport
_REPORT: TypeAdapter[Report] = TypeAdapter(
    Annotated[Report, Field(union_mode="left_to_right")])


def report_file(path: Path) -> Path:
    """The report that a run directory or an artifact holds, the newer of two; or the file itself.

    Raises:
        UsageError: there is none.
    """
    files = [path / name for name in (REPORT, GENERATION)] if path.is_dir() else [path]
    found = [file for file in files if file.is_file()]
    if not found:
        raise UsageError(f"there is no benchmark at {path}", hint="modelport bench")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def load_report(path: Path) -> Report:
    """A report from its file, its run directory, or the artifact that was measured.

    Raises:
        UsageError: there is none, or it is not one.
    """
    file = report_file(path)
    try:
        return _REPORT.validate_json(file.read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        raise UsageError(f"{file} is not a benchmark: {first['loc']}: {first['msg']}") from e
