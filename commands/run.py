"""``modelport run ARTIFACT --text …`` and ``modelport run pipeline.yaml``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import click

from ..console import Output
from ._shared import DEVICE, SETTINGS, common, refuse_given


@click.command(name="run", context_settings=SETTINGS)
@click.argument("target", type=click.Path(path_type=Path), metavar="ARTIFACT|PIPELINE.yaml")
@click.option("--text", help="What to run through an artifact.")
@click.option("--max-new-tokens", type=click.IntRange(1),
              help="Of an artifact that generates; default: as its generation config says.")
@click.option("--sample", is_flag=True, help="Draw tokens instead of taking the likeliest.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of --sample.")
@click.option("--beams", type=click.IntRange(1), help="Search this many beams.")
@click.option("--audio", type=click.Path(dir_okay=False, path_type=Path),
              help="Recording to transcribe; with --text, where audio that is generated goes "
              "as WAV (default: ARTIFACT.wav).")
@DEVICE
@click.option("--dry-run", is_flag=True, help="Show what a pipeline would do, and do nothing.")
@click.option("--jobs", type=click.IntRange(1),
              help="Exports and publications of a pipeline at a time; benchmarks run alone.  "
              "[default: 1]")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Run a pipeline's stages here, or on the Ray cluster at RAY_ADDRESS.")
@common
def run(
    output: Output, target: Path, text: str | None, device: str, dry_run: bool,
    max_new_tokens: int | None, sample: bool, seed: int, beams: int | None, audio: Path | None,
    jobs: int | None, executor: Literal["local", "ray"],
) -> None:
    """Run a text or a recording through an artifact; or a pipeline, a matrix of exports.

    A pipeline exports, proves, measures and publishes every cell of its matrix.
    A pipeline that is run again does only what is missing.
    """
    if target.suffix in (".yaml", ".yml"):
        refuse_given("goes with an artifact, not with a pipeline", "text", "device", "audio",
                     "max_new_tokens", "sample", "seed", "beams")
        if jobs and executor == "ray":
            raise click.UsageError("--jobs is for this machine; a cluster knows its room")
        _pipeline(output, target, dry_run, jobs or 1, executor)
        return
    refuse_given("goes with a pipeline, not with an artifact", "dry_run", "jobs", "executor")
    if text is None and audio is None:
        raise click.UsageError("give --text or --audio, what to run through the artifact")
    from .. import artifacts, pipeline, predict

    if artifacts.read(target).manifest.components:
        asked = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": sample or None}
        settings = {name: value for name, value in asked.items() if value is not None}
        with pipeline.load_pipeline(target, device) as speaker:
            if text is None:
                assert audio is not None
                answer = predict.heard(speaker, audio, settings, seed=seed)
            else:
                answer = predict.generated(
                    speaker, text, settings, seed=seed,
                    audio=audio or target.with_name(target.name + ".wav"))
        output.result(answer, lambda: predict.describe(answer))
        return
    refuse_given("goes with an artifact that generates; this one is one graph, which takes --text",
                 "audio", "max_new_tokens", "sample", "seed", "beams")
    assert text is not None
    found, session = pipeline.open_artifact(target, device=device)
    with session:
        answer = predict.predict(found, session, text)
    output.result(answer, lambda: predict.describe(answer))


def _pipeline(
    output: Output, recipe: Path, dry_run: bool, jobs: int, executor: Literal["local", "ray"]
) -> None:
    from ..pipeline import recipes

    if dry_run:
        stages = recipes.plan(recipe)
    else:
        with output.progress() as notify:
            stages = recipes.run(recipe, jobs=jobs, where=executor, notify=notify)
    record = [
        {"kind": s.kind, "cell": s.cell, "key": s.key, "arguments": list(s.arguments),
         "needs": dataclasses.asdict(s.needs), "state": "done" if s.done else "to do"}
        for s in stages
    ]
    output.result(record, lambda: "\n".join(
        f"{r['state']:6} modelport {' '.join(map(str, r['arguments']))}" for r in record))


COMMAND = run
