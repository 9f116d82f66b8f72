"""``modelport verify ARTIFACT``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..console import Output
from ._shared import ARTIFACT, SETTINGS, common, signed_by


@click.command(context_settings=SETTINGS)
@ARTIFACT
@signed_by
@common
def verify(
    output: Output, artifact: Path, signer: Any,
) -> None:
    """Check every file of an artifact against its manifest, and who signed it."""
    from .. import console
    from ..pipeline import publishing

    found = publishing.verify(artifact, signer=signer)
    count = len(found.manifest.files)
    signed = " and signed as asked" if signer else ""
    output.result(
        {"verified": True, "signed": signer is not None, **console.artifact_record(found)},
        lambda: f"{artifact}: {count} files are those the manifest names{signed}",
    )


COMMAND = verify
