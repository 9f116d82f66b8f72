"""Which files of a directory are weights, and which belong beside an artifact."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.weights import read_header
from ..errors import CheckpointError, PathEscape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .model import TensorRef

CONFIG = "config.json"
SINGLE = "model.safetensors"
MODULES = "modules.json"
"""What a checkpoint of sentence-transformers puts behind its encoder."""
MODULE = "[0-9]*_*"
"""How the folders of those modules are named."""
TIMM = "pretrained_cfg"
"""What the config of a checkpoint of timm has, by which transformers knows it, too."""
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

SIDECARS = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model",
    "spm.model", "tokenizer.model", "source.spm", "target.spm", "bpe.codes", "entity_vocab.json",
    "chat_template.jinja",
)
"""Files that go with the model, by the names that transformers' own tokenizers and processors give
them (``vocab_files_names`` of the tokenizer classes)."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint.

    Raises:
        CheckpointError: unreadable, or not an object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}",
                              hint="fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object", hint="fetch the checkpoint again")
    return value


def read_config(root: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        CheckpointError: absent or damaged.
    """
    file = root / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{root} has no {CONFIG}, so it is not a transformers checkpoint",
                              allowed=f"a directory with {CONFIG} and {SINGLE} or its shards")
    return read_json(file)


def sidecars(root: Path) -> tuple[Path, ...]:
    """The files of ``root`` to carry along with an artifact, in a fixed order."""
    return tuple(root / name for name in SIDECARS if (root / name).is_file())


def companions(root: Path) -> dict[str, Path]:
    """What a checkpoint is besides its weights, by path in it: sidecars, the modules of
    sentence-transformers with theirs, and Python."""
    modules = (root.glob(f"{MODULE}/{name}") for name in (CONFIG, SINGLE))
    found = (*sidecars(root), root / MODULES, *chain(*modules), *root.glob("*.py"))
    return {file.relative_to(root).as_posix(): file for file in sorted(found) if file.is_file()}


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_files(root: Path) -> dict[str, Path]:
    """The safetensors files by name, single or sharded; empty when there are none.

    Raises:
        CheckpointError: the index is damaged or names a shard that is absent.
        PathEscape: the index names a file outside ``root``.
    """
    if (root / SINGLE).is_file():
        return {SINGLE: root / SINGLE}
    found = {}
    for name in shards(root):
        if not (root / name).is_file():
            raise CheckpointError(f"shard {name} of {root} is missing",
                                  allowed=f"every file that {INDEX} names",
                                  hint="fetch the checkpoint again")
        found[name] = root / name
    return found


def shards(root: Path) -> tuple[str, ...]:
    """The files that the index names; none where there is no index.

    Raises:
        CheckpointError: the index is damaged.
        PathEscape: it names a file outside ``root``.
    """
    if not (root / INDEX).is_file():
        return ()
    mapping = read_json(root / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{root / INDEX} has no weight_map", hint="fetch it again")
    names = sorted({str(v) for v in mapping.values()})
    for name in names:
        if Path(name).name != name or name in {".", ".."} or "\\" in name:
            raise PathEscape(f"{root / INDEX} names {name!r}, a path outside its directory",
                             allowed="plain file names beside the index")
    return tuple(names)


def require_inside(root: Path, path: str) -> None:
    """Refuse a folder that a checkpoint names outside itself.

    Raises:
        PathEscape: it does.
    """
    if not (root / path).resolve().is_relative_to(root.resolve()):
        raise PathEscape(f"{root} names {path!r}, a path outside itself",
                         allowed="folders in the checkpoint")


def read_tensors(files: Mapping[str, Path]) -> dict[str, TensorRef]:
    """Every tensor of the weight files by name.

    Raises:
        CheckpointError: a file is truncated or corrupt, or two files hold the same tensor.
    """
    tensors: dict[str, TensorRef] = {}
    for name, file in sorted(files.items()):
        for key, ref in read_header(file).items():
            if key in tensors:
                raise CheckpointError(f"{key} is in {tensors[key].file.name} and in {name}",
                                      allowed="each tensor once", hint="fetch it again")
            tensors[key] = ref
    return tensors
