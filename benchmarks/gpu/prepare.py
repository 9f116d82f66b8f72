"""Everything that is exported or drawn before it is measured, all at once.

    python prepare.py DEVICE WORK [--small] [--sections grid,sentences,t5,bark]

Leaves, below ``WORK``, artifacts in the folders of their sections, and ``exports.json`` in the
encoder's: for each artifact why it could not be made, or null. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grid
import sentences

EXPORTS = "exports.json"
ENCODER, T5, BARK = "encoder", "t5", "bark"
OF = {"grid": ENCODER, "sentences": ENCODER, "t5": T5, "bark": BARK}


def commands(
    device: str, small: bool, work: Path, wanted: Sequence[str], without: Sequence[str]
) -> dict[str, list[str]]:
    """What to run, by the directory that it makes below ``work`` (Bark's is in the cache)."""
    python = [sys.executable, "-m", "modelport", "export"]
    found = {}
    places = {OF[section] for section in wanted if section in OF}
    plan = grid.planned(device, small)
    model = ["--model", plan.model, "--weights", plan.weights, "--task", plan.task]
    variants = {"grid": plan.names, "sentences": sentences.FORMATS}
    chosen = {name for section in wanted for name in variants.get(section, ())
              if name not in without}  # fmt: skip
    for variant in grid.variants(device):
        if variant.export and variant.name in chosen:
            out = work / ENCODER / variant.artifact
            found[f"{ENCODER}/{variant.artifact}"] = [
                *python, *variant.export, *model, "--output", str(out), "--no-validate", "--json"]
    if T5 in places:
        found[f"{T5}/t5-onnx"] = [*python, "onnx", "--model", "t5-small", "--weights", "random",
                                  "--output", str(work / T5 / "t5-onnx"), "--no-validate", "--json"]
    if BARK in places:
        import generating

        request = generating.bark_request(device, small)
        draw = ("from modelport import pipeline; pipeline.ModelRequest("
                f"{request.model!r}, task={request.task!r}, weights='random').resolve()")
        found[f"{BARK}/weights"] = [sys.executable, "-c", draw]
    return found


def prepare(
    device: str, small: bool, work: Path, wanted: Sequence[str], without: Sequence[str]
) -> dict[str, str | None]:
    """Run what is missing, side by side; why each failed, None where it did not."""
    running = {}
    failed: dict[str, str | None] = {}
    start = time.monotonic()
    for name, command in commands(device, small, work, wanted, without).items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if not (work / name / "manifest.json").exists():
            running[name] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        failed[name] = None
    for name, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            try:
                failed[name] = json.loads(said)["error"]["found"]
            except (ValueError, KeyError):
                failed[name] = f"status {process.returncode}"
        print(f"{name}: {failed[name] or 'ok'}, {time.monotonic() - start:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
    encoder = {name.removeprefix(f"{ENCODER}/"): why for name, why in failed.items()
               if name.startswith(ENCODER)}  # fmt: skip
    if encoder:
        (work / ENCODER / EXPORTS).write_text(json.dumps(encoder), "utf-8")
    return failed


def encoder(
    device: str, small: bool, work: Path, section: str, without: Sequence[str]
) -> dict[str, str | None]:
    """What :func:`prepare` found of the encoder's artifacts, made now unless that was done."""
    path = work / ENCODER / EXPORTS
    if not path.exists():
        prepare(device, small, work, (section,), without)
    found: dict[str, str | None] = json.loads(path.read_text("utf-8"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("work", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sections", default=",".join(OF))
    parser.add_argument("--without", default="")
    arguments = parser.parse_args()
    prepare(arguments.device, arguments.small, arguments.work, arguments.sections.split(","),
            arguments.without.split(";"))
