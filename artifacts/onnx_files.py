"""ONNX on disk: a small graph file, and its weights in safetensors files that it points into.

Initializers are onnx-ir tensors that stay where they are until written: a reference to bytes in a
file (``ir.ExternalTensor``), a conversion (:func:`tensor`), or anything else onnx-ir knows.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.model import TensorRef
from ..errors import CheckpointError, ExportError, PickleRefused
from ..spec import TensorSpec
from .onnx_external import (
    DTYPES,
    MODEL,
    check_external_data,
    graphs,
    load_checked,
    model_file,
    tensors,
)
from .storage import refusals
from .weights import DTYPES as STORED
from .weights import WriteTensor, copy_file, read_header, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import onnx
    import onnx_ir as ir

__all__ = [
    "MODEL",
    "OnnxDescription",
    "check_external_data",
    "describe",
    "load",
    "save",
    "save_all",
    "tensor",
]

WEIGHTS = "model.safetensors"
_EXTERNAL = 1 << 10  # bytes; smaller tensors stay in the graph, where shape inference reads them
_INLINE_REST = 1 << 20  # bytes; not worth a file of their own beside a checkpoint copied whole
_USED = 0.9  # share of a file that the graph must use for the file to be copied whole


def tensor(
    ref: TensorRef, name: str, dtype: str | None = None
) -> ir.ExternalTensor | ir.LazyTensor:
    """An onnx-ir tensor for stored bytes, without reading them.

    Args:
        ref: where the bytes lie.
        name: of the initializer.
        dtype: to convert to when written (float16, bfloat16, float32, float64); None keeps it.

    Raises:
        UsageError: when written, if a value does not fit ``dtype``.
    """
    import onnx_ir as ir

    from .weights import numpy_dtype

    if dtype is not None and dtype != ref.dtype:
        from ._streamed import StreamedTensor

        return StreamedTensor(ref, name, dtype)
    # An absolute location without base directory: the checkpoint is the user's own, and its files
    # may be links (the hub's cache) that onnx-ir's containment check would refuse.
    return ir.ExternalTensor(
        os.path.realpath(ref.file),
        ref.offset,
        ref.nbytes,
        ir.DataType.from_numpy(numpy_dtype(ref.dtype)),
        shape=ir.Shape(ref.shape),
        name=name,
    )


@dataclass(slots=True)
class _Weight:
    """One run of bytes, and the initializers that share it."""

    name: str
    tensor: ir.TensorProtocol
    source: TensorRef | None
    values: list[ir.Value] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which files to copy whole, what to stream into one more, and what to keep in the graph."""

    copies: list[tuple[Path, list[_Weight]]]
    streamed: list[_Weight]
    inline: list[_Weight]


