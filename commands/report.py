"""``modelport report RUN``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import Output
from ..errors import UsageError
from ._shared import SETTINGS, common

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NEW = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings=SETTINGS)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=NEW, help="Write a self-contained page here.")
@click.option("--markdown", type=NEW, help="Write Markdown here.")
@common
def report(output: Output, run: Path, html: Path | None, markdown: Path | None) -> None:
    """Show a benchmark run again, or write it as a page.

    RUN is its directory, or the report in it. Where it has both, the newer is shown.
    """
    file, found, views = _read(run)
    for kind, destination in (("html", html), ("markdown", markdown)):
        if destination is None:
            continue
        if kind not in views:
            raise UsageError(f"there is no page for {file}, of models that generate",
                             allowed="--markdown")
        _write(destination, views[kind](found))
    output.result(json.loads(file.read_text(encoding="utf-8")), lambda: views["terminal"](found))


def _read(run: Path) -> tuple[Path, Any, Mapping[str, Callable[[Any], Any]]]:
    """A run's report with its file, and how it can be shown."""
    from ..runtimes import benchmark

    files = [run]
    if run.is_dir():
        files = [run / name for name in (benchmark.GENERATION, benchmark.REPORT)]
        files = [file for file in files if file.exists()] or [files[-1]]
    file = max(files, key=lambda f: f.stat().st_mtime_ns if f.exists() else 0)
    if file.name == benchmark.GENERATION:
        return file, benchmark.load_generation(file), {
            "terminal": benchmark.generation_renderable,
            "markdown": lambda found: benchmark.generation_markdown(found, "Generation")}
    return file, benchmark.load_report(file), {
        "terminal": benchmark.renderable, "markdown": benchmark.markdown, "html": benchmark.html}


def _write(destination: Path, text: str) -> None:
    try:
        destination.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{destination} cannot be written: {e.strerror}",
                         allowed="a file in a directory that exists") from e


COMMAND = report
