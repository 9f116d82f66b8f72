"""The command line: find the command, run it, turn what it raises into a message and an exit code.

Commands are the files of ``commands/``, found by name; the formats below ``export`` are those of
``exporters/``. None is imported before it is asked for.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import click
from modelport import __version__, commands, plugins
from modelport.checkpoints import lean
from modelport.console import Output
from modelport.errors import ModelportError, UsageError, unexpected

if TYPE_CHECKING:
    from types import FrameType


class Commands(click.Group):
    """One command for each file in ``commands/``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(plugins.names(commands))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in plugins.names(commands):
            return None
        return cast("click.Command", plugins.load(commands, cmd_name, "COMMAND"))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="modelport")
def cli() -> None:
    """Turn transformers checkpoints into artifacts that are proven equal to them.

    Exit codes: 0 ok, 1 unexpected, no way to export this model, or a failed --self-test, 2 usage, 3
    parity failed, a file that is not what was asked for, a gate of publish, or a benchmark past
    --max-regression, 4 refused for safety, 5 sweep incomplete, 6 something needed is absent, 130
    interrupted, 143 terminated.
    """


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
        if "--json" in (sys.argv[1:] if arguments is None else arguments):
            output.as_json, output.quiet = True, True  # click itself tells it to people
            output.error(UsageError(error.format_message()))
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; nothing is half written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback without -v
        if output.verbose:
            traceback.print_exc()
        output.error(unexpected(error))
        return 1


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """Entry point of the ``modelport`` program."""
    lean.own_process()
    code = execute()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)  # to take down a million objects one by one takes part of a second


if __name__ == "__main__":
    main()
