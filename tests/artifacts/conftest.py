from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from modelport.artifacts import Artifact, Manifest, Source, collect, write_manifest
from modelport.spec import Dim, ModelSpec, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

SPEC = ModelSpec(
    (TensorSpec("input_ids", "int64", ("batch", "sequence"), "tokens", 32005, 1),),
    (TensorSpec("logits", "float32", ("batch", "sequence", 32005)),),
    {"batch": Dim(1, 2, 64), "sequence": Dim(1, 128, 512)},
)
SOURCE = Source("camembert-base", "fill-mask", "random", "ab" * 32, seed=0)


def write_artifact(root: Path, text: str = "weights") -> Artifact:
    """A small artifact: two files and the manifest that names them."""
    (root / "model.onnx").write_text("graph of " + text)
    (root / "sub").mkdir(exist_ok=True)
    (root / "sub" / "tokenizer.json").write_text(text)
    manifest = Manifest("onnx", SPEC, SOURCE, {"opset": 11}, {"opset": 11}, {}, collect(root))
    return write_manifest(root, manifest)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    root = tmp_path / "out"
    root.mkdir()
    return write_artifact(root)
