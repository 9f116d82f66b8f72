"""Where outputs come from: a session that is given or opened on first need, or a stored run."""

from __future__ import annotations

import hashlib
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ModelportError, UsageError
from ..session import Session
from .npz import read_arrays, write_arrays

if TYPE_CHECKING:
    from .inputs import Feeds

SessionSource = Session | Callable[[], Session]
"""An open session, which stays the caller's to close; or a function that opens one, called at most
once while it works and closed by the judge."""

Outputs = dict[str, np.ndarray]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """Stored outputs of reference runs, keyed by weights, inputs and precision.

    Attributes:
        directory: created when needed; files may be deleted at any time.
        source: digest that says which weights and which code ran (``Source.digest`` and task).
        truth, reference: dtypes the two run in.
        max_bytes: beyond this, the runs that were asked for least recently make room for new ones.
            What this cache itself has stored or been asked for stays.
    """

    directory: Path
    source: str
    truth: str = "float64"
    reference: str = "float32"
    max_bytes: int = 4 << 30
    _mine: dict[Path, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _total: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def path(self, role: str, inputs: str) -> Path:
        """File of one run; ``role`` is ``truth`` or ``reference``, ``inputs`` a feeds digest."""
        dtype = self.truth if role == "truth" else self.reference
        key = hashlib.sha256(f"{self.source}\0{role}\0{dtype}\0{inputs}".encode()).hexdigest()
        return self.directory / f"{key}.npz"

    def holds(self, role: str, inputs: str) -> bool:
        """Whether a run is stored; it stays from now on."""
        path = self.path(role, inputs)
        try:
            self._mine[path] = path.stat().st_size
        except OSError:
            return False
        with suppress(OSError):  # another user's
            os.utime(path)  # among the last to make room from now on
        return True

    def load(self, role: str, inputs: str) -> Outputs | None:
        """Stored outputs; None where there are none or the file is damaged."""
        self.holds(role, inputs)
        try:
            return read_arrays(self.path(role, inputs))
        except (OSError, ValueError):
            return None

    def room(self, need: int) -> bool:
        """Whether so many bytes more can be stored beside what has to stay."""
        return sum(self._mine.values()) + need <= self.max_bytes

    def save(self, role: str, inputs: str, outputs: Mapping[str, np.ndarray]) -> bool:
        """Store outputs; False if there is no room. A reader never sees half a file."""
        need = sum(value.nbytes for value in outputs.values())
        if not self.room(need):
            return False
        path = self.path(role, inputs)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._total or self._total[0] + need > self.max_bytes:
            self._total[:] = [self._freed(need)]
        handle, name = tempfile.mkstemp(dir=self.directory, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                write_arrays(file, outputs)
            written = Path(name).stat().st_size
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._mine[path] = written
        self._total[0] += written
        return True

    def _freed(self, need: int) -> int:
        """Bytes stored, after what is oldest was removed as far as ``need`` takes it.

        Another process may do the same, or want what is removed: it runs that again.
        """
        found: list[tuple[float, int, Path]] = []
        for path in self.directory.glob("*.npz"):
            with suppress(OSError):
                known = path.stat()
                found.append((known.st_mtime, known.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + need <= self.max_bytes:
                break
            if path not in self._mine:
                path.unlink(missing_ok=True)
                total -= size
        return total


class Supplier:
    """Outputs of truth or reference: stored ones first, then the session, opened on first need."""

    def __init__(self, source: SessionSource, role: str, cache: ReferenceCache | None) -> None:
        self.role = role
        self.lazy = not isinstance(source, Session)
        self.described = ""
        self._cache = cache
        self._source = source
        self._session: Session | None = None

    def stored(self, inputs: str) -> bool:
        """Whether these inputs need no session."""
        return self._cache is not None and self._cache.holds(self.role, inputs)

    def room(self, need: int) -> bool:
        """Whether so many bytes more may be stored."""
        return self._cache is None or self._cache.room(need)

    def outputs(self, feeds: Feeds, inputs: str) -> Outputs:
        """Run, or read a stored run; stores what it ran where there is a cache with room."""
        found = self._cache.load(self.role, inputs) if self._cache else None
        if found is not None:
            self.described = self.described or "stored runs"
            return found
        found = self.session().run(feeds)
        if self._cache:
            self._cache.save(self.role, inputs, found)
        return found

    def session(self) -> Session:
        """The session, opened if need be."""
        if self._session is None:
            self._session = self._source if isinstance(self._source, Session) else self._source()
            self.described = describe(self._session)
        return self._session

    def close(self) -> None:
        """Close the session if it was opened here; a later run opens it again."""
        if self.lazy and self._session is not None:
            self._session.close()
            self._session = None


class CaseTimeout(ModelportError):
    """A model did not return within the time one case may take."""

    exit_code = 3


class Candidate:
    """Runs the candidate so that one case that raises or never returns does not stop the rest.

    A run that exceeds its time is abandoned together with its thread and session, since threads
    cannot be killed; a source that opens sessions gets a new one. The shape it hung in is not
    tried again, and after ``attempts`` of them nothing is.
    """

    def __init__(self, source: SessionSource, seconds: float, attempts: int = 3) -> None:
        self.described = ""
        self._source = source
        self._seconds = seconds
        self._attempts = attempts
        self._worker: _Worker | None = None
        self._stuck = ""
        self._hung: set[Shapes] = set()

    def prepare(self) -> None:
        """Open the session now, so that its time is no case's; failing shows in the cases."""
        if self._worker is None:
            self._worker = _Worker(self._source)
        self._worker.prepare(self._seconds)
        if self._worker.lost:
            self._worker = None

    def outputs(self, feeds: Feeds, label: str) -> Outputs:
        """Run one case.

        Raises:
            CaseTimeout: it took too long, or an earlier case of this shape did, or too many did.
            Exception: whatever the session raised.
        """
        shapes = tuple((name, value.shape) for name, value in sorted(feeds.items()))
        if self._stuck:
            raise CaseTimeout(f"not run: the session never returned from {self._stuck}")
        if shapes in self._hung:
            raise CaseTimeout("not run: an earlier case of this shape gave no result")
        if self._worker is None:
            self._worker = _Worker(self._source)
        try:
            result = self._worker.call(feeds, self._seconds)
        except CaseTimeout:
            self._hung.add(shapes)
            self._attempts -= 1
            lost = self._worker.lost
            if self._attempts <= 0 or (lost and isinstance(self._source, Session)):
                self._stuck = label
            if lost:
                self._worker = None
            raise
        self.described = self._worker.described
        return result

    def close(self) -> None:
        """End the worker thread, and the session if it was opened here."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """One daemon thread that opens a session and runs what it is sent, in order.

    Attributes:
        lost: it did not answer in time, and will be busy for good.
    """

    def __init__(self, source: SessionSource) -> None:
        self.described = ""
        self.lost = False
        self._source = source
        self._session: Session | None = None
        self._inbox: queue.SimpleQueue[Callable[[], Outputs] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Outputs | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="candidate", daemon=True)
        self._thread.start()

    def prepare(self, seconds: float) -> None:
        """Open the session; whatever that raises is raised again by the first call."""
        with suppress(Exception):
            self._ask(self._opened, seconds)

    def call(self, feeds: Feeds, seconds: float) -> Outputs:
        return self._ask(lambda: checked(self._open().run(feeds)), seconds)

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=10)

    def _ask(self, what: Callable[[], Outputs], seconds: float) -> Outputs:
        self._inbox.put(what)
        try:
            answer = self._outbox.get(timeout=seconds)
        except queue.Empty:
            self.lost = True
            raise CaseTimeout(f"no result within {seconds:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _opened(self) -> Outputs:
        self._open()
        return {}

    def _open(self) -> Session:
        if self._session is None:
            made = self._source if isinstance(self._source, Session) else self._source()
            self.described = describe(made)
            self._session = made
        return self._session

    def _serve(self) -> None:
        while (what := self._inbox.get()) is not None:
            try:
                self._outbox.put(what())
            except Exception as error:  # noqa: BLE001 - it is the finding, handed to the judge
                self._outbox.put(error)
        if self._session is not None and self._session is not self._source:
            self._session.close()


def describe(session: Session) -> str:
    """Runtime, device and providers of a session as one line of text."""
    placement = session.placement()
    runtime = getattr(session, "runtime", type(session).__name__)
    return " ".join([runtime, placement.device, *placement.providers])


def checked(outputs: object) -> Outputs:
    """What a session returned, as arrays by name."""
    if not isinstance(outputs, Mapping):
        raise UsageError(f"a session returned {type(outputs).__name__}",
                         allowed="a mapping of output names to arrays")
    return {str(name): np.asarray(value) for name, value in outputs.items()}
