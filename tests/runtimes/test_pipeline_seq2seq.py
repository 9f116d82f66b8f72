"""Encoder-decoder artifacts generate what their source generates: ids, not only logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelport import checkpoints, load_pipeline, pipeline
from modelport.errors import DigestMismatch, ModelportError, UsageError
from transformers.cache_utils import DynamicCache

TEXT = ("t5", "mt5", "bart", "marian", "m2m_100")
KINDS = {**dict.fromkeys(TEXT, "text2text-generation"), "whisper": "automatic-speech-recognition"}

Opened = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="module")
def opened(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The exported model of a kind, and the reference, each made once."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            # Wide enough that inputs matter to the ids; the library's own generate fails where
            # the decoder has more layers than the encoder.
            options = ({"initializer_factor": 4.0, "num_decoder_layers": 2} if "t5" in kind
                       else {"init_std": 0.4})
            source = tiny(kind, KINDS[kind], **options)
            out = tmp_path_factory.mktemp(kind) / "out"
            pipeline.export("onnx", pipeline.ModelRequest(str(source)), out, validate=False)
            reference = checkpoints.load_reference(checkpoints.resolve(str(source))).module
            made[kind] = load_pipeline(out, threads=1), reference
        return made[kind]

    return get


def given(kind: str, batch: int, length: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * batch + length)
    if kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator)}
    ids = torch.randint(4, 90, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, -4:], mask[-1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def same(opened: Opened, kind: str, batch: int, **asked: Any) -> torch.Tensor:
    made, reference = opened(kind)
    prompt = given(kind, batch)
    torch.manual_seed(0)
    wanted = reference.generate(**prompt, **asked)
    torch.manual_seed(0)
    found = made.generate(**prompt, **asked)
    assert found.tolist() == wanted.tolist()
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_of_uneven_batches(kind: str, opened: Opened) -> None:
    rows = [row for batch in (1, 3, 4)
            for row in same(opened, kind, batch, max_new_tokens=16, min_new_tokens=16,
                            do_sample=False).tolist()]
    assert len({tuple(row) for row in rows}) > 1  # equal rows would prove nothing


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_seeded_samples(kind: str, opened: Opened) -> None:
    same(opened, kind, 3, max_new_tokens=12, num_beams=3, do_sample=False)
    one = same(opened, kind, 3, max_new_tokens=12, do_sample=True, temperature=1.5)
    assert len({tuple(row) for row in one.tolist()}) == 3


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_prompts_of_the_decoder(kind: str, opened: Opened) -> None:
    start = torch.tensor([[0, 0, 2, 17, 9], [0, 2, 5, 31, 40], [2, 8, 8, 50, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    same(opened, kind, 3, decoder_input_ids=start, decoder_attention_mask=mask,
         max_new_tokens=10, do_sample=False)
    same(opened, kind, 3, decoder_input_ids=start, max_new_tokens=10, do_sample=False)


def test_without_a_cache_and_with_more_sequences_than_prompts(opened: Opened) -> None:
    same(opened, "t5", 2, max_new_tokens=8, use_cache=False, do_sample=False)
    same(opened, "t5", 2, max_new_tokens=8, num_return_sequences=3, do_sample=True)


def test_logits_of_a_direct_call(opened: Opened) -> None:
    made, reference = opened("t5")
    tokens = torch.tensor([[0, 4, 8, 15], [0, 16, 23, 42]])
    with torch.no_grad():
        wanted = reference(**given("t5", 2), decoder_input_ids=tokens)
    found = made.model(**given("t5", 2), decoder_input_ids=tokens)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-3)
    assert found.past_key_values.get_seq_length() == 4


def test_streaming_and_stopping_are_the_librarys(opened: Opened) -> None:
    from transformers.generation import BaseStreamer, MaxTimeCriteria, StoppingCriteriaList

    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    made, _ = opened("bart")
    heard = Heard()
    found = made.generate(**given("bart", 1), max_new_tokens=9, do_sample=False, streamer=heard)
    assert heard.ids == found[0].tolist()
    assert heard.ended
    late = made.generate(**given("bart", 1), max_new_tokens=9, do_sample=False,
                         stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))
    assert late.shape[1] == 2


def test_text_in_and_text_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    from modelport.predict import generated
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    shutil.copytree(tiny("t5", "text2text-generation", initializer_factor=4.0), source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1",
                            unk_token="w2").save_pretrained(source)
    pipeline.export("onnx", pipeline.ModelRequest(str(source)), tmp_path / "out", validate=False)
    reference = checkpoints.load_reference(checkpoints.resolve(str(source))).module
    wanted = reference.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=6, do_sample=False)
    with load_pipeline(tmp_path / "out", threads=1) as made:
        answer = generated(made, "w7 w8 w9", {"max_new_tokens": 6, "do_sample": False}, seed=0,
                           audio=tmp_path / "none.wav")
        uneven = made.prompt(["w7 w8 w9", "w5"])
        assert uneven["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
        assert uneven["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        with pytest.raises(UsageError, match=r"input_ids has shape \[1, 0\]"):
            made.generate(**made.prompt([""]))
    said = [f"w{i}" for i in wanted[0].tolist() if i > 1]  # those that end and fill are not said
    assert answer["answer"].split() == said
    assert said


@pytest.fixture
def hearing(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Whisper with its feature extractor, exported: ten seconds are 40 frames."""
    source = tmp_path / "model"
    shutil.copytree(tiny("whisper", "automatic-speech-recognition", init_std=0.8), source)
    (source / "preprocessor_config.json").write_text(json.dumps({
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 10,
        "hop_length": 4000, "n_fft": 400, "sampling_rate": 16000}))
    request = pipeline.ModelRequest(str(source))
    pipeline.export("onnx", request, tmp_path / "out", validate=False)
    return tmp_path / "out"


