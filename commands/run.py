"""``modelport run ARTIFACT --text …`` and ``modelport run pipeline.yaml``."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import Output
from ._shared import DEVICE, SETTINGS, common


@click.command(name="run", context_settings=SETTINGS)
@click.argument("target", type=click.Path(path_type=Path), metavar="ARTIFACT|PIPELINE.yaml")
@click.option("--text", help="What to run through an artifact.")
@DEVICE
@click.option("--dry-run", is_flag=True, help="Show what a pipeline would do, and do nothing.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True,
              help="Exports and publications of a pipeline at a time; benchmarks run alone.")
@common
def run(
    output: Output, target: Path, text: str | None, device: str, dry_run: bool, jobs: int
) -> None:
    """Run a text through an artifact, or a pipeline: export, prove, measure, publish a matrix.

    A pipeline that is run again does only what is missing.
    """
    if target.suffix in (".yaml", ".yml"):
        if text is not None:
            raise click.UsageError("--text goes with an artifact, not with a pipeline")
        _pipeline(output, target, dry_run, jobs)
        return
    if text is None:
        raise click.UsageError("give --text, what to run through the artifact")
    from .. import pipeline, predict

    found, session = pipeline.open_artifact(target, device=device)
    with session:
        answer = predict.predict(found, session, text)
    output.result(answer, lambda: predict.describe(answer))


def _pipeline(output: Output, recipe: Path, dry_run: bool, jobs: int) -> None:
    from ..pipeline import recipes

    if dry_run:
        stages = recipes.plan(recipe)
    else:
        with output.progress() as notify:
            stages = recipes.run(recipe, jobs=jobs, notify=notify)
    record = [
        {"kind": s.kind, "cell": s.cell, "key": s.key, "arguments": list(s.arguments),
         "state": "done" if s.done else "to do"}
        for s in stages
    ]
    output.result(record, lambda: "\n".join(
        f"{r['state']:6} modelport {' '.join(map(str, r['arguments']))}" for r in record))


COMMAND = run
