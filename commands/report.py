"""``modelport report RUN``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..console import Output
from ._shared import SETTINGS, common


@click.command(context_settings=SETTINGS)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write Markdown here.")
@common
def report(output: Output, run: Path, html: Path | None, markdown: Path | None) -> None:
    """Show a benchmark run again, or write it as a page."""
    from ..runtimes import benchmark

    found = benchmark.load_report(run)
    for destination, view in ((html, benchmark.html), (markdown, benchmark.markdown)):
        if destination is not None:
            destination.write_text(view(found), encoding="utf-8")
    file = run / "benchmark.json" if run.is_dir() else run
    output.result(
        json.loads(file.read_text(encoding="utf-8")),
        lambda: benchmark.renderable(found),
    )


COMMAND = report
