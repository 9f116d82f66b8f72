"""External data of an ONNX file, checked before anything reads it.

The runtimes and the ``onnx`` package each refuse some of these and accept others (a length past the
end, an unknown key, a hard link), so the check is here and complete.
"""

from __future__ import annotations

import math
import os
import stat
from typing import TYPE_CHECKING, NoReturn

from ..errors import PathEscape, UnsafeError, UsageError
from .digest import kind, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import onnx

MODEL = "model.onnx"
DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8),
    20: ("float8_e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1fn", 4),
    24: ("float8_e8m0fnu", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
    27: ("float6_e2m3fn", 6),
    28: ("float6_e3m2fn", 6),
}
"""``TensorProto.DataType`` → NumPy (or ml_dtypes) name and bits per element; a string has none."""

_KEYS = frozenset({"location", "offset", "length", "checksum"})
_LIMIT = (1 << 31) - 1  # protobuf reads no larger message
_HINT = "do not open this file; export it again or fetch it from a source you trust"


def model_file(root_or_file: Path) -> Path:
    """The ONNX file itself: ``model.onnx`` where a directory is given."""
    return root_or_file / MODEL if root_or_file.is_dir() else root_or_file


def check_external_data(root_or_file: Path) -> None:
    """Refuse an ONNX file whose external data is not exactly where and what it claims.

    Every location must be a plain relative path to a regular file below the model's directory, not
    a link of either kind; offset and length must lie within it; the length must be that of dtype ×
    dims; the keys must be those of the ONNX specification. Tensors of subgraphs, functions and
    attributes are included. No weights are read.

    Raises:
        PathEscape: a location that leaves the directory, is a link, or is no regular file.
        UnsafeError: a key, offset, length or dtype that is wrong.
        UsageError: the file is missing or is not ONNX.
    """
    load_checked(model_file(root_or_file))


def load_checked(file: Path) -> onnx.ModelProto:
    """Parse an ONNX file without its weights and check them as :func:`check_external_data`."""
    proto = _parse(file)
    sizes: dict[str, int] = {}
    for tensor in tensors(proto):
        if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
            _check(tensor, file.parent, sizes)
    return proto


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, attributes, subgraphs, functions, training info."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_nodes(function.node)
        yield from _of_attributes(function.attribute_proto)
    for training in proto.training_info:
        yield from _of_graph(training.initialization)
        yield from _of_graph(training.algorithm)


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph below it, depth first."""
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse = [*attribute.sparse_tensors]
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        for item in sparse:
            yield item.values
            yield item.indices
        if attribute.HasField("g"):
            yield from _of_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _of_graph(graph)


def _parse(file: Path) -> onnx.ModelProto:
    try:
        descriptor = open_regular(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{file} does not exist", hint=f"modelport verify {file.parent}") from None
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        if size > _LIMIT:
            raise UnsafeError(
                f"{file} has {size} bytes", allowed=f"{_LIMIT}; weights go to external data"
            )
        data = stream.read()
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise UsageError(f"{file} is not an ONNX file, or it is truncated", hint=_HINT) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise UsageError(f"{file} is not an ONNX file: it has no graph", hint=_HINT)
    return proto


def _check(tensor: onnx.TensorProto, root: Path, sizes: dict[str, int]) -> None:
    name = tensor.name or "an unnamed tensor"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    unknown = sorted(set(entries) - _KEYS)
    if unknown or len(entries) != len(tensor.external_data) or "location" not in entries:
        keys = ", ".join(entry.key for entry in tensor.external_data)
        _unsafe(f"{name} has external data keys {keys or 'none'}", ", ".join(sorted(_KEYS)))
    if tensor.HasField("raw_data"):
        _unsafe(f"{name} has its data both inside and outside the file", "one of the two")
    dtype, bits = DTYPES.get(tensor.data_type, ("unknown", 0))
    if not bits:
        _unsafe(f"{name} has external data of type {tensor.data_type} ({dtype})", "a fixed size")
    if any(dim < 0 for dim in tensor.dims):
        _unsafe(f"{name} has dimensions {list(tensor.dims)}", "none below 0")
    expected = -(-math.prod(tensor.dims) * bits // 8)
    offset = _natural(name, "offset", entries.get("offset", "0"))
    length = _natural(name, "length", entries.get("length", str(expected)))
    if length != expected:
        _unsafe(f"{name}, {dtype} {list(tensor.dims)}, has length {length}", f"{expected}")
    location = entries["location"]
    if location not in sizes:
        sizes[location] = _size_inside(root, location, name)
    if offset + length > sizes[location]:
        _unsafe(
            f"{name} ends at byte {offset + length} of {location}", f"its {sizes[location]} bytes"
        )


def _natural(name: str, key: str, text: str) -> int:
    # Bounded, as a string of digits may be longer than Python agrees to convert.
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        _unsafe(f"{name} has {key} {text[:40]!r}", "a decimal number of bytes")
    return int(text)


def _size_inside(root: Path, location: str, name: str) -> int:
    """Size of the file at ``location``, which must lie in ``root`` as a file of its own."""
    parts = location.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and not any(
        character in "\\:" or not character.isprintable() for character in location
    )
    if not plain:
        _escape(f"{name} has its data at {location!r}")
    path = root
    for index, part in enumerate(parts):
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            raise UnsafeError(
                f"{name} has its data at {location!r}: {error.strerror}",
                allowed="a file below the model's directory",
                hint=f"modelport verify {root}",
            ) from error
        last = index == len(parts) - 1
        if not (stat.S_ISREG(status.st_mode) if last else stat.S_ISDIR(status.st_mode)):
            _escape(f"{path} is {kind(status.st_mode)}")
    if status.st_nlink != 1:
        _escape(f"{path} is a hard link: {status.st_nlink} names share its data")
    return status.st_size


def _escape(found: str) -> NoReturn:
    raise PathEscape(found, allowed="a regular file below the model's directory", hint=_HINT)


def _unsafe(found: str, allowed: str) -> NoReturn:
    raise UnsafeError(found, allowed=allowed, hint=_HINT)
