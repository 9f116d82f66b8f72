"""The command line: parse, call :mod:`modelport.pipeline`, print, exit.

Knows no format by name: the subcommands of ``export`` and their options come from the files in
``exporters/``. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click
from modelport import __version__, exporters
from modelport.console import Output
from modelport.errors import ModelportError, ParityError

Command = TypeVar("Command", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def common(command: Command) -> Command:
    """The options every command takes; they arrive as one ``output``."""
    import functools

    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        output = click.get_current_context().ensure_object(Output)
        output.as_json, output.quiet, output.verbose = as_json, quiet, verbose
        return command(*args, output=output, **kwargs)

    for decorate in (
        click.option("-v", "--verbose", is_flag=True, help="Every step, and tracebacks."),
        click.option("-q", "--quiet", is_flag=True, help="Results and errors only."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        wrapped = decorate(wrapped)
    return wrapped  # type: ignore[return-value]


def model_options(command: Command) -> Command:
    """Which model, and what is allowed for it; they arrive as one ``request``."""
    import functools

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from modelport.pipeline import ModelRequest

        names = [f.name for f in dataclasses.fields(ModelRequest)]
        request = ModelRequest(**{name: kwargs.pop(name) for name in names})
        return command(*args, request=request, **kwargs)

    for decorate in (
        click.option("--trust-remote-code", is_flag=True,
                     help="Run the checkpoint's own Python; needs a pinned --revision."),
        click.option("--allow-pickle", is_flag=True,
                     help="Convert a pickle checkpoint, in a process of its own."),
        click.option("--seed", type=int, default=0, show_default=True,
                     help="Seed of --weights random."),
        click.option("--weights", type=click.Choice(["pretrained", "random"]),
                     default="pretrained", show_default=True,
                     help="random: the real architecture with seeded weights; needs no network."),
        click.option("--task", help="Head to load; default: the checkpoint's own."),
        click.option("--revision", help="Commit, tag or branch of a hub model."),
        click.option("--model", required=True,
                     help="Hub id, local directory, demo, or a bundled architecture."),
    ):
        wrapped = decorate(wrapped)
    return wrapped  # type: ignore[return-value]


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="modelport")
def cli() -> None:
    """Turn transformers checkpoints into artifacts that are proven equal to them.

    Exit codes: 0 ok, 1 unexpected, 2 usage, 3 parity failed, 4 refused for safety, 5 sweep
    incomplete, 6 something needed is absent, 130 interrupted, 143 terminated.
    """


class Formats(click.Group):
    """One subcommand for each file in ``exporters/``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(exporters.names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _export_command(cmd_name) if cmd_name in exporters.names() else None


@cli.group(cls=Formats)
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
        from modelport import console, pipeline

        target = destination or pipeline.default_output(request, name)
        options = exporter.options_type(**chosen)
        if request.weights == "random":
            output.note(
                f"note: weights are random (seed {request.seed}); this is the architecture of "
                f"{request.model}, not the published model"
            )
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
    kind = click.Choice(choices) if choices else {"int": int, "bool": bool}.get(str(field.type), str)
    name = "--" + field.name.replace("_", "-")
    return click.option(name, field.name, type=kind, default=field.default, show_default=True,
                        help=field.metadata.get("help", ""))


def artifact_and_report(artifact: Any, *, reports: bool) -> Any:
    """An artifact with its parity table below."""
    from modelport import console, pipeline, validate
    from rich.console import Group

    parts = [console.artifact_view(artifact)]
    report = pipeline.parity_report(artifact) if reports else None
    if report is not None:
        parts += ["", validate.table(report)]
    return Group(*parts)


ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))


def sizes(text: str | None) -> tuple[int, ...]:
    """``1,2,4`` as numbers.

    Raises:
        BadParameter: not a list of positive integers.
    """
    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(size < 1 for size in found):
        raise click.BadParameter(f"{text!r} is not a list of positive integers, such as 1,3,7")
    return found


