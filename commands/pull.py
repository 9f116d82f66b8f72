"""``modelport pull SOURCE DIRECTORY``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..console import Output
from ._shared import SETTINGS, common, signed_by


@click.command(context_settings=SETTINGS)
@click.argument("source")
@click.argument("directory", type=click.Path(path_type=Path))
@signed_by
@click.option("--force", is_flag=True, help="Replace an artifact that is there, atomically.")
@common
def pull(
    output: Output, source: str, directory: Path, signer: Any, force: bool,
) -> None:
    """Fetch a published artifact; every byte is checked before it is placed.

    SOURCE is what publish took, or the same with @sha256:… for one release whatever tags say.
    """
    from .. import console
    from ..pipeline import publishing

    with output.progress() as notify:
        found = publishing.pull(source, directory, signer=signer, force=force, notify=notify)
    if found.release.allowed:
        output.note(f"note: this was published although {', '.join(found.release.allowed)}")
    output.result(
        {"digest": found.digest, "signed": signer is not None,
         "allowed": list(found.release.allowed), **console.artifact_record(found.artifact)},
        lambda: f"{directory} is {found.digest} ({len(found.release.files)} files verified)",
    )


COMMAND = pull