def test_a_recording_is_heard_at_any_rate(
    hearing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command; the ids are those of the features that transformers computes."""
    from modelport import checkpoints, recordings
    from modelport.cli import execute
    from transformers import WhisperFeatureExtractor

    noise = np.random.default_rng(0).standard_normal(4 * 16000).cumsum()
    noise = (noise / np.abs(noise).max()).astype(np.float32)
    said = {}
    for rate in (16000, 48000):
        place = tmp_path / f"{rate}.wav"
        recordings.write(place, recordings.resampled(noise, 16000, rate), rate)
        asked = ["run", str(hearing), "--audio", str(place), "--max-new-tokens", "8", "--json"]
        assert execute(asked) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["recording"] == str(place)
        said[rate] = answer["answer"]
    features = WhisperFeatureExtractor.from_pretrained(hearing)(
        recordings.read(tmp_path / "16000.wav")[0], sampling_rate=16000, return_tensors="pt")
    reference = checkpoints.load_reference(checkpoints.resolve(str(tmp_path / "model"))).module
    wanted = reference.generate(features["input_features"], max_new_tokens=8)[0].tolist()
    assert said[16000] == wanted
    assert said[48000] == wanted
    assert len(set(wanted)) > 2
    assert execute(["run", str(hearing), "--audio", str(place), "--max-new-tokens", "4"]) == 0
    assert "(no tokenizer)" in capsys.readouterr().out


def test_what_is_not_heard_is_refused(
    hearing: Path, tmp_path: Path, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from modelport import recordings
    from modelport.cli import execute

    recordings.write(tmp_path / "long.wav", np.zeros(11 * 16000), 16000)
    (tmp_path / "other.mp3").write_bytes(b"ID3")
    for name, found in (("long.wav", "lasts 11.0 s, and the model hears 10 s"),
                        ("other.mp3", "no recording that can be read")):
        assert execute(["run", str(hearing), "--audio", str(tmp_path / name)]) == 2
        assert found in capsys.readouterr().err
    assert execute(["run", str(hearing), "--text", "hello"]) == 2
    assert "takes the features of a recording" in capsys.readouterr().err
    assert execute(["run", str(hearing)]) == 2
    assert "--text or --audio" in capsys.readouterr().err
    (hearing / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    assert execute(["run", str(hearing), "--audio", str(tmp_path / "long.wav")]) == 4
    capsys.readouterr()
    reads = tmp_path / "reads"
    request = pipeline.ModelRequest(str(tiny("gpt2", "text-generation")))
    pipeline.export("onnx", request, reads, validate=False)
    assert execute(["run", str(reads), "--audio", str(tmp_path / "long.wav")]) == 2
    assert "hears nothing" in capsys.readouterr().err


class TestSpeech:
    """Whisper's own ``generate``: languages, tasks, timestamps, recordings of any length."""

    @pytest.fixture
    def both(self, opened: Opened) -> tuple[Any, Any]:
        made, reference = opened("whisper")
        for model in (made.model, reference):
            config = model.generation_config
            config.is_multilingual = True
            config.lang_to_id = {"<|en|>": 90, "<|fr|>": 91}
            config.task_to_id = {"transcribe": 92, "translate": 93}
            config.no_timestamps_token_id, config.max_initial_timestamp_index = 94, 2
            config.return_timestamps = False
            config.prev_sot_token_id = 89
        return made, reference

    @pytest.mark.parametrize("asked", [
        {"language": "fr", "task": "translate"},
        {"language": "en", "return_timestamps": True},
        {"task": "transcribe"},  # the language is detected by a run of the model
        {"language": "en", "prompt_ids": torch.tensor([89, 12, 13])},
        {"language": "fr", "num_beams": 3},
    ])  # fmt: skip
    def test_forced_tokens_and_timestamps(self, asked: dict[str, Any], both: Any) -> None:
        made, reference = both
        features = given("whisper", 3)["input_features"]
        wanted = reference.generate(features, max_new_tokens=8, **asked)
        assert made.generate(features, max_new_tokens=8, **asked).tolist() == wanted.tolist()
        assert len({tuple(row) for row in wanted.tolist()}) > 1

    def test_a_recording_longer_than_the_window(self, both: Any) -> None:
        made, reference = both
        features = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(1))
        asked = {"attention_mask": torch.ones(2, 100, dtype=torch.int64), "language": "en",
                 "return_timestamps": True, "max_new_tokens": 8}
        wanted = reference.generate(features, **asked)
        assert made.generate(features, **asked).tolist() == wanted.tolist()

    def test_timestamps_of_words_need_attentions(self, both: Any) -> None:
        made, _ = both
        made.model.generation_config.alignment_heads = [[0, 0]]
        with pytest.raises(UsageError, match="does not take output_attentions"):
            made.generate(given("whisper", 1)["input_features"], max_new_tokens=4,
                          return_token_timestamps=True, language="en")


