"""A session in a process of its own, for runtimes that can abort instead of raising."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from ..errors import ModelportError, UsageError
from ..session import Placement, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

    import numpy as np

    from ..spec import ModelSpec

OPEN_SECONDS = 300.0
"""Time for a child to start, import its runtime and open the model."""


class ProcessDied(ModelportError):
    """The process that ran the model ended without an answer, or was ended for taking too long."""

    exit_code = 3


class IsolatedSession(Session):
    """Runs a session in a child process; a crash or a hang costs one run, not the validation.

    After either, the next run starts a new child. Arrays travel through a pipe, pickled by and for
    this program alone.

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
        """Where the child's session runs.

        Raises:
            ProcessDied: the child could not start.
        """
        found = self._answer("placement", None, OPEN_SECONDS)
        assert isinstance(found, Placement)
        return found

    def close(self) -> None:
        """End the child; it gets a moment to close its session."""
        super().close()
        if self._child is not None:
            self._child.stop()
            self._child = None

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._child is None:
            self.placement()  # the model opens here, so that its time is not the run's
        return dict(self._answer("run", dict(feeds), self._seconds))

    def _answer(self, request: str, content: object, seconds: float) -> Any:
        if self._child is None:
            self._child = _Child(self._opener)
        try:
            kind, answer = self._child.ask(request, content, seconds)
        except ProcessDied:
            self._child.kill()
            self._child = None
            raise
        if kind == "error":
            raise answer
        return answer


class _Child:
    def __init__(self, opener: Callable[[], Session]) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy locks of runtime threads
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, opener), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: str, content: object, seconds: float) -> tuple[str, Any]:
        try:
            self._pipe.send((request, content))
            if not self._pipe.poll(seconds):
                raise ProcessDied(f"no result within {seconds:g} s; the process was ended")
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=10)
            raise ProcessDied(f"the model's process ended: {self._ending()}") from error
        return str(kind), answer

    def stop(self) -> None:
        try:
            self._pipe.send(("stop", None))
            self._process.join(timeout=10)
        except OSError:
            pass
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


def _serve(pipe: Connection, opener: Callable[[], Session]) -> None:
    """The child's loop; errors are sent back, and only plain ones survive the way."""
    session: Session | None = None
    while True:
        request, content = pipe.recv()
        if request == "stop":
            break
        try:
            session = session or opener()
            answer = session.placement() if request == "placement" else session.run(content)
            pipe.send(("answer", answer))
        except Exception as error:  # noqa: BLE001 - it is the finding, raised in the parent
            pipe.send(("error", UsageError(f"{type(error).__name__}: {error}")))
    if session is not None:
        session.close()
