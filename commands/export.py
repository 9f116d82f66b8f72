"""``modelport export FORMAT``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import exporters
from ..console import Output
from ._shared import SETTINGS, Command, common, model_options


class Formats(click.Group):
    """One subcommand for each file in ``exporters/``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(exporters.names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _export_command(cmd_name) if cmd_name in exporters.names() else None


@click.group(cls=Formats, context_settings=SETTINGS)
def export() -> None:
    """Export a model to a format, prove it equal to its source, and place it."""


def _export_command(name: str) -> click.Command:
    exporter = exporters.get(name)
    fields = dataclasses.fields(exporter.options_type)

    @common
    @model_options
    def command(
        output: Output, request: Any, destination: Path | None, force: bool, validate: bool,
        **chosen: Any,
    ) -> None:
        from .. import console, pipeline

        target = destination or pipeline.default_output(request, name)
        options = exporter.options_type(**chosen)
        if request.weights == "random":
            output.note(
                f"note: weights are random (seed {request.seed}); this is the architecture of "
                f"{request.model}, not the published model"
            )
        if exporter.notice:
            output.note(f"note: {exporter.notice}")
        if not validate:
            output.note("note: parity is skipped; publishing will refuse this artifact")
        with output.progress() as notify:
            artifact = pipeline.export(
                name, request, target, options, force=force, validate=validate, notify=notify
            )
        output.result(
            console.artifact_record(artifact), lambda: artifact_and_report(artifact, reports=True)
        )

    for field in reversed(fields):
        command = _option(field)(command)
    command = click.option("--no-validate", "validate", flag_value=False, default=True,
                           help="Skip parity; recorded, and refused by publish.")(command)
    command = click.option("--force", is_flag=True,
                           help="Replace an artifact at the destination, atomically.")(command)
    command = click.option("--output", "destination", type=click.Path(path_type=Path),
                           help=f"Destination; default: out/MODEL-{name}.")(command)
    return click.command(name, help=exporter.summary, context_settings=SETTINGS)(command)


def _option(field: dataclasses.Field[Any]) -> Callable[[Command], Command]:
    """A command-line option from one field of an exporter's options."""
    choices = field.metadata.get("choices")
    plain = {"int": int, "bool": bool, "int | str": number_or_word}.get(str(field.type), str)
    kind = click.Choice(choices) if choices else plain
    name = "--" + field.name.replace("_", "-")
    flag: dict[str, Any] = {"is_flag": True} if plain is bool else {"type": kind}
    return click.option(name, field.name, default=field.default, show_default=True,
                        help=field.metadata.get("help", ""), **flag)


def number_or_word(given: int | str) -> int | str:
    """``17`` as a number; ``auto``, or whatever the exporter will refuse, as it is."""
    return int(given) if str(given).isdecimal() else given


def artifact_and_report(artifact: Any, *, reports: bool) -> Any:
    """An artifact with its parity table below."""
    from rich.console import Group

    from .. import console, pipeline, validate

    parts = [console.artifact_view(artifact)]
    report = pipeline.parity_report(artifact) if reports else None
    if report is not None:
        parts += ["", validate.table(report)]
    return Group(*parts)


COMMAND = export
