"""One background pass over the weight files: their digest and their NaNs, for one read."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from .model import TensorRef

_BLOCK = 1 << 18  # stays in the second-level cache between hashing and checking

_EXPONENT = {
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F800000),
    "float64": ("<u8", 0x7FF0000000000000),
}
"""Unsigned type of the same width and its exponent bits (IEEE 754); all set: NaN or infinity."""


class BackgroundScan:
    """Hashes files and counts their non-finite values in a daemon thread.

    hashlib and NumPy release the interpreter lock, so that this overlaps with graph capture; a
    daemon thread, so that an error elsewhere does not wait for it.
    """

    def __init__(self, files: Mapping[str, Path], tensors: Iterable[TensorRef]) -> None:
        self._result: Future[tuple[str, dict[TensorRef, int]]] = Future()
        self._files = dict(files)
        self._tensors = tuple(tensors)
        threading.Thread(target=self._run, name="modelport-scan", daemon=True).start()

    @property
    def digest(self) -> str:
        """Lower-case hex sha256 over the sorted (name, sha256) of the files; waits for it."""
        return self._result.result()[0]

    @property
    def nonfinite(self) -> Mapping[TensorRef, int]:
        """How many NaN and infinite values each broken tensor holds; waits for it."""
        return self._result.result()[1]

    def _run(self) -> None:
        try:
            self._result.set_result(_scan(self._files, self._tensors))
        except OSError as error:
            self._result.set_exception(CheckpointError(
                f"the weights could not be read: {error}",
                hint="check the file, or fetch it again"))
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._result.set_exception(error)


def _scan(
    files: Mapping[str, Path], tensors: Iterable[TensorRef]
) -> tuple[str, dict[TensorRef, int]]:
    by_file: dict[Path, list[TensorRef]] = {}
    for ref in tensors:
        by_file.setdefault(ref.file, []).append(ref)
    total, broken = hashlib.sha256(), {}
    for name, file in sorted(files.items()):
        digest, counts = _scan_file(file, by_file.get(file, []))
        total.update(f"{name}\0{digest}\n".encode())
        broken.update(counts)
    return total.hexdigest(), broken


def _scan_file(file: Path, tensors: list[TensorRef]) -> tuple[str, dict[TensorRef, int]]:
    digest = hashlib.sha256()
    counts: dict[TensorRef, int] = {}
    buffer, scratch = memoryview(bytearray(_BLOCK)), memoryview(bytearray(_BLOCK))
    position, size = 0, file.stat().st_size
    with file.open("rb") as stream:
        for ref, end in _segments(tensors, size):
            while position < end:
                got = stream.readinto(buffer[: min(_BLOCK, end - position)])
                if not got:
                    raise CheckpointError(f"{file} became shorter while it was read",
                                          hint="fetch it again")
                digest.update(buffer[:got])
                if ref is not None:
                    count = _nonfinite(buffer[:got], scratch[:got], ref.dtype)
                    if count:
                        counts[ref] = counts.get(ref, 0) + count
                position += got
    return digest.hexdigest(), counts


def _segments(tensors: list[TensorRef], size: int) -> Iterable[tuple[TensorRef | None, int]]:
    """The file's parts in order, as (tensor or None, end); read_header has ruled out overlaps."""
    for ref in sorted(tensors, key=lambda r: r.offset):
        yield None, ref.offset
        yield (ref if ref.dtype in _EXPONENT else None), ref.offset + ref.nbytes
    yield None, size


def _nonfinite(block: memoryview, scratch: memoryview, dtype: str) -> int:
    import numpy as np

    kind, exponent = _EXPONENT[dtype]
    bits: Any = np.frombuffer(block, dtype=kind)
    masked = np.bitwise_and(bits, bits.dtype.type(exponent), out=np.frombuffer(scratch, kind))
    if int(masked.max()) != exponent:
        return 0
    return int(np.count_nonzero(masked == exponent))
