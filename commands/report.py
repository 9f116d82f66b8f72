"""``modelport report RUN``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..console import Output
from ._shared import SETTINGS, common, report_option


@click.command(context_settings=SETTINGS)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@report_option("--html", "Write a self-contained page here.", "altair", "vl_convert")
@report_option("--markdown", "Write Markdown here.")
@common
def report(output: Output, run: Path, html: Path | None, markdown: Path | None) -> None:
    """Show a benchmark run again, or write it as a page.

    RUN is its directory, the report in it, or an artifact that was measured.
    """
    from ..artifacts.storage import refusals
    from ..runtimes import benchmark

    found = benchmark.load_report(run)
    for destination, view in ((html, benchmark.html), (markdown, benchmark.markdown)):
        if destination is not None:
            with refusals(destination.parent):
                destination.write_text(view(found), encoding="utf-8")
    output.result(
        json.loads(benchmark.report_file(run).read_text(encoding="utf-8")),
        lambda: benchmark.renderable(found),
    )


COMMAND = report
