"""Tasks from architectures, and classes from tasks."""

from __future__ import annotations

import pytest
from modelport.checkpoints import resolve, tasks
from modelport.errors import UsageError


@pytest.mark.parametrize(("architecture", "task"), [
    ("CamembertForMaskedLM", "fill-mask"),
    ("BertModel", "feature-extraction"),
    ("BertForPreTraining", "feature-extraction"),
    ("BertForSequenceClassification", "text-classification"),
    ("Wav2Vec2ForSequenceClassification", "audio-classification"),
    ("ASTForAudioClassification", "audio-classification"),
    ("BertForTokenClassification", "token-classification"),
    ("BertForQuestionAnswering", "question-answering"),
    ("BertForMultipleChoice", "multiple-choice"),
    ("ViTForImageClassification", "image-classification"),
    ("LlamaForCausalLM", "text-generation"),
    ("GPT2LMHeadModel", "text-generation"),
    ("T5ForConditionalGeneration", "text2text-generation"),
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ("MarianMTModel", "text2text-generation"),
    ("BarkModel", "text-to-audio"),
    ("Wav2Vec2ForCTC", "ctc"),
    ("WavLMForXVector", "audio-xvector"),
    ("DetrForObjectDetection", "object-detection"),
    ("SegformerForSemanticSegmentation", "semantic-segmentation"),
    ("BertForNextSentencePrediction", "next-sentence-prediction"),
])
def test_detected(architecture, task):
    assert tasks.detect({"architectures": [architecture]}) == task


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}])
def test_no_architecture(config):
    with pytest.raises(UsageError, match="names no architecture") as e:
        tasks.detect(config)
    assert e.value.hint == "--task T"


def test_a_head_of_no_known_task():
    with pytest.raises(UsageError, match="SamForMaskGeneration belongs to no task"):
        tasks.detect({"architectures": ["SamForMaskGeneration"]})


def test_a_generating_checkpoint_is_found_with_its_task(tiny):
    assert resolve(str(tiny("gpt2", "text-generation"))).task == "text-generation"


def test_an_unknown_task(tiny):
    with pytest.raises(UsageError, match="no task 'translate'") as e:
        resolve(str(tiny("bert")), task="translate")
    assert "fill-mask" in e.value.allowed
    assert "text-generation" in e.value.allowed


@pytest.mark.parametrize("task", tasks.TASKS)
def test_each_task_has_its_table_in_transformers(task):
    import transformers
    from transformers.models.auto import modeling_auto

    assert getattr(modeling_auto, tasks.TASKS[task].mapping)
    if tasks.TASKS[task].parts is None:
        assert hasattr(transformers, tasks.TASKS[task].auto)
