"""``modelport publish ARTIFACT DESTINATION``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..console import Output
from ._shared import ARTIFACT, FILE, SETTINGS, common, percent


@click.command(context_settings=SETTINGS)
@ARTIFACT
@click.argument("destination")
@click.option("--private-key", type=FILE,
              help="PEM; sign the artifact first. Its password: MODELPORT_KEY_PASSWORD.")
@click.option("--keyless", is_flag=True, help="Sign with the identity of this CI job.")
@click.option("--require", "required", type=click.Choice(["benchmark"]), multiple=True,
              help="Refuse without a valid benchmark of exactly these files.")
@click.option("--max-regression", callback=percent, metavar="5%",
              help="Refuse what is slower by more than this than --against.")
@click.option("--against", metavar="DEST:previous",
              help="The release to compare speed with; on the hub hf://owner/name:previous, "
              "whatever the branch.")
@click.option("--allow-unproven", is_flag=True, help="Publish without passing parity; recorded.")
@click.option("--allow-random-weights", is_flag=True, help="Publish random weights; recorded.")
@click.option("--allow-pickle-source", is_flag=True,
              help="Publish what came out of a pickle; recorded.")
@click.option("--allow-remote-code", is_flag=True,
              help="Publish what ran the checkpoint's own Python; recorded.")
@click.option("--expect", "expected", metavar="sha256:…|COMMIT|none",
              help="Move the tag only if it points at this release; on the hub, the branch only if "
              "it is at this commit.")
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
    from ..pipeline import publishing

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


COMMAND = publish
