"""A process that validates artifacts, started while the first of them is still being made.

Validation has a process of its own, so that neither side's memory adds to the other's. Importing
torch and transformers takes longer there than a small model's whole export: it goes on beside it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from .. import artifacts, errors
from ..artifacts import manifest as manifest_format
from ..checkpoints import consent, lean
from ..checkpoints.model import IN_MEMORY, Source
from ..checkpoints.tasks import TASKS
from ..errors import ModelportError
from .request import ModelRequest

if TYPE_CHECKING:
    from types import TracebackType

    from ..checkpoints import Checkpoint
    from .request import Notify

_COMMAND = "from modelport.pipeline import validator; validator.serve()"
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
"""Keeps idle threads of torch from spinning beside those of the runtime: now and then one waited
0.1 s for the core that another one held."""
SMALL = 64 << 20
"""Bytes of weights up to which the original is run before there is anything to compare with it:
more is memory that the export may want itself."""


class Validator:
    """One artifact after the other, in one process that starts on first need, or ahead of it.

    Args:
        notify: told what the process is at.
    """

    def __init__(self, notify: Notify = lambda _: None) -> None:
        self._notify = notify
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, model: str) -> None:
        """Let it import from now on what it needs for artifacts of a model."""
        if self._process is None and not model.startswith(IN_MEMORY):
            self._process = subprocess.Popen([sys.executable, "-c", _COMMAND], text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             env={**PASSIVE, **os.environ})

    def prepare(self, checkpoint: Checkpoint, format: str, device: str) -> None:  # noqa: A002
        """Let it run a small original ahead, and import what runs artifacts of the format.

        Args:
            device: that the artifact is for; only on a CPU is the original run ahead, and only if
                its runs are stored.
        """
        if self._process is None:
            return
        size = sum(ref.nbytes for ref in checkpoint.tensors.values())
        ahead = size <= SMALL and not checkpoint.own_code and device == "cpu"
        origin = dataclasses.asdict(checkpoint.origin) if ahead else None
        task = TASKS.get(checkpoint.task)  # a module of the user's own has none
        with suppress(ModelportError):  # it has ended; the first validation starts another
            self._send({"format": format, "origin": origin,
                        "generates": bool(task and task.parts)})

    def validate(self, root: Path, max_seconds: float | None = None) -> artifacts.Manifest:
        """Validate an artifact and record the verdict in it.

        Args:
            max_seconds: for the cases of all graphs, those that coverage rests on first; one of
                each is always run.

        Raises:
            ModelportError: what validation raised there; or the process ended.
        """
        manifest = artifacts.read(root).manifest
        self.start(manifest.source.model)
        if self._process is None:  # another process has no such module
            _validate(root, "cpu", max_seconds, self._notify, isolated=False)
            return artifacts.read(root).manifest
        self._send({"validate": str(root), "max_seconds": max_seconds,
                    "device": manifest.target.get("device", "cpu")})
        importlib.import_module(f"{__package__}.validating")  # the caller's next, while it waits
        manifest_format.prepare()
        while "notify" in (answer := self._answer()):
            self._notify(answer["notify"])
        if "error" in answer:
            error = errors.from_record(answer["error"])
            error.add_note(answer["trace"])
            raise error
        return artifacts.read(root).manifest

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            with suppress(BrokenPipeError), process:  # closes the pipes, with what nobody read
                pass
            process.wait()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        allowed = dataclasses.asdict(consent.given())
        try:
            self._process.stdin.write(json.dumps({**request, "consent": allowed}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except ValueError as error:  # nothing, or a part of a line
            raise self._ended() from error
        return answer

    def _ended(self) -> ModelportError:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        return ModelportError(f"the validating process ended with status {status}")


def serve() -> None:
    """What that process does: import, then answer requests until nobody can send any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    lean.own_process()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor a request for what is typed: nobody is there
    with suppress(ImportError, errors.BackendUnavailable):  # told when it is needed
        lean.preload()
    from ..validate import isolate

    with isolate.kept():
        for line in requests:
            request = json.loads(line)
            with consent.allowing(consent.Consent(**request["consent"])):
                if "validate" in request:
                    _answered(answers, request)
                else:
                    _prepared(request)
    os._exit(0)


def _prepared(request: dict[str, Any]) -> None:
    """Start and run what validation needs first; what fails fails again, and is told, then."""
    from ..validate import isolate
    from . import opening, validating

    with suppress(Exception):
        isolate.start(partial(opening.warm, request["format"], generates=request["generates"]))
        if request["origin"]:
            validating.run_ahead(ModelRequest.of(Source(**request["origin"])).resolve())
        manifest_format.prepare()


def _answered(answers: IO[str], request: dict[str, Any]) -> None:
    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        _validate(Path(request["validate"]), request["device"], request["max_seconds"],
                  lambda text: say({"notify": text}), isolated=True)
    except Exception as error:  # noqa: BLE001 - the parent's to report
        known = error if isinstance(error, ModelportError) else errors.unexpected(error)
        say({"error": known.record(), "trace": traceback.format_exc()})
    else:
        say({"done": True})


def _validate(
    root: Path, device: str, max_seconds: float | None, notify: Notify, *, isolated: bool
) -> None:
    from .validating import Limits, validate_artifact

    limits = Limits(max_seconds=max_seconds, isolated=isolated)
    validate_artifact(root, device=device, limits=limits, notify=notify)