def save(
    model: ir.Model,
    root: Path,
    *,
    name: str = MODEL,
    weights: str = WEIGHTS,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a graph and its weights; the same input gives the same bytes.

    Tensors of 1 KiB and more go to safetensors files; the graph, which stays small whatever the
    model's size, points into them. A safetensors file that the graph uses unchanged, and at least
    nine tenths of, is copied whole; everything else is streamed, one tensor at a time. The model is
    left as it was.

    Args:
        model: any opset.
        root: an existing directory.
        name: of the graph file.
        weights: of the weight file; several become ``model-00001-of-0000N.safetensors``.
        metadata: added to the file's ``metadata_props``.

    Returns:
        Names of the files written, the graph first.

    Raises:
        CheckpointError: a source of weights is damaged.
        ExportError: the graph without its weights is larger than a protobuf may be (2 GiB).
        StorageError: the disk refused.
    """
    return save_all({name: model}, root, weights=weights, metadata=metadata)


def save_all(
    models: Mapping[str, ir.Model],
    root: Path,
    *,
    weights: str = WEIGHTS,
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """:func:`save` for several graphs, by file name, whose weights lie together.

    Bytes that several graphs refer to are stored once.

    Returns:
        Names of the files written, the graphs first.
    """
    import onnx_ir as ir

    plan = _plan(_weights(models.values()))
    count = len(plan.copies) + bool(plan.streamed)
    names = [_shard(weights, index, count) for index in range(1, count + 1)]
    with refusals(root), _replacing(root) as place, _restored(models.values()):
        for file, (source, members) in zip(names, plan.copies, strict=False):
            copy_file(source, place(file))
            _point(members, file, root, lambda weight: _required(weight.source))
        if plan.streamed:
            refs = write_safetensors(place(names[-1]), [_entry(w) for w in plan.streamed])
            _point(plan.streamed, names[-1], root, lambda weight: refs[weight.name])
        _inline(plan.inline)
        for name, model in models.items():
            _inline_attributes(model)
            model.metadata_props.update(metadata or {})
            place(name).write_bytes(_serialize(ir.serde.serialize_model(model)))
    return (*models, *names)


def load(root_or_file: Path) -> ir.Model:
    """Open an ONNX file, once its external data has been checked; weights stay on disk.

    Raises:
        PathEscape, UnsafeError, UsageError: see :func:`check_external_data`.
    """
    import onnx_ir as ir

    file = model_file(root_or_file)
    model = ir.serde.deserialize_model(load_checked(file))
    ir.external_data.set_base_dir(model.graph, file.parent)
    for function in model.functions.values():
        for item in _attribute_tensors(function):
            if isinstance(item, ir.ExternalTensor):
                item.base_dir = file.parent
    return model


@dataclass(frozen=True, slots=True)
class OnnxDescription:
    """What an ONNX file says of itself.

    Attributes:
        opsets: version by domain; the standard domain is ``""``.
        ir_version: of the file format.
        producer: name and version of what wrote the graph.
        inputs, outputs: dtype is ``sequence``, ``map`` or ``optional`` for what is no tensor; a
            dimension without size and name is ``"?"``, an unknown rank ``("...",)``.
        nodes: in the main graph, subgraphs and functions.
        weight_bytes: bytes of initializers and constants by dtype; shared bytes count once.
        metadata: the file's ``metadata_props``.
    """

    opsets: Mapping[str, int]
    ir_version: int
    producer: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    weight_bytes: Mapping[str, int]
    metadata: Mapping[str, str]


def describe(root_or_file: Path) -> OnnxDescription:
    """Read back what a file is: opsets, inputs, outputs, weights by dtype. No weights are read.

    Raises:
        PathEscape, UnsafeError, UsageError: see :func:`check_external_data`.
    """
    proto = load_checked(model_file(root_or_file))
    stored = {initializer.name for initializer in proto.graph.initializer}
    nodes = sum(len(g.node) for g in graphs(proto)) + sum(len(f.node) for f in proto.functions)
    return OnnxDescription(
        opsets={("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import},
        ir_version=proto.ir_version,
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
        inputs=tuple(_spec(value) for value in proto.graph.input if value.name not in stored),
        outputs=tuple(_spec(value) for value in proto.graph.output),
        nodes=nodes,
        weight_bytes=_weight_bytes(proto),
        metadata={entry.key: entry.value for entry in proto.metadata_props},
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value") or "unknown"
    if kind != "tensor_type":
        return TensorSpec(value.name, kind.removesuffix("_type"), ("...",))
    tensor_type = value.type.tensor_type
    dtype = DTYPES.get(tensor_type.elem_type, ("unknown", 0))[0]
    if not tensor_type.HasField("shape"):
        return TensorSpec(value.name, dtype, ("...",))
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor_type.shape.dim
    )
    return TensorSpec(value.name, dtype, shape)


def _weight_bytes(proto: onnx.ModelProto) -> dict[str, int]:
    import math

    found: Counter[str] = Counter()
    seen = set()
    for item in tensors(proto):
        place = tuple((entry.key, entry.value) for entry in item.external_data)
        if place and place in seen:
            continue
        seen.add(place)
        dtype, bits = DTYPES.get(item.data_type, ("unknown", 0))
        size = -(-math.prod(item.dims) * bits // 8)
        found[dtype] += size or sum(map(len, item.string_data))
    return dict(sorted(found.items()))


def _weights(models: Iterable[ir.Model]) -> list[_Weight]:
    """The initializers that leave the graphs, in their order, those with the same bytes joined."""
    import onnx_ir as ir

    found: dict[Any, _Weight] = {}
    taken: set[str] = set()
    for graph in (graph for model in models for graph in model.graphs()):
        for value in graph.initializers.values():
            item = value.const_value
            if item is None or item.dtype == ir.DataType.STRING:
                continue
            source = _source(item)
            # Bytes shared by name (tied weights) are written once.
            key: Any = id(item) if source is None else (source.file, source.offset, source.nbytes)
            if key not in found:
                found[key] = _Weight(_free(value.name or "", taken), item, source)
            found[key].values.append(value)
    return list(found.values())


def _source(item: ir.TensorProtocol) -> TensorRef | None:
    """Where an external tensor's bytes lie, with the file's own links resolved."""
    import onnx_ir as ir

    if not isinstance(item, ir.ExternalTensor):
        return None
    nbytes = item.nbytes
    if item.length not in (None, nbytes):
        raise CheckpointError(
            f"{item.name} refers to {item.length} bytes", allowed=f"the {nbytes} of its shape"
        )
    return TensorRef(Path(item.path), item.offset or 0, nbytes, "uint8", (nbytes,))


def _free(name: str, taken: set[str]) -> str:
    """A name no other weight has: subgraphs may use one again."""
    candidate, number = name, 2
    while candidate in taken or candidate == "__metadata__":
        candidate, number = f"{name}#{number}", number + 1
    taken.add(candidate)
    return candidate


def _plan(found: list[_Weight]) -> _Plan:
    inline = [w for w in found if w.tensor.nbytes < _EXTERNAL]
    large = [w for w in found if w.tensor.nbytes >= _EXTERNAL]
    by_file: dict[Path, list[_Weight]] = {}
    for weight in large:
        if weight.source is not None:
            by_file.setdefault(weight.source.file, []).append(weight)
    # Shards keep their order; their names say it.
    whole = {f: by_file[f] for f in sorted(by_file) if _worth_copying(f, by_file[f])}
    copies = list(whole.items())
    rest = [w for w in large if w.source is None or w.source.file not in whole]
    if copies and sum(w.tensor.nbytes for w in rest) <= _INLINE_REST:
        return _Plan(copies, [], inline + rest)
    return _Plan(copies, rest, inline)


def _worth_copying(file: Path, members: list[_Weight]) -> bool:
    used = sum(weight.tensor.nbytes for weight in members)
    try:
        if used < _USED * file.stat().st_size:
            return False
        read_header(file)
    except (OSError, CheckpointError, PickleRefused):
        return False  # streaming reads only the bytes that are needed, or says what is wrong
    return True


def _shard(weights: str, index: int, count: int) -> str:
    if count == 1:
        return weights
    stem, dot, suffix = weights.rpartition(".")
    return f"{stem}-{index:05d}-of-{count:05d}{dot}{suffix}"


def _entry(weight: _Weight) -> WriteTensor:
    """How a weight is stored: under its own dtype where safetensors has it, else as bytes."""
    item = weight.tensor
    dtype, bits = DTYPES[int(item.dtype)]
    known = bits >= 8 and any(dtype == stored for stored, _ in STORED.values())
    shape = tuple(item.shape.numpy()) if known else (item.nbytes,)
    return weight.name, dtype if known else "uint8", shape, weight.source or _chunks(item)


def _chunks(item: ir.TensorProtocol) -> Callable[[], Iterable[bytes]]:
    streamed: Callable[[], Iterable[bytes]] | None = getattr(item, "chunks", None)
    return streamed or (lambda: [item.tobytes()])


def _required(source: TensorRef | None) -> TensorRef:
    assert source is not None
    return source


def _point(
    members: list[_Weight], file: str, root: Path, place: Callable[[_Weight], TensorRef]
) -> None:
    """Make initializers refer to ``file`` in the artifact."""
    import onnx_ir as ir

    for weight in members:
        ref = place(weight)
        for value in weight.values:
            item = value.const_value
            assert item is not None
            value.const_value = ir.ExternalTensor(
                file,
                ref.offset,
                ref.nbytes,
                item.dtype,
                shape=ir.Shape(item.shape.numpy()),
                name=value.name or "",
                base_dir=root,
            )


def _inline(members: list[_Weight]) -> None:
    """Put references and computed tensors into the graph; what is there already stays."""
    import onnx_ir as ir

    for weight in members:
        if isinstance(weight.tensor, ir.ExternalTensor | ir.LazyTensor):
            for value in weight.values:
                value.const_value = _in_memory(value.const_value or weight.tensor, value.name or "")


def _in_memory(item: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    import onnx
    import onnx_ir as ir

    source = _source(item)
    if source is None:
        raw = item.tobytes()
    else:
        with source.file.open("rb") as stream:
            stream.seek(source.offset)
            raw = stream.read(source.nbytes)
        if len(raw) != source.nbytes:
            raise CheckpointError(f"{source.file} ends inside {name}")
    proto = onnx.TensorProto(
        name=name, data_type=int(item.dtype), dims=item.shape.numpy(), raw_data=raw
    )
    return ir.serde.TensorProtoTensor(proto)


def _inline_attributes(model: ir.Model) -> None:
    """Constants that refer to files become part of the graph: few runtimes read them outside."""
    import onnx_ir as ir

    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        for node in ir.traversal.RecursiveGraphIterator(owner):
            for key, attribute in list(node.attributes.items()):
                if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                    continue
                if isinstance(attribute.value, ir.ExternalTensor):
                    inner = _in_memory(attribute.value, attribute.value.name or "")
                    node.attributes[key] = ir.AttrTensor(key, inner)


def _attribute_tensors(owner: ir.Graph | ir.Function) -> Iterator[ir.TensorProtocol]:
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(owner):
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value


@contextmanager
def _restored(models: Iterable[ir.Model]) -> Iterator[None]:
    """Undo the changes that writing makes to initializers and metadata."""
    written = list(models)
    metadata = [dict(model.metadata_props) for model in written]
    values = [v for model in written for g in model.graphs() for v in g.initializers.values()]
    before = [value.const_value for value in values]
    try:
        yield
    finally:
        for value, item in zip(values, before, strict=True):
            value.const_value = item
        for model, props in zip(written, metadata, strict=True):
            model.metadata_props.clear()
            model.metadata_props.update(props)


@contextmanager
def _replacing(root: Path) -> Iterator[Callable[[str], Path]]:
    """Give out temporary names, renamed when all is written: the source may lie in ``root``."""
    pending: dict[Path, Path] = {}

    def place(file: str) -> Path:
        temporary = root / f".{file}.new"
        temporary.unlink(missing_ok=True)
        pending[temporary] = root / file
        return temporary

    try:
        yield place
        for temporary, final in pending.items():
            temporary.replace(final)
    except BaseException:
        for temporary in pending:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def _serialize(proto: onnx.ModelProto) -> bytes:
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except (EncodeError, ValueError) as error:
        raise ExportError(
            "the graph is larger than 2 GiB without its weights",
            hint="a constant in the graph holds weights: try another --strategy",
        ) from error
