"""Which pairs of a model type and a task there are, and in which order they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text encoder", "vision encoder", "audio encoder", "decoder", "encoder-decoder",
               "several inputs", "generation", "other"]

MUST = (
    "bert", "roberta", "camembert", "xlm-roberta", "distilbert", "albert", "electra", "deberta",
    "deberta-v2", "mpnet", "xlnet", "longformer", "big_bird", "funnel", "ernie", "convbert",
    "mobilebert", "nystromformer", "roformer", "layoutlm", "modernbert", "esm", "flaubert",
    "xlm", "rembert", "data2vec-text", "data2vec-vision", "data2vec-audio", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "phi", "gemma",
    "gemma2", "falcon", "mpt", "codegen", "biogpt", "t5", "mt5", "bart", "mbart", "marian",
    "pegasus", "m2m_100", "blenderbot", "vit", "deit", "beit", "swin", "convnext", "resnet",
    "mobilevit", "segformer", "dinov2", "wav2vec2", "hubert", "whisper", "clip", "bark",
)
"""Model types of which every task has to be right."""

_ORDER: tuple[Kind, ...] = (
    "text encoder", "vision encoder", "audio encoder", "other", "encoder-decoder", "decoder",
    "generation", "several inputs")


@dataclass(frozen=True, slots=True)
class Pair:
    """A model type with a task.

    Attributes:
        class_name: the transformers class that performs it.
        kind: what the model reads, by which the totals are grouped.
    """

    model_type: str
    task: str
    class_name: str
    kind: Kind

    @property
    def must(self) -> bool:
        return self.model_type in MUST


def pairs() -> list[Pair]:
    """Every pair of transformers' auto mappings, the required ones first."""
    from modelport.checkpoints import tasks
    from transformers.models.auto import modeling_auto

    found = []
    for task, known in tasks.TASKS.items():
        if known.composed:
            continue
        for model_type, names in getattr(modeling_auto, known.mapping).items():
            name = names if isinstance(names, str) else names[0]
            found.append(Pair(model_type, task, name, _kind(model_type, task)))
    return sorted(found, key=lambda p: (not p.must, _ORDER.index(p.kind)))


def _kind(model_type: str, task: str) -> Kind:
    """By transformers' own tables, so that no model's module is imported for it."""
    from modelport.checkpoints import tasks
    from transformers.models.auto import modeling_auto as auto

    def listed(*names: str) -> bool:
        return any(model_type in getattr(auto, f"MODEL_FOR_{n}_MAPPING_NAMES") for n in names)

    if tasks.TASKS[task].parts:
        return "generation"
    if listed("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION",
              "ZERO_SHOT_OBJECT_DETECTION", "VISUAL_QUESTION_ANSWERING"):
        return "several inputs"
    if listed("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
        return "encoder-decoder"
    if listed("IMAGE", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
              "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "UNIVERSAL_SEGMENTATION"):
        return "vision encoder"
    if listed("AUDIO_CLASSIFICATION", "CTC", "AUDIO_XVECTOR"):
        return "audio encoder"
    if listed("MASKED_LM", "TEXT_ENCODING", "NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE"):
        return "text encoder"
    return "decoder" if listed("CAUSAL_LM") else "other"


def by_main_input(model: Any) -> Kind:
    """For what no table of transformers tells apart: by what the model itself says it reads."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main.startswith("pixel_values"):
        return "vision encoder"
    if main in ("input_values", "input_features"):
        return "audio encoder"
    return "text encoder" if main == "input_ids" else "several inputs"
