"""Options that several commands take, and values that they read alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..console import Output
from ..errors import BackendUnavailable

Command = TypeVar("Command", bound=Callable[..., Any])
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True
)


def common(command: Command) -> Command:
    """The options every command takes; they arrive as one ``output``."""
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
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from ..pipeline import ModelRequest

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


def source_options(command: Command) -> Command:
    """What is allowed for the sources that a command finds, for as long as it runs."""
    @functools.wraps(command)
    def wrapped(*args: Any, allow_pickle: bool, trust_remote_code: bool, **kwargs: Any) -> Any:
        from ..checkpoints import consent

        with consent.allowing(consent.Consent(allow_pickle, trust_remote_code)):
            return command(*args, **kwargs)

    for decorate in (
        click.option("--trust-remote-code", is_flag=True,
                     help="Run the source's own Python; of a hub model, at a pinned commit."),
        click.option("--allow-pickle", is_flag=True,
                     help="Convert a source that is a pickle, in a process of its own."),
    ):
        wrapped = decorate(wrapped)
    return wrapped  # type: ignore[return-value]


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


def refuse_given(reason: str, *names: str) -> None:
    """Refuse options that were given and that what this command is about to do would pass over.

    Args:
        reason: ``goes with an artifact, not with a pipeline``.
        names: of parameters, as the command's function takes them.

    Raises:
        UsageError: one of them was given; what stands at its default was not.
    """
    context = click.get_current_context()
    default = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP, None)
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in names and context.get_parameter_source(name) not in default:
            raise click.UsageError(f"{parameter.opts[0]} {reason}")


def report_option(name: str, text: str, *packages: str) -> Callable[[Command], Command]:
    """A file to be written at the end, whose directory must be there before any work is done.

    Args:
        packages: what writes it, of the extra ``report``; must be there before any work, too.
    """
    def writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if not path.parent.is_dir():
            raise click.BadParameter(f"{path.parent} is no directory; make it first")
        if absent := [package for package in packages if find_spec(package) is None]:
            raise BackendUnavailable(f"{name} needs {', '.join(absent)}",
                                     hint="pip install 'modelport[report]'")
        return path

    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option(name, type=kind, callback=writable, help=text)


def percent(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
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


def signed_by(command: Command) -> Command:
    """Who must have signed; arrives as one ``signer``: a key file, an identity, or None."""

    @functools.wraps(command)
    def wrapped(
        *args: Any, public_key: Path | None, identity: str | None, issuer: str | None, **kwargs: Any
    ) -> Any:
        return command(*args, signer=_signer(public_key, identity, issuer), **kwargs)

    for decorate in (
        click.option("--issuer", help="Keyless: the OpenID Connect issuer of --identity."),
        click.option("--identity", help="Keyless: who must have signed; with --issuer."),
        click.option("--public-key", type=FILE,
                     help="PEM; refuse what its owner did not sign, before anything is parsed."),
    ):
        wrapped = decorate(wrapped)
    return wrapped  # type: ignore[return-value]


def _signer(public_key: Path | None, identity: str | None, issuer: str | None) -> Any:
    if (identity is None) != (issuer is None) or (public_key and identity):
        raise click.UsageError("give --public-key, or --identity with --issuer")
    if identity is None or issuer is None:
        return public_key
    from ..artifacts.signing import Identity

    return Identity(identity, issuer)