class TestRefused:
    def test_an_empty_row_an_empty_input_and_one_too_long(self, opened: Opened) -> None:
        made, _ = opened("bart")
        ids = torch.randint(4, 90, (2, 5))
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
        with pytest.raises(UsageError, match="row 1 of the batch is empty"):
            made.generate(ids, attention_mask=mask)
        with pytest.raises(UsageError, match=r"input_ids has shape \[2, 0\]"):
            made.generate(ids[:, :0], attention_mask=mask[:, :0])
        with pytest.raises(UsageError, match=r"input_ids has shape \[1, 41\]") as e:
            made.generate(torch.full((1, 41), 7))
        assert e.value.allowed == "sequence 1 to 40"

    def test_more_tokens_than_the_decoder_holds(self, opened: Opened) -> None:
        made, reference = opened("bart")
        prompt = given("bart", 1)
        with pytest.raises(UsageError, match="41 new tokens after 1 are more"):
            made.generate(**prompt, max_new_tokens=41)
        with pytest.raises(UsageError, match="37 new tokens after 5 are more"):
            made.generate(**prompt, max_new_tokens=37, decoder_input_ids=torch.full((1, 5), 7))
        longest = made.generate(**prompt, max_new_tokens=40, min_new_tokens=40)
        wanted = reference.generate(**prompt, max_new_tokens=40, min_new_tokens=40)
        assert longest.tolist() == wanted.tolist()

    def test_what_the_graphs_do_not_return(self, opened: Opened) -> None:
        made, _ = opened("bart")
        with pytest.raises(UsageError, match="does not take output_hidden_states"):
            made.generate(**given("bart", 1), max_new_tokens=4, output_hidden_states=True,
                          return_dict_in_generate=True)
        with pytest.raises(UsageError, match="does not take decoder_inputs_embeds"):
            made.model(**given("bart", 1), decoder_input_ids=torch.tensor([[2]]),
                       decoder_inputs_embeds=torch.zeros(1, 1, 32))

    def test_a_cache_of_fixed_size_and_a_past_of_another_length(self, opened: Opened) -> None:
        made, _ = opened("bart")
        with pytest.raises(UsageError, match="cache_implementation is 'static'"):
            made.generate(**given("bart", 1), max_new_tokens=4, cache_implementation="static")
        with pytest.raises(UsageError, match="the cache is a DynamicCache"):
            made.model(**given("bart", 1), decoder_input_ids=torch.tensor([[2]]),
                       past_key_values=DynamicCache())
        step = made.model(**given("bart", 2), decoder_input_ids=torch.tensor([[2, 7], [2, 8]]))
        kept = step.past_key_values
        with pytest.raises(UsageError, match="the cache has 2 layers"):
            made.model(**given("bart", 1), decoder_input_ids=torch.tensor([[2]]),
                       past_key_values=kept)
        with pytest.raises(UsageError, match=r"decoder_attention_mask has shape \[2, 2\]"):
            made.model(**given("bart", 2), decoder_input_ids=torch.tensor([[2], [2]]),
                       decoder_attention_mask=torch.ones(2, 2), past_key_values=kept)

    def test_features_of_another_length(self, opened: Opened) -> None:
        made, _ = opened("whisper")
        with pytest.raises(UsageError, match=r"input_features has shape \[1, 8, 39\]"):
            made.model(input_features=torch.zeros(1, 8, 39), decoder_input_ids=torch.tensor([[3]]))
        with pytest.raises(UsageError, match="takes the features of a recording"):
            made.prompt(["a text"])

    def test_a_component_tampered_with_or_missing(
        self, opened: Opened, tmp_path: Path
    ) -> None:
        import shutil

        made, _ = opened("t5")
        copy = tmp_path / "copy"
        shutil.copytree(made.artifact.root, copy)
        graph = copy / "cross.onnx"
        content = graph.read_bytes()
        graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DigestMismatch, match=r"cross\.onnx"):
            load_pipeline(copy)
        graph.unlink()
        with pytest.raises(ModelportError, match=r"cross\.onnx"):
            load_pipeline(copy)
