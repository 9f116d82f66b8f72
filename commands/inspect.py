"""``modelport inspect ARTIFACT``."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import Output
from ._shared import ARTIFACT, SETTINGS, common


@click.command(context_settings=SETTINGS)
@ARTIFACT
@click.option("--tree", is_flag=True, help="What it was made from, step by step.")
@common
def inspect(output: Output, artifact: Path, tree: bool) -> None:
    """Show what an artifact is, where it came from and what is proven. Loads no framework."""
    from .. import artifacts, console

    found = artifacts.read(artifact)
    view = console.lineage_view if tree else console.artifact_view
    output.result(console.artifact_record(found), lambda: view(found))


COMMAND = inspect
