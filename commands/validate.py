"""``modelport validate ARTIFACT``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..console import Output
from ..errors import DestinationExists, ParityError
from ._shared import (
    ARTIFACT,
    DEVICE,
    FILE,
    SETTINGS,
    common,
    refuse_given,
    report_option,
    sizes,
    source_options,
)


@click.command(context_settings=SETTINGS)
@ARTIFACT
@click.option("--reference", help="Compare with this model or artifact; default: the source.")
@click.option("--revision", help="Commit, tag or branch of the hub model that --reference names.")
@click.option("--weights", type=click.Choice(["pretrained", "random"]), default="pretrained",
              show_default=True, help="Of the model that --reference names.")
@click.option("--batch-sizes", help="Batch sizes to compare at, such as 1,3,7.")
@click.option("--seq-lens", help="Sequence lengths to compare at, such as 1,17,512.")
@click.option("--inputs", type=FILE,
              help="Your own feeds, as .npz with one array for each input.")
@click.option("--max-seconds", type=click.FloatRange(0, min_open=True),
              help="Time for all cases but the first; what it excludes is listed.")
@click.option("--case-seconds", type=click.FloatRange(min=0, min_open=True), default=120.0,
              show_default=True, help="A case without a result after this long has failed.")
@click.option("--max-memory", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="Memory for one case's arrays.")
@click.option("--budget", help="Accepted effects, such as sqnr_db=30,agreement=0.995, or a file "
              "of such lines.")
@report_option("--junit", "Write JUnit XML here.", "junitparser")
@report_option("--html", "Write a self-contained page here.", "altair", "vl_convert")
@report_option("--markdown", "Write a job summary here.")
@click.option("--bisect", "reproduction", type=click.Path(path_type=Path), metavar="DIR",
              help="On failure name the first wrong layer, and write a reproduction here.")
@click.option("--no-cache", is_flag=True, help="Run the reference again even if it is known.")
@click.option("--in-process", is_flag=True,
              help="Run the artifact in this process, which a crash of its runtime then ends.")
@click.option("--runtime", help="What runs the artifact; default: the first that can.")
@DEVICE
@source_options
@common
def validate(
    output: Output, artifact: Path, reference: str | None, revision: str | None, weights: Any,
    batch_sizes: str | None, seq_lens: str | None, inputs: Path | None, max_seconds: float | None,
    case_seconds: float, max_memory: float | None, budget: str | None, no_cache: bool,
    in_process: bool, runtime: str | None, device: str, reproduction: Path | None,
    **reports: Path | None,
) -> int:
    """Compare an artifact with its source at shapes never traced, and record the verdict.

    ARTIFACT is a directory, or a bare .onnx file together with --reference MODEL.
    """
    from .. import pipeline
    from .. import validate as validation
    from ..artifacts.storage import refusals

    against = pipeline.named(reference, revision=revision, weights=weights) if reference else None
    if not isinstance(against, pipeline.ModelRequest):
        refuse_given("goes with a model that --reference names", "revision", "weights")
    if reproduction is not None:
        if isinstance(against, Path):
            raise click.UsageError("--bisect needs a model to compare with, not an artifact")
        if reproduction.exists():
            raise DestinationExists(f"{reproduction} exists", hint="another directory for --bisect")
        pipeline.require_bisectable(artifact)
    chosen = {"batch": sizes(batch_sizes), "sequence": sizes(seq_lens)}
    limits = pipeline.Limits(
        sizes={name: values for name, values in chosen.items() if values},
        max_seconds=max_seconds,
        max_memory=None if max_memory is None else int(max_memory * 1e9),
        inputs=inputs,
        budget=validation.read_budget(budget) if budget else None,
        cache=not no_cache,
        isolated=not in_process,
        case_seconds=case_seconds,
    )
    with output.progress() as notify:
        report = pipeline.validate_artifact(
            artifact, reference=against, runtime=runtime, device=device, limits=limits,
            notify=notify,
        )
    views: dict[str, Callable[[Any], str]] = {
        "junit": validation.to_junit, "html": validation.to_html, "markdown": validation.markdown,
    }  # fmt: skip
    output.result(json.loads(report.to_json()), lambda: validation.table(report))
    for kind, destination in reports.items():
        if destination is not None:
            with refusals(destination.parent):
                destination.write_text(views[kind](report), encoding="utf-8")
    if reproduction is not None and not report.accepted and not isinstance(against, Path):
        try:
            with output.progress() as notify:
                found = pipeline.bisect(
                    artifact, reference=against, report=report, limits=limits, out=reproduction,
                    device=device, notify=notify,
                )
            output.aside(found.view())
        except Exception as error:  # noqa: BLE001 - the report is out, and its verdict stands
            output.note(f"not bisected: {error}")
    return 0 if report.accepted else ParityError.exit_code


COMMAND = validate