@cli.command()
@ARTIFACT
@click.option("--reference", help="Compare with this model or artifact; default: the source.")
@click.option("--batch-sizes", help="Batch sizes to compare at, such as 1,3,7.")
@click.option("--seq-lens", help="Sequence lengths to compare at, such as 1,17,512.")
@click.option("--inputs", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Your own feeds, as .npz with one array for each input.")
@click.option("--max-seconds", type=float, help="Time for everything; what it excludes is listed.")
@click.option("--max-memory", type=float, metavar="GB", help="Memory for one case's arrays.")
@click.option("--budget", help="Accepted effects, such as sqnr_db=30,agreement=0.995, or a file "
              "of such lines.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a job summary here.")
@click.option("--no-cache", is_flag=True, help="Run the reference again even if it is known.")
@click.option("--runtime", help="What runs the artifact; default: the first that can.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@common
def validate(
    output: Output, artifact: Path, reference: str | None, batch_sizes: str | None,
    seq_lens: str | None, inputs: Path | None, max_seconds: float | None,
    max_memory: float | None, budget: str | None, no_cache: bool, runtime: str | None,
    device: str, **reports: Path | None,
) -> int:
    """Compare an artifact with its source at shapes never traced, and record the verdict.

    ARTIFACT is a directory, or a bare .onnx file together with --reference MODEL.
    """
    from modelport import pipeline
    from modelport import validate as validation

    chosen = {"batch": sizes(batch_sizes), "sequence": sizes(seq_lens)}
    limits = pipeline.Limits(
        sizes={name: values for name, values in chosen.items() if values},
        max_seconds=max_seconds,
        max_memory=int(max_memory * 1e9) if max_memory else None,
        inputs=inputs,
        budget=validation.read_budget(budget) if budget else None,
        cache=not no_cache,
    )
    with output.progress() as notify:
        report = pipeline.validate_artifact(
            artifact, reference=pipeline.named(reference) if reference else None,
            runtime=runtime, device=device, limits=limits, notify=notify,
        )
    views = {"junit": validation.to_junit, "html": validation.to_html,
             "markdown": validation.markdown}
    for kind, destination in reports.items():
        if destination is not None:
            destination.write_text(views[kind](report), encoding="utf-8")
    output.result(json.loads(report.to_json()), lambda: validation.table(report))
    return 0 if report.accepted else ParityError.exit_code


@cli.command()
@ARTIFACT
@common
def inspect(output: Output, artifact: Path) -> None:
    """Show what an artifact is, where it came from and what is proven. Loads no framework."""
    from modelport import artifacts, console

    found = artifacts.read(artifact)
    output.result(console.artifact_record(found), lambda: console.artifact_view(found))


@cli.command()
@ARTIFACT
@common
def verify(output: Output, artifact: Path) -> None:
    """Check every file of an artifact against the digests in its manifest."""
    from modelport import artifacts, console

    found = artifacts.verify(artifact)
    count = len(found.manifest.files)
    output.result(
        {"verified": True, **console.artifact_record(found)},
        lambda: f"{artifact}: {count} files are those the manifest names",
    )


@cli.command(name="run")
@ARTIFACT
@click.option("--text", required=True, help="What to run through the model.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@common
def run_text(output: Output, artifact: Path, text: str, device: str) -> None:
    """Run a text through an artifact and show what comes out."""
    from modelport import pipeline, predict

    found, session = pipeline.open_artifact(artifact, device=device)
    with session:
        answer = predict.predict(found, session, text)
    output.result(answer, lambda: predict.describe(answer))


@cli.command()
@common
def doctor(output: Output) -> None:
    """Show versions, providers and devices, and name what is missing or known to fail."""
    from modelport import doctor as examination

    with output.progress() as notify:
        findings = examination.examine(notify)
    output.result(examination.record(findings), lambda: examination.view(findings))


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises."""
    output = Output()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = cli.main(arguments, prog_name="modelport", standalone_mode=False, obj=output)
        return result if isinstance(result, int) else 0
    except ModelportError as error:
        if output.verbose:
            traceback.print_exc()
        output.error(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback without -v
        if output.verbose:
            traceback.print_exc()
        found = f"unexpected {type(error).__name__}: {error}"
        output.error(ModelportError(found, hint="run again with -v and report the traceback"))
        return 1


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """Entry point of the ``modelport`` program."""
    sys.exit(execute())


if __name__ == "__main__":
    main()
