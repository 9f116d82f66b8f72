"""Run a text through an artifact and say what came out, in the terms of its task."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recordings
from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from .artifacts import Artifact
    from .runtimes.pipelines import Pipeline
    from .session import Session

TOP = 5


def predict(artifact: Artifact, session: Session, text: str) -> dict[str, Any]:
    """Tokenise with the artifact's own tokenizer, run, and interpret the output.

    Returns:
        ``task``, ``text``, ``outputs`` (shape and dtype by name), and ``answer``: for
        feature-extraction the mean-pooled, normalised embedding; for sentence-similarity the
        embedding as the checkpoint pools it; for fill-mask the best tokens at
        each mask; for classification the labels with their probabilities; else nothing.

    Raises:
        UsageError: the artifact takes no text, or has no tokenizer.
    """
    from . import checkpoints

    names = session.spec.input_names
    if "input_ids" not in names:
        raise UsageError(f"this artifact takes {', '.join(names)}, not text")
    feeds = {k: v for k, v in checkpoints.tokenize(artifact.root, [text]).items() if k in names}
    outputs = session.run(feeds)
    task = artifact.manifest.source.task
    interpret = {
        "feature-extraction": _embedding,
        "sentence-similarity": _sentence,
        "fill-mask": _masked_tokens,
        "text-classification": _labels,
    }.get(task)
    return {
        "task": task,
        "text": text,
        "outputs": {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in outputs.items()},
        "answer": interpret(artifact.root, feeds, outputs) if interpret else None,
    }


def generated(
    pipeline: Pipeline, text: str, settings: Mapping[str, Any], *, seed: int, audio: Path
) -> dict[str, Any]:
    """Generate from a text.

    Args:
        settings: of ``generate``.
        seed: of sampling.
        audio: where a recording is written, if that is what is generated: 16-bit PCM.

    Returns:
        ``task``, ``text``, ``outputs`` (shape and dtype of the sequences or the recording), and
        ``answer``: the new text, or the path of the recording.

    Raises:
        UsageError: no tokenizer, an empty text, or settings that do not fit the model.
    """
    found = _sequences(pipeline, {**pipeline.prompt([text]), **settings}, seed)
    answer = _said(pipeline, found, "text", text)
    if pipeline.sampling_rate is not None:
        recordings.write(audio, found[0].float().numpy(), pipeline.sampling_rate)
        return {**answer, "answer": str(audio)}
    return {**answer, "answer": pipeline.text(found)[0]}


def heard(
    pipeline: Pipeline, recording: Path, settings: Mapping[str, Any], *, seed: int
) -> dict[str, Any]:
    """Transcribe a recording, at any rate: it is resampled to the model's own.

    Returns:
        As :func:`generated`, with ``recording`` in place of ``text``; ``answer`` is the text, or
        the token ids where the artifact has no tokenizer.

    Raises:
        UsageError: the model does not hear, or the file is no recording that can be read.
    """
    from .checkpoints import has_tokenizer

    listen = getattr(pipeline, "listen", None)
    if listen is None:
        raise UsageError(f"{pipeline.artifact.root} reads a text and hears nothing",
                         allowed="--text", hint="--audio alone goes with a model that transcribes")
    found = _sequences(pipeline, {**listen(*recordings.read(recording)), **settings}, seed)
    words = has_tokenizer(pipeline.artifact.root)
    return {**_said(pipeline, found, "recording", str(recording)),
            "answer": pipeline.text(found)[0] if words else found[0].tolist()}


def _sequences(pipeline: Pipeline, arguments: Mapping[str, Any], seed: int) -> Any:
    import torch

    from .checkpoints.loader import quiet

    torch.manual_seed(seed)
    with torch.inference_mode(), quiet(), warnings.catch_warnings():
        # How long, where nobody has said: --help tells.
        warnings.filterwarnings("ignore", "Using the model-agnostic default `max_length`")
        return pipeline.generate(**arguments).cpu()


def _said(pipeline: Pipeline, found: Any, kind: str, given: str) -> dict[str, Any]:
    dtype = str(found.dtype).removeprefix("torch.")
    return {"task": pipeline.artifact.manifest.source.task, kind: given,
            "outputs": {"generated": {"shape": list(found.shape), "dtype": dtype}}}


def _embedding(
    root: Path, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> list[float]:
    import numpy as np

    hidden = outputs["last_hidden_state"].astype(np.float64)
    mask = feeds["attention_mask"][:, :, None]
    pooled = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    vector = pooled[0] / np.linalg.norm(pooled[0])
    return [float(x) for x in vector]


def _sentence(
    root: Path, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> list[float]:
    return [float(x) for x in outputs["sentence_embedding"][0]]


def _masked_tokens(
    root: Path, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> list[list[dict[str, Any]]]:
    import numpy as np

    from . import checkpoints

    tokenizer = checkpoints.tokenizer(root)
    positions = np.flatnonzero(feeds["input_ids"][0] == tokenizer.mask_token_id)
    if not positions.size:
        raise UsageError(
            "the text has no masked word", allowed=f"write {tokenizer.mask_token} where one is"
        )
    answers = []
    for position in positions:
        scores = _softmax(outputs["logits"][0, position])
        best = np.argsort(scores)[::-1][:TOP]
        answers.append(
            [{"token": tokenizer.decode([int(i)]), "score": float(scores[i])} for i in best]
        )
    return answers


def _labels(
    root: Path, feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    names = config.get("id2label") or {}
    scores = _softmax(outputs["logits"][0])
    return [
        {"label": names.get(str(i), f"LABEL_{i}"), "score": float(scores[i])}
        for i in scores.argsort()[::-1][:TOP]
    ]


def _softmax(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(shifted / shifted.sum())


def describe(answer: dict[str, Any]) -> str:
    """An answer for a person."""
    lines = [f"{k}: {v['dtype']}{v['shape']}" for k, v in answer["outputs"].items()]
    found = answer["answer"]
    if isinstance(found, str):
        return "\n".join([*lines, found])
    if "recording" in answer:
        return "\n".join([*lines, f"tokens {' '.join(map(str, found))} (no tokenizer)"])
    if answer["task"] == "feature-extraction":
        head = ", ".join(f"{x:+.4f}" for x in found[:6])
        lines.append(f"embedding: {len(found)} numbers, [{head}, …]")
    elif answer["task"] == "fill-mask":
        for answers in found:
            lines.append("  ".join(f"{a['token'].strip()} {a['score']:.3f}" for a in answers))
    elif found:
        lines += [f"{a['label']} {a['score']:.3f}" for a in found]
    return "\n".join(lines)
