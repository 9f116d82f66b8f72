"""A model repository of Triton Inference Server: ``triton:///path/model_repository``.

    <name>/config.pbtxt
    <name>/<version>/model.{onnx,plan,pt} and what lies beside it

Written through the server's own protobuf classes, so that a field it lacks is an error here and
not at its next start. An engine with several optimisation profiles becomes a model for each
profile: an instance runs one profile, and a batch size goes to the model whose bucket holds it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import profiles
from ..artifacts.copying import copy_file
from ..artifacts.digest import digest
from ..artifacts.manifest import REPORTS
from ..artifacts.release import RELEASE
from ..errors import BackendUnavailable, UsageError
from .base import Deployment, Serving, changed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..artifacts import Artifact
    from ..spec import ModelSpec, TensorSpec

CONFIG: Final = "config.pbtxt"

# Triton's docs/user_guide/model_configuration.md, "Datatypes"
_TYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16",
    "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}


@dataclass(frozen=True, slots=True)
class _Backend:
    """How the server calls a format: backend, the file it opens, and what names tensors have."""

    name: str
    file: str
    positional: bool = False


_BACKENDS: Final[Mapping[str, _Backend]] = {
    "onnx": _Backend("onnxruntime", "model.onnx"),
    "tensorrt": _Backend("tensorrt", "model.plan"),
    # A TorchScript module takes its inputs by position: NAME__INDEX says which.
    "torchscript": _Backend("pytorch", "model.pt", positional=True),
}


@dataclass(frozen=True, slots=True)
class _Model:
    """One model of the repository: what it is called, its file, and which profile it runs."""

    name: str
    file: str
    dims: Mapping[str, Any]
    profile: int | None = None


class ModelRepository(Deployment):
    """Writes each model beside its place and renames it in."""

    def place(self, artifact: Artifact, serving: Serving, record: bytes) -> tuple[Path, ...]:
        backend = _BACKENDS.get(artifact.format)
        if backend is None:
            raise UsageError(
                f"Triton has no backend for the format {artifact.format}",
                allowed=", ".join(_BACKENDS),
            )
        root = Path(self.reference.place)
        if not root.is_absolute():
            raise UsageError(f"{self.reference} is not absolute", allowed="triton:///path")
        models = _models(artifact, serving, backend)
        configs = [_config(artifact, m, serving, backend) for m in models]  # before any writing
        return tuple(
            _place(root / model.name, artifact, model, backend, config, record)
            for model, config in zip(models, configs, strict=True)
        )


def _models(artifact: Artifact, serving: Serving, backend: _Backend) -> list[_Model]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", serving.name):
        raise UsageError(f"{serving.name!r} is no name for a model", hint="--name")
    if artifact.manifest.components:
        raise UsageError(
            f"{artifact.root} is several graphs with a cache between steps, which no model "
            "repository holds",
            allowed="an artifact of one graph, or another destination",
        )
    engines = _engines(artifact)
    if not engines:
        return [_Model(serving.name, backend.file, artifact.spec.dims)]
    found = []
    for engine in engines:
        several = len(engines) * len(engine.profiles) > 1
        for index, profile in enumerate(engine.profiles):
            batch = profile.dims.get(profiles.BATCH)
            tail = f"-batch-{batch.max}" if several and batch else f"-{index}" if several else ""
            found.append(_Model(serving.name + tail, engine.file, profile.dims, index))
    return found


def _engines(artifact: Artifact) -> tuple[profiles.Engine, ...]:
    facts = artifact.manifest.facts
    if artifact.format != "tensorrt":
        return ()
    if facts.get("weights") == "beside the engines":
        raise UsageError(
            "Triton cannot load engines whose weights lie beside them",
            hint="export again without --strip-plan",
        )
    return profiles.from_record(facts.get("engines"), artifact.spec)


def _config(artifact: Artifact, model: _Model, serving: Serving, backend: _Backend) -> str:
    """The model's configuration as text.

    Raises:
        BackendUnavailable: tritonclient is not installed.
        UsageError: a dtype that Triton does not know.
    """
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc import model_config_pb2 as schema
    except ImportError as error:
        raise BackendUnavailable(
            f"triton: needs tritonclient, and {error.name or error} is not installed",
            hint='pip install "modelport[publish]"',
        ) from error
    spec = artifact.spec
    batch = _batch_dimension(spec)
    config = schema.ModelConfig(name=model.name, backend=backend.name,
                                default_model_filename=backend.file)
    config.max_batch_size = model.dims[batch].max if batch else 0
    for target, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
        for index, tensor in enumerate(tensors):
            added = target.add()
            added.name = f"{tensor.name}__{index}" if backend.positional else tensor.name
            added.data_type = schema.DataType.Value("TYPE_" + _type(tensor))
            shape = tensor.shape[1:] if batch else tensor.shape
            added.dims.extend(-1 if isinstance(size, str) else size for size in shape)
    if batch:
        low, high = model.dims[batch].min, model.dims[batch].max
        preferred = [size for size in serving.preferred if low <= size <= high]
        config.dynamic_batching.SetInParent()
        config.dynamic_batching.preferred_batch_size.extend(preferred)
    gpu = artifact.format == "tensorrt" or artifact.manifest.target.get("device") == "cuda"
    group = config.instance_group.add()
    kinds = schema.ModelInstanceGroup
    group.kind = kinds.KIND_GPU if gpu else kinds.KIND_CPU
    group.count = 1
    if model.profile is not None:
        group.profile.append(str(model.profile))
    text: str = text_format.MessageToString(config)
    return text


def _batch_dimension(spec: ModelSpec) -> str | None:
    """The dimension that the server may batch over: the first of every input and output."""
    firsts = {t.shape[0] if t.shape else None for t in (*spec.inputs, *spec.outputs)}
    first = firsts.pop() if len(firsts) == 1 else None
    return first if isinstance(first, str) else None


def _type(tensor: TensorSpec) -> str:
    if tensor.dtype not in _TYPES:
        raise UsageError(
            f"{tensor.name} is {tensor.dtype}, which Triton does not know",
            allowed=", ".join(_TYPES),
        )
    return _TYPES[tensor.dtype]


def _place(
    target: Path, artifact: Artifact, model: _Model, backend: _Backend, config: str, record: bytes
) -> Path:
    """Write one model; a server that polls the repository sees it whole or not at all.

    A new version is written completely before its number appears; an older configuration is
    replaced first only where it differs, which the server accepts for versions it already serves.
    One publisher at a time: two would take the same number.
    """
    from ..artifacts._rename import sync_directory, sync_tree, write_durable
    from ..artifacts.directory import beside
    from ..artifacts.storage import refusals

    with refusals(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as partial:
            version = _next_version(target, record)
            if version is None:
                return target
            _fill(partial / str(version), artifact, model, backend, record)
            (partial / CONFIG).write_text(config, encoding="utf-8")
            sync_tree(partial)
            if target.exists():
                write_durable(target / CONFIG, config.encode())
                (partial / str(version)).rename(target / str(version))
                sync_directory(target)
            else:
                partial.rename(target)
            sync_directory(target.parent)
    return target


def _fill(
    directory: Path, artifact: Artifact, model: _Model, backend: _Backend, record: bytes
) -> None:
    """One version: the model under the name the server opens, its weights, and the record."""
    directory.mkdir(parents=True)
    entry_point = model.file if artifact.format == "tensorrt" else backend.file
    files = artifact.manifest.files
    if entry_point not in files:
        raise UsageError(f"{artifact.root} holds no {entry_point}", allowed=", ".join(files))
    others = {engine.file for engine in _engines(artifact)}
    for name, entry in files.items():
        if name in REPORTS or (name in others and name != entry_point):
            continue
        place = directory / (backend.file if name == entry_point else name)
        place.parent.mkdir(parents=True, exist_ok=True)
        copy_file(artifact.root / name, place)
        if digest(place) != entry:
            raise changed(artifact.root / name)
    (directory / RELEASE).write_bytes(record)


def _next_version(target: Path, record: bytes) -> int | None:
    """The number after the highest; None where the highest is this release already."""
    if not target.exists():
        return 1
    if not (target / CONFIG).is_file():
        raise UsageError(f"{target} is there and is no model of Triton's", hint="--name")
    numbers = [int(p.name) for p in target.iterdir() if p.name.isdecimal() and p.is_dir()]
    last = max(numbers, default=0)
    present = target / str(last) / RELEASE
    if present.is_file() and present.read_bytes() == record:
        return None
    return last + 1


DESTINATION = ModelRepository
