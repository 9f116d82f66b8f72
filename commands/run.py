"""``modelport run ARTIFACT``."""

from __future__ import annotations

from pathlib import Path

import click

from ..console import Output
from ._shared import ARTIFACT, DEVICE, SETTINGS, common


@click.command(name="run", context_settings=SETTINGS)
@ARTIFACT
@click.option("--text", required=True, help="What to run through the model.")
@DEVICE
@common
def run_text(output: Output, artifact: Path, text: str, device: str) -> None:
    """Run a text through an artifact and show what comes out."""
    from .. import pipeline, predict

    found, session = pipeline.open_artifact(artifact, device=device)
    with session:
        answer = predict.predict(found, session, text)
    output.result(answer, lambda: predict.describe(answer))


COMMAND = run_text
