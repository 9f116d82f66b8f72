"""``modelport doctor``."""

from __future__ import annotations

import click

from ..console import Output
from ._shared import SETTINGS, common


@click.command(context_settings=SETTINGS)
@common
def doctor(output: Output) -> None:
    """Show versions, providers and devices, and name what is missing or known to fail."""
    from .. import doctor as examination

    with output.progress() as notify:
        findings = examination.examine(notify)
    output.result(examination.record(findings), lambda: examination.view(findings))


COMMAND = doctor
