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
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from modelport import __version__, exporters
from modelport.console import Output
from modelport.errors import ModelportError, ParityError

if TYPE_CHECKING:
    from types import FrameType

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
    plain = {"int": int, "bool": bool}.get(str(field.type), str)
    kind = click.Choice(choices) if choices else plain
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
@click.option("--public-key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="PEM; refuse what its owner did not sign, before anything is parsed.")
@click.option("--identity", help="Keyless: who must have signed; with --issuer.")
@click.option("--issuer", help="Keyless: the OpenID Connect issuer of --identity.")
@common
def verify(
    output: Output, artifact: Path, public_key: Path | None, identity: str | None,
    issuer: str | None,
) -> None:
    """Check every file of an artifact against its manifest, and who signed it."""
    from modelport import console
    from modelport.pipeline import publishing

    signer = _expected_signer(public_key, identity, issuer)
    found = publishing.verify(artifact, signer=signer)
    count = len(found.manifest.files)
    signed = " and signed by that key" if public_key else " and signed as asked" if signer else ""
    output.result(
        {"verified": True, "signed": signer is not None, **console.artifact_record(found)},
        lambda: f"{artifact}: {count} files are those the manifest names{signed}",
    )


def _expected_signer(public_key: Path | None, identity: str | None, issuer: str | None) -> Any:
    if (identity is None) != (issuer is None) or (public_key and identity):
        raise click.UsageError("give --public-key, or --identity with --issuer")
    if identity is None or issuer is None:
        return public_key
    from modelport.artifacts.signing import Identity

    return Identity(identity, issuer)


def _percent(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """``5%`` or ``0.05`` as a share."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise click.BadParameter(f"{text!r} is not a share, such as 5%")
    return share


@cli.command()
@ARTIFACT
@click.argument("destination")
@click.option("--private-key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="PEM; sign the artifact first. Its password: MODELPORT_KEY_PASSWORD.")
@click.option("--keyless", is_flag=True, help="Sign with the identity of this CI job.")
@click.option("--require", "required", type=click.Choice(["benchmark"]), multiple=True,
              help="Refuse without a valid benchmark of exactly these files.")
@click.option("--max-regression", callback=_percent, metavar="5%",
              help="Refuse what is slower by more than this than --against.")
@click.option("--against", metavar="DEST:previous", help="The release to compare speed with.")
@click.option("--allow-unproven", is_flag=True, help="Publish without passing parity; recorded.")
@click.option("--allow-random-weights", is_flag=True, help="Publish random weights; recorded.")
@click.option("--allow-pickle-source", is_flag=True,
              help="Publish what came out of a pickle; recorded.")
@click.option("--allow-remote-code", is_flag=True,
              help="Publish what ran the checkpoint's own Python; recorded.")
@click.option("--expect", "expected", metavar="sha256:…|none",
              help="Move the tag only if it points at this release.")
@click.option("--resend", is_flag=True, help="Send every file again; mends damaged ones.")
@click.option("--name", "serve_as", help="Name on a server; default: the directory's.")
@common
def publish(
    output: Output, artifact: Path, destination: str, private_key: Path | None, keyless: bool,
    required: tuple[str, ...], expected: str | None, resend: bool, serve_as: str | None,
    **gate: Any,
) -> None:
    """Publish a proven artifact: data first, then the tag in one step.

    DESTINATION is file:///path[:tag], oci://registry/name[:tag], hf://owner/name[@revision],
    s3://bucket/path[:tag] or any other file system of fsspec, or triton:///model_repository.
    """
    from modelport.pipeline import publishing

    if private_key and keyless:
        raise click.UsageError("--private-key or --keyless, not both")
    signer = publishing.Signer(private_key) if private_key or keyless else None
    rules = publishing.Gate(require_benchmark="benchmark" in required, **gate)
    with output.progress() as notify:
        done = publishing.publish(
            artifact, destination, rules, signer=signer, expected=expected, resend=resend,
            serve_as=serve_as, notify=notify,
        )
    if done.release.allowed:
        output.note(f"note: published although {', '.join(done.release.allowed)}; recorded")
    record = {
        "reference": done.reference, "digest": done.digest, "sent": done.sent,
        "artifact": done.release.artifact, "allowed": list(done.release.allowed),
        "checks": dict(done.release.checks), "places": [str(p) for p in done.places],
    }
    output.result(record, lambda: "\n".join(
        [f"{done.reference} is {done.digest} ({done.sent:,} bytes sent)"] if done.digest
        else [f"wrote {place}" for place in done.places]))


@cli.command()
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--public-key", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="PEM; refuse what its owner did not sign.")
@click.option("--identity", help="Keyless: who must have signed; with --issuer.")
@click.option("--issuer", help="Keyless: the OpenID Connect issuer of --identity.")
@click.option("--force", is_flag=True, help="Replace an artifact that is there, atomically.")
@common
def pull(
    output: Output, source: str, directory: Path, public_key: Path | None, identity: str | None,
    issuer: str | None, force: bool,
) -> None:
    """Fetch a published artifact; every byte is checked before it is placed.

    SOURCE is what publish took, or the same with @sha256:… for one release whatever tags say.
    """
    from modelport import console
    from modelport.pipeline import publishing

    signer = _expected_signer(public_key, identity, issuer)
    with output.progress() as notify:
        found = publishing.pull(source, directory, signer=signer, force=force, notify=notify)
    if found.release.allowed:
        output.note(f"note: this was published although {', '.join(found.release.allowed)}")
    output.result(
        {"digest": found.digest, "signed": signer is not None,
         "allowed": list(found.release.allowed), **console.artifact_record(found.artifact)},
        lambda: f"{directory} is {found.digest} ({len(found.release.files)} files verified)",
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
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@click.option("--baseline", help="Model to compare with, run eagerly.")
@click.option("--baseline-weights", type=click.Choice(["pretrained", "random"]),
              default="pretrained", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--runtimes", "runtime_names", help="Names, such as onnxruntime,openvino.")
@click.option("--batch-sizes", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--seq-lens", default="16,128,384", show_default=True)
@click.option("--threads", default=None, help="Thread counts, such as 1,2; default: all cores.")
@click.option("--batching", help="Cut a corpus: padded,sorted,token-budget.")
@click.option("--corpus", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text, one sentence a line; default: the built-in lengths.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True,
              help="Fresh processes for each cell; claims need 5.")
@click.option("--seconds", type=click.FloatRange(0), default=10.0, show_default=True,
              help="Sampling time of one cell.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0,
              show_default=True, help="Seconds until a cell is killed.")
@click.option("--memory-limit", type=click.FloatRange(0, min_open=True), metavar="GB")
@click.option("--p95", type=click.FloatRange(0, min_open=True), metavar="MS",
              help="Recommend the best within this latency.")
@click.option("--against", type=click.Path(exists=True, path_type=Path),
              help="An older run, or an artifact with a benchmark.")
@click.option("--max-regression", default="5%", show_default=True)
@click.option("--output", "destination", type=click.Path(path_type=Path), default="run",
              show_default=True, help="Where cells and the report are kept.")
@click.option("--self-test", is_flag=True, help="Show that the statistics hold what they say.")
@common
def bench(
    output: Output, paths: tuple[Path, ...], destination: Path, self_test: bool,
    against: Path | None, max_regression: str, **chosen: Any,
) -> int:
    """Measure artifacts against their source and say which one to deploy."""
    from modelport import pipeline
    from modelport.runtimes import benchmark

    if self_test:
        test = benchmark.self_test()
        output.result(dataclasses.asdict(test), lambda: "\n".join(test.lines()))
        return 0 if test.passed else 1
    if not paths:
        raise click.UsageError("name at least one artifact")
    with output.progress() as notify:
        report = pipeline.bench(paths, destination, _grid(**chosen), notify=notify)
    output.result(
        json.loads((destination / "benchmark.json").read_text(encoding="utf-8")),
        lambda: benchmark.renderable(report),
    )
    if against is not None:
        comparison = pipeline.against(report, against, percent(max_regression))
        output.aside(benchmark.comparison_renderable(comparison))
        if comparison.past_limit:
            return ParityError.exit_code
    report.require_complete()
    return 0


def _grid(
    *, baseline: str | None, baseline_weights: str, device: str, runtime_names: str | None,
    batch_sizes: str, seq_lens: str, threads: str | None, batching: str | None,
    corpus: Path | None, rounds: int, seconds: float, timeout: float,
    memory_limit: float | None, p95: float | None,
) -> Any:
    """What to measure, from the options of ``bench``."""
    import os

    from modelport import pipeline
    from modelport.runtimes import benchmark

    names = {"runtimes": tuple(runtime_names.split(","))} if runtime_names else {}
    weights: Any = baseline_weights
    return pipeline.Grid(
        baseline=pipeline.ModelRequest(baseline, weights=weights) if baseline else None,
        corpus=corpus,
        sweep={
            "devices": (device,),
            "batches": sizes(batch_sizes),
            "sequences": sizes(seq_lens),
            "threads": sizes(threads) or (os.cpu_count() or 1,),
            "batchings": tuple(batching.split(",")) if batching else (),
            "rounds": rounds,
            "sampling": benchmark.Sampling(seconds=seconds),
            "timeout": timeout,
            "memory_limit": int(memory_limit * 1e9) if memory_limit else None,
            "p95_limit": p95 / 1e3 if p95 else None,
        },
        **names,
    )


def percent(text: str) -> float:
    """``5%`` or ``0.05`` as a fraction.

    Raises:
        BadParameter: neither.
    """
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no share, such as 5%") from None


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write Markdown here.")
@common
def report(output: Output, run: Path, html: Path | None, markdown: Path | None) -> None:
    """Show a benchmark run again, or write it as a page."""
    from modelport.runtimes import benchmark

    found = benchmark.load_report(run)
    for destination, view in ((html, benchmark.html), (markdown, benchmark.markdown)):
        if destination is not None:
            destination.write_text(view(found), encoding="utf-8")
    file = run / "benchmark.json" if run.is_dir() else run
    output.result(
        json.loads(file.read_text(encoding="utf-8")),
        lambda: benchmark.renderable(found),
    )


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
