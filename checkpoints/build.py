"""Checkpoints that have to be made first: drawn from a seed, or converted in a process of its own.

What is made lies in a cache directory under a key of everything that went into it, and appears
there by one rename: another process sees all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.archives import check_archive
from ..errors import CheckpointError, StorageError
from .files import CONFIG, companions, digest
from .tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import Source

_CACHE = "MODELPORT_CACHE"

ATTENTION = 1.0
"""Size of what attention's projections return, in units of what they are given, where inputs are
heard through attention alone. Of eight prompts to bark-small's architecture as the library draws it
(0.55), two sound exactly alike; with 1 the nearest two of four differ by 5 %, with 2 by 16 %. Its
export passes with 1, ρ at most 1.4; with 2 one case of 101 had ρ 2.4, of which no more is known."""


def cache_root() -> Path:
    """``$MODELPORT_CACHE``, or ``~/.cache/modelport``."""
    return Path(os.environ.get(_CACHE) or Path.home() / ".cache" / "modelport").absolute()


def random_weights(
    root: Path, config: Mapping[str, Any], class_name: str, task: str, seed: int
) -> Path:
    """A directory with the architecture's weights drawn from a seed; made unless it is cached.

    What else ``root`` holds lies beside them. The key holds the versions too: another torch may
    draw other numbers. Where the task says so (:attr:`~.tasks.Task.heard`), attention is drawn to
    tell inputs apart.

    Raises:
        CheckpointError: transformers could not build it.
        StorageError: no space for it.
    """
    attention = ATTENTION if TASKS[task].heard else None
    beside = {name: file for name, file in companions(root).items() if name != CONFIG}
    material = [config, class_name, task, seed, version("torch"), version("transformers")]
    if attention is not None:
        material.append(attention)
    if beside:
        material.append(_digests(beside))
    text = json.dumps(config, indent=2, sort_keys=True)
    arguments = {"class_name": class_name, "seed": seed, "attention": attention}
    return _made("random", material, "random", arguments, given={CONFIG: text}, beside=beside)


def from_pickle(root: Path) -> Path:
    """A directory with the tensors of a pickle checkpoint as safetensors, and what else it holds.

    Raises:
        UnsafeError: a file is a zip archive that torch would not have written.
    """
    for path in root.iterdir():
        if path.is_file() and zipfile.is_zipfile(path):  # before torch 1.6 they were bare pickles
            check_archive(path.resolve())
    pickles = sorted(root.glob("pytorch_model*.bin"))
    beside = companions(root)
    material = [_digests(beside), *((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns)
                                    for p in pickles)]
    return _made("unpickled", material, "unpickle", {"root": str(root.absolute())}, beside=beside)


def converted(
    root: Path, source: Source, class_name: str, dtype: str, init: Mapping[str, Any]
) -> Path:
    """A directory with the weights under the names of the module transformers builds from them.

    What the checkpoint lacks is absent there, too.

    Raises:
        CheckpointError: transformers could not build it, or what it built is not finite.
    """
    # What is computed from the weights, and how, the config says, or the checkpoint's own Python.
    read = {name: file for name, file in companions(root).items()
            if name == CONFIG or (source.remote_code and name.endswith(".py"))}
    material = [source.digest, class_name, dtype, dict(init), version("transformers"),
                _digests(read)]
    arguments = {"root": str(root.absolute()), "class_name": class_name, "dtype": dtype,
                 "init": dict(init), "task": source.task, "remote_code": source.remote_code}
    return _made("converted", material, "convert", arguments)


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: digest(file) for name, file in files.items()}


def _made(
    kind: str, material: Any, command: str, arguments: Mapping[str, Any],
    given: Mapping[str, str] | None = None, beside: Mapping[str, Path] | None = None,
) -> Path:
    from filelock import FileLock

    key = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:32]
    target = cache_root() / kind / key
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_dir():
                return target
            work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=target.parent))
            try:
                for name, text in (given or {}).items():
                    (work / name).write_text(text)
                run(command, {"root": str(work), **arguments, "out": str(work)})
                for name, file in (beside or {}).items():
                    if not (work / name).exists():
                        (work / name).parent.mkdir(exist_ok=True)
                        shutil.copyfile(file, work / name)
                work.chmod(0o755)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{target.parent} can't hold the weights: {error}",
                           allowed="a directory with space for them",
                           hint=f"{_CACHE}=DIR on another disk") from error
    return target


def run(command: str, arguments: Mapping[str, Any]) -> None:
    """Run a command of :mod:`~.worker` in a child process.

    Raises:
        CheckpointError: it failed; carries the last line of what it said.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.worker", command],
        input=json.dumps(arguments), text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else "no message"
        raise CheckpointError(
            f"the checkpoint could not be built ({command}): {said}",
            allowed="a config and weights that the installed transformers can load",
            hint="modelport doctor shows the versions in use")
