"""Which task a checkpoint was made for, and the transformers class that performs a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import lean
from .files import TIMM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of head.

    Attributes:
        suffix: how the names of its classes end.
        mapping: name of transformers' table from model type to class for it.
        parts: kind of model, among :mod:`.parts`, that performs it in several steps with a state
            of its own; None where one forward pass does.
        head: what follows ``AutoModelFor``, where it differs from the suffix.
        heard: whether what is read reaches the answer through attention alone: from an encoder to
            a decoder, or from one model to the next. Random weights then need attention that
            tells inputs apart.
        composed: whether a checkpoint's own list of modules performs it, not one class.
    """

    suffix: str
    mapping: str
    parts: str | None = None
    head: str = ""
    heard: bool = False
    composed: bool = False

    @property
    def auto(self) -> str:
        """Name of the auto class, which is also the key in a checkpoint's ``auto_map``."""
        if self.suffix == "Model":
            return "AutoModel"
        return f"AutoModelFor{self.head}" if self.head else f"AutoModel{self.suffix}"


TASKS: Mapping[str, Task] = {
    "feature-extraction": Task("Model", "MODEL_MAPPING_NAMES"),
    "sentence-similarity": Task("Model", "MODEL_MAPPING_NAMES", composed=True),
    "fill-mask": Task("ForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "text-classification": Task(
        "ForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "token-classification": Task(
        "ForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "question-answering": Task(
        "ForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "multiple-choice": Task("ForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    "image-classification": Task(
        "ForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "audio-classification": Task(
        "ForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    "next-sentence-prediction": Task(
        "ForNextSentencePrediction", "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES"),
    "ctc": Task("ForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "audio-frame-classification": Task(
        "ForAudioFrameClassification", "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES"),
    "audio-xvector": Task(
        "ForXVector", "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES", head="AudioXVector"),
    "semantic-segmentation": Task(
        "ForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES"),
    "universal-segmentation": Task(
        "ForUniversalSegmentation", "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES"),
    "object-detection": Task("ForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"),
    "depth-estimation": Task("ForDepthEstimation", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES"),
    "masked-image-modeling": Task(
        "ForMaskedImageModeling", "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES"),
    "video-classification": Task(
        "ForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"),
    "text-generation": Task("ForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", parts="decoder"),
    "text2text-generation": Task(
        "ForConditionalGeneration", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        parts="seq2seq", heard=True),
    "automatic-speech-recognition": Task(
        "ForConditionalGeneration", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", parts="seq2seq",
        heard=True),
    "text-to-audio": Task(
        "Model", "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES", parts="bark", heard=True),
}

_LISTED = ("text-to-audio", "automatic-speech-recognition")
"""Tasks whose classes are known by transformers' table alone: others end in the same suffix."""


def available() -> tuple[str, ...]:
    """The tasks there are."""
    return tuple(TASKS)


def check(task: str) -> str:
    """The task itself, when there is such a one.

    Raises:
        UsageError: unknown.
    """
    if task not in TASKS:
        raise UsageError(f"there is no task {task!r}", allowed=", ".join(available()))
    return task


def detect(config: Mapping[str, Any]) -> str:
    """The task of the head a checkpoint was saved with, from ``architectures`` in its config.

    A checkpoint of timm names none; it classifies images where it has classes.

    Raises:
        UsageError: ``architectures`` is absent or its head is of no known task.
    """
    names = config.get("architectures") or []
    if not names and TIMM in config:
        return "image-classification" if config.get("num_classes") else "feature-extraction"
    if not names:
        raise UsageError("config.json names no architecture, so the task can't be known",
                         allowed=", ".join(available()), hint="--task T")
    architecture = str(names[0])
    if (architecture.endswith("ForSequenceClassification")
            and _listed(architecture, "audio-classification")):
        return "audio-classification"
    if architecture.endswith("LMHeadModel"):
        return "text-generation"
    for task in (*_LISTED, "text2text-generation"):  # one of whose classes is MarianMTModel
        if _listed(architecture, task):
            return task
    for task, known in TASKS.items():
        if task not in _LISTED and not known.composed and architecture.endswith(known.suffix):
            return task
    if architecture.endswith("ForPreTraining"):
        return "feature-extraction"
    raise UsageError(f"the head of {architecture} belongs to no task known here",
                     allowed=", ".join(available()), hint="--task feature-extraction")


def _listed(architecture: str, task: str) -> bool:
    """Whether a class is one of transformers' own for a task."""
    names = getattr(_tables(), TASKS[task].mapping).values()
    return any(architecture == n if isinstance(n, str) else architecture in n for n in names)


def _tables() -> Any:
    """transformers' own tables of classes, by task."""
    lean.preload()
    from transformers.models.auto import modeling_auto

    return modeling_auto


def class_name(model_type: str, task: str, architectures: tuple[str, ...] = ()) -> str:
    """Name of the transformers class for a model type and a task.

    Args:
        model_type: as in the config.
        task: one of :data:`TASKS`.
        architectures: of the config; the first one wins when it performs the task.

    Raises:
        UsageError: transformers has no such class; names the tasks it has one for.
    """
    suffix = TASKS[task].suffix  # GPT2LMHeadModel ends in Model, too
    if architectures and architectures[0].endswith(suffix) and (
            detect({"architectures": architectures}) == task):
        return architectures[0]
    names = getattr(_tables(), TASKS[task].mapping).get(model_type)
    if not names:
        supported = for_model_type(model_type)
        raise UsageError(f"transformers has no {task} class for {model_type}",
                         allowed=", ".join(supported) or "no task: the model type is unknown",
                         hint=f"--task {supported[0]}" if supported else "another model")
    return str(names if isinstance(names, str) else names[0])


def remote_class(root: Path, config: Mapping[str, Any], task: str) -> Any:
    """The class that a checkpoint brings along for a task; the caller has allowed its code.

    Raises:
        UsageError: its ``auto_map`` names none for the task.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = config.get("auto_map") or {}
    reference = auto_map.get(TASKS[task].auto)
    if not reference:
        raise UsageError(f"the checkpoint brings no class for {task} ({TASKS[task].auto})",
                         allowed=", ".join(n for n in available() if TASKS[n].auto in auto_map)
                         or "none of the known tasks", hint="another --task")
    name = reference if isinstance(reference, str) else reference[0]
    return get_class_from_dynamic_module(name, root, local_files_only=True)


def for_model_type(model_type: str) -> tuple[str, ...]:
    """The tasks that transformers has a class of this model type for."""
    return tuple(name for name in available() if not TASKS[name].composed
                 and model_type in getattr(_tables(), TASKS[name].mapping))
