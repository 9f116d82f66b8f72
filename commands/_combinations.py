"""``modelport bench bark --combinations``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ..console import Output
from ._shared import DEVICE, SETTINGS, common, sizes, source_options

FLAG = "--combinations"


@click.command("bench", context_settings=SETTINGS)
@click.argument("model", type=click.Choice(["bark"]))
@click.option(FLAG, is_flag=True, required=True, help="These options instead of those of bench.")
@click.option("--checkpoint", help="Default: suno/bark on a GPU; on a CPU suno/bark-small.")
@click.option("--revision", help="Commit, tag or branch of the checkpoint on the hub.")
@click.option("--weights", type=click.Choice(["pretrained", "random"]),
              help="Default: pretrained on a GPU; on a CPU drawn from a seed.")
@DEVICE
@click.option("--batch-sizes", default="1,8", show_default=True)
@click.option("--samples", type=click.IntRange(1), help="Calls of each row. Default: 100; CPU 3.")
@click.option("--rounds", type=click.IntRange(1),
              help="Fresh processes of each row; claims need 5. Default: 5; CPU 3.")
@click.option("--new-tokens", type=click.IntRange(1), help="Default: 256; CPU 16.")
@click.option("--text-window", type=click.IntRange(1),
              help="Padded length of a prompt. Default: the checkpoint's own; CPU 64.")
@click.option("--fine-window", type=click.IntRange(2),
              help="Tokens the fine model sees at once. Default: the checkpoint's own; CPU 128.")
@click.option("--lengths", type=click.Choice(["fixed", "free"]), default="fixed",
              show_default=True, help="Exactly as many tokens, or where the model stops.")
@click.option("--voice", help="Preset: a name the checkpoint knows, an .npz file, or seeded.")
@click.option("--sample", is_flag=True, help="Draw tokens instead of taking the likeliest.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--prove/--no-prove", default=True, show_default=True,
              help="Hold every combination against the plain model first.")
@click.option("--output", "destination", type=click.Path(path_type=Path), default="run-bark",
              show_default=True, help="Where cells and the report are kept.")
@source_options
@common
def combinations(
    output: Output, model: str, combinations: bool, device: str, batch_sizes: str,
    checkpoint: str | None, revision: str | None, weights: Any, samples: int | None,
    rounds: int | None, destination: Path, prove: bool, **setting: Any,
) -> int:
    """Measure what each optimisation of Bark brings, alone and together, and prove each one."""
    from rich.console import Group

    from ..checkpoints import consent
    from ..pipeline import combinations as pipeline

    usual = pipeline.Plan.usual(device)
    given = {name: value for name, value in setting.items() if value is not None}
    request = usual.model
    if checkpoint is not None:
        request = replace(request, model=checkpoint, weights="pretrained")
    if weights is not None:
        request = replace(request, weights=weights)
    plan = replace(
        usual, model=replace(request, revision=revision, seed=setting["seed"],
                             **asdict(consent.given())),
        setting=replace(usual.setting, **given), batches=sizes(batch_sizes),
        samples=samples or usual.samples, rounds=rounds or usual.rounds, prove=prove)
    with output.progress() as notify:
        report = pipeline.combinations(plan, destination, notify=notify)
    output.result(json.loads((destination / pipeline.REPORT).read_text(encoding="utf-8")),
                  lambda: Group(*map(_shown, report.tables()), *report.notes()))
    report.require_sound()
    return 0


def _shown(table: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=table.title, title_justify="left", box=None, pad_edge=False,
                  header_style="bold")
    for column in table.columns:
        shown.add_column(column, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown
