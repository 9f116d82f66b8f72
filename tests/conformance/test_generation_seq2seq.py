"""Every encoder-decoder family: exported, and proven part by part and end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from modelport import artifacts, pipeline

FAMILIES = {
    **dict.fromkeys(("t5", "mt5", "bart", "marian", "m2m_100"), "text2text-generation"),
    "whisper": "automatic-speech-recognition",
}
OPTIONS = {
    **{kind: {"init_std": 0.4} for kind in FAMILIES if "t5" not in kind},
    "mt5": {"num_decoder_layers": 2},
}
"""Wide enough that prompts matter to the answers; T5, whose scores are not scaled, is so by itself
and would only lose precision. The library's own cache has as many layers as the encoder: where the
decoder has more, its generate fails."""

SMALL = pipeline.Limits(
    sizes={"batch": (3,), "sequence": (1, 17), "past": (0, 7), "source": (1, 9)})


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_encoder_and_its_decoder_are_proven(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = tiny(kind, FAMILIES[kind], **OPTIONS.get(kind, {}))
    artifact = pipeline.export("onnx", pipeline.ModelRequest(str(source)), out, validate=False)
    assert artifacts.verify(out) == artifact
    assert set(artifact.manifest.components) == {"encoder", "cross", "decoder"}
    assert artifact.manifest.source.task == FAMILIES[kind]
    report = pipeline.validate_artifact(out, limits=SMALL)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    assert report.gates == {"hygiene": "pass", "translation": "pass", "generation": "pass"}
    judged = {part for c in report.cases for part in c.shape.split() if part.startswith("part=")}
    assert judged == {"part=encoder", "part=cross", "part=decoder", "part=steps",
                      "part=generated"}
