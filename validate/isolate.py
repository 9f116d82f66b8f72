"""A session in a process of its own, for runtimes that can abort instead of raising."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints import lean
from ..errors import ModelportError, UsageError
from ..session import Placement, Session
from .suppliers import CaseTimeout, checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection

    from ..spec import ModelSpec

OPEN_SECONDS = 300.0
"""Time for a child to start, import its runtime and open the model."""


_SPARE: list[_Child] = []
"""Children without a session, for the next ones."""

_keepers = 0


@contextmanager
def kept() -> Iterator[None]:
    """Inside, a child whose session is closed waits for another one."""
    global _keepers
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        while _SPARE and not _keepers:
            _SPARE.pop().kill()


def start(warm: Callable[[], None]) -> None:
    """Start a child ahead of its session, to be called inside :func:`kept`.

    Args:
        warm: called in the child; importable by name, or a ``functools.partial`` of such a
            function. What it raises is dropped: it is raised again when a session is opened.
    """
    _SPARE.append(_Child(warm))


class ProcessDied(ModelportError):
    """The process that ran the model ended without an answer."""

    exit_code = 3


class IsolatedSession(Session):
    """Runs a session in a child process; a crash or a hang costs one run, not the validation.

    After either, the next run starts a new child. Arrays travel through a pipe as they lie in
    memory; the rest is pickled by and for this program alone.

    Args:
        spec: the contract that feeds are checked against, here and in the child.
        opener: opens the session in the child; importable by name, or a ``functools.partial`` of
            such a function.
        seconds: after this long without an answer the child is killed.
    """

    runtime = "isolated"

    def __init__(
        self, spec: ModelSpec, opener: Callable[[], Session], seconds: float = 120.0
    ) -> None:
        super().__init__(spec)
        self._opener = opener
        self._seconds = seconds
        self._child: _Child | None = None

    def placement(self) -> Placement:
        """Where the child's session runs; :attr:`runtime` is its runtime from then on.

        Raises:
            ProcessDied, CaseTimeout: the child could not start.
        """
        self.runtime, found = self._answer("open", self._opener, OPEN_SECONDS)
        assert isinstance(found, Placement)
        return found

    def close(self) -> None:
        """Close the child's session, and end the child unless it is :func:`kept`."""
        super().close()
        if self._child is not None:
            self._child.leave()
            self._child = None

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._child is None:
            self.placement()  # the model opens here, so that its time is not the run's
        return dict(self._answer("run", dict(feeds), self._seconds))

    def _answer(self, request: str, content: object, seconds: float) -> Any:
        if self._child is None:
            self._child = _SPARE.pop() if _SPARE else _Child()
        try:
            kind, answer = self._child.ask(request, content, seconds)
        except (ProcessDied, CaseTimeout):
            self._child.kill()
            self._child = None
            raise
        if kind == "error":
            if request == "open":
                self._child.leave()
                self._child = None
            found, allowed, hint = answer
            raise UsageError(found, allowed=allowed, hint=hint)
        return answer


class _Child:
    def __init__(self, warm: Callable[[], None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy locks of runtime threads
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, warm), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: str, content: object, seconds: float) -> tuple[str, Any]:
        try:
            _send(self._pipe, request, content)
            if not self._pipe.poll(seconds):
                raise CaseTimeout(f"no result within {seconds:g} s; the process was ended")
            return _receive(self._pipe)
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ProcessDied(f"the model's process ended: {self._ending()}") from error

    def leave(self) -> None:
        """Close its session, for which it has a moment."""
        closed = False
        with suppress(ProcessDied, CaseTimeout):
            closed = self.ask("close", None, 10)[0] == "answer"
        if closed and _keepers:
            _SPARE.append(self)
        else:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _ending(self) -> str:
        code = self._process.exitcode
        if code is None:
            return "it closed its pipe"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _send(pipe: Connection, kind: str, content: object) -> None:
    """Send a message; the arrays of a mapping follow it without a copy."""
    if not isinstance(content, dict):
        pipe.send((kind, content, None))
        return
    arrays = {name: np.ascontiguousarray(value) for name, value in content.items()}
    if strange := [name for name, value in arrays.items() if value.dtype.hasobject]:
        raise UsageError(f"{strange[0]} is no array of numbers")
    pipe.send((kind, None, [(n, content[n].dtype, content[n].shape) for n in arrays]))
    for value in arrays.values():
        if value.size:
            pipe.send_bytes(value.reshape(-1).view(np.uint8).data)


def _receive(pipe: Connection) -> tuple[str, Any]:
    kind, content, arrays = pipe.recv()
    if arrays is None:
        return str(kind), content
    found = {}
    for name, dtype, shape in arrays:
        found[name] = np.empty(shape, dtype)
        if found[name].size:
            pipe.recv_bytes_into(found[name].reshape(-1).view(np.uint8).data)
    return str(kind), found


def _serve(pipe: Connection, warm: Callable[[], None] | None) -> None:
    """The child's loop; errors are sent back as text, since not all of them survive the way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    lean.own_process()
    if warm is not None:
        with suppress(Exception):  # raised again when the session is opened
            warm()
    session: Session | None = None
    while (message := _next(pipe)) is not None:
        request, content = message
        try:
            if request == "open":
                session = session or content()
                _send(pipe, "answer", (session.runtime, session.placement()))
            elif request == "close":
                closing, session = session, None
                if closing is not None:
                    closing.close()
                _send(pipe, "answer", None)
            else:
                assert session is not None
                _send(pipe, "answer", checked(session.run(content)))
        except ModelportError as error:
            _send(pipe, "error", (error.found, error.allowed, error.hint))
        except Exception as error:  # noqa: BLE001 - it is the finding, raised in the parent
            _send(pipe, "error", (f"{type(error).__name__}: {error}", "", ""))


def _next(pipe: Connection) -> tuple[str, Any] | None:
    """The next request; None when there are to be no more."""
    try:
        return _receive(pipe)
    except EOFError:
        return None


def _end_with_the_parent() -> None:
    """A run that hangs would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
