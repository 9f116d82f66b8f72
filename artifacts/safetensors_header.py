"""The header of a safetensors file, checked to the last byte before anything relies on it."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..checkpoints.model import TensorRef
from ..errors import CheckpointError, PickleRefused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_HEADER = 100_000_000
"""Bytes; the bound of the reference implementation."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "C64": ("complex64", 64),
    "F32": ("float32", 32),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "I8": ("int8", 8),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn", 4),
}
"""safetensors dtype → NumPy (or ml_dtypes) name and bits per element."""

_AGAIN = "fetch the checkpoint again; `--revision` picks another version of it"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class _Header:
    size: int
    start: int
    table: dict[str, Any]


def read_header(file: Path) -> dict[str, TensorRef]:
    """Where each tensor of a safetensors file lies, in the order of the file's data.

    Only the header is read. The data section must be covered exactly, without gap or overlap, and
    end with the file.

    Raises:
        CheckpointError: not safetensors, truncated or corrupt; names the file and what is wrong.
        PickleRefused: a pickle or a zip archive under this name.
    """
    header = _load(file)
    refs: list[tuple[int, int, str, TensorRef]] = []
    for name, entry in header.table.items():
        if name != "__metadata__":
            begin, end, ref = _tensor(file, header.start, name, entry)
            refs.append((begin, end, name, ref))
    refs.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, name, _ in refs:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap"
            _corrupt(file, f"{name} starts at {begin}, which {problem}, ending at {position}")
        position = end
    data = header.size - header.start
    if data < position:
        _corrupt(file, f"it is truncated: {data} bytes of data where the header names {position}")
    if data > position:
        _corrupt(file, f"{data - position} bytes follow the last tensor")
    return {name: ref for _, _, name, ref in refs}


def read_metadata(file: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file; empty where there is none.

    Raises:
        CheckpointError, PickleRefused: as :func:`read_header`.
    """
    return dict(_load(file).table.get("__metadata__", {}))


def _load(file: Path) -> _Header:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}", hint=_AGAIN) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        _corrupt(file, "it is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        head = stream.read(len(_LFS))
        length = _header_length(file, head, status.st_size)
        stream.seek(8)
        raw = stream.read(length)
    if len(raw) != length:
        _corrupt(file, "it is truncated inside its header")
    table = _parse(file, raw)
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _corrupt(file, "__metadata__ is not a map of strings")
    return _Header(status.st_size, 8 + length, table)


def _header_length(file: Path, head: bytes, size: int) -> int:
    if head[8:9] != b"{":
        _name_other_format(file, head)
    if size < 8:
        _corrupt(file, f"it is truncated: {size} bytes")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        _corrupt(file, f"its header claims {length} bytes, more than {MAX_HEADER}")
    if 8 + length > size:
        _corrupt(file, f"it is truncated: a header of {length} bytes in a file of {size}")
    if head[8:9] != b"{":
        _corrupt(file, "its header does not start with '{'")
    return length


def _name_other_format(file: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        what = "a zip archive" if head.startswith(b"PK") else "a pickle"
        raise PickleRefused(
            f"{file} is {what}, not safetensors: reading it can run code",
            allowed="safetensors",
            hint="use a revision with safetensors, or --allow-pickle if you trust its author",
        )
    if head.startswith(_LFS):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights", hint="run `git lfs pull` beside it"
        )


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            _corrupt(file, "its header has a key twice")
        return found

    def constant(text: str) -> NoReturn:
        _corrupt(file, f"its header holds {text}")

    try:
        table = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError):
        _corrupt(file, "its header is not JSON")
    if not isinstance(table, dict):
        _corrupt(file, "its header is not a JSON object")
    return table


def _tensor(file: Path, start: int, name: str, entry: Any) -> tuple[int, int, TensorRef]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has dtype {dtype!r}", allowed=", ".join(DTYPES), hint=_AGAIN
        )
    if not _naturals(shape):
        _corrupt(file, f"{name} has shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _corrupt(file, f"{name} has data_offsets {offsets!r}")
    begin, end = offsets
    numpy_name, bits = DTYPES[dtype]
    if math.prod(shape) * bits != (end - begin) * 8:
        _corrupt(file, f"{name}, {dtype} {shape}, spans {end - begin} bytes")
    return begin, end, TensorRef(file, start + begin, end - begin, numpy_name, tuple(shape))


def _naturals(value: Any) -> bool:
    # Bounded so that a product of hostile sizes stays a cheap integer.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _corrupt(file: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{file} is damaged: {problem}", hint=_AGAIN)
