"""``modelport report RUN``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..console import Output
from ..errors import UsageError
from ._shared import SETTINGS, common

NEW = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings=SETTINGS)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=NEW, help="Write a self-contained page here.")
@click.option("--markdown", type=NEW, help="Write Markdown here.")
@common
def report(output: Output, run: Path, html: Path | None, markdown: Path | None) -> None:
    """Show a benchmark run again, or write it as a page.

    RUN is its directory, the report in it, or an artifact that was measured.
    """
    from ..runtimes import benchmark

    found = benchmark.load_report(run)
    for destination, view in ((html, benchmark.html), (markdown, benchmark.markdown)):
        if destination is not None:
            _write(destination, view(found))
    output.result(
        json.loads(benchmark.report_file(run).read_text(encoding="utf-8")),
        lambda: benchmark.renderable(found),
    )


def _write(destination: Path, text: str) -> None:
    try:
        destination.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{destination} cannot be written: {e.strerror}",
                         allowed="a file in a directory that exists") from e


COMMAND = report
