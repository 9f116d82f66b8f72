"""Decoder artifacts generate what their source generates: ids, whatever the way of choosing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelport import artifacts, checkpoints, load_pipeline, pipeline
from modelport.errors import DigestMismatch, UsageError

CONTEXT = 40  # of the tiny models


@pytest.fixture(scope="module")
def exported(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt2") / "out"
    source = tiny("gpt2", "text-generation", initializer_range=0.6)  # ids that follow the prompt
    pipeline.export("onnx", pipeline.ModelRequest(str(source)), out, validate=False)
    return out


@pytest.fixture(scope="module")
def opened(exported: Path) -> tuple[Any, Any]:
    source = artifacts.read(exported).manifest.source.model
    reference = checkpoints.load_reference(checkpoints.resolve(source)).module
    return load_pipeline(exported, threads=1), reference


def prompts(batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, 97, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :3], mask[-1, :-1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(opened: tuple[Any, Any], **asked: Any) -> tuple[Any, Any]:
    asked = {**prompts(), "max_new_tokens": 16, "pad_token_id": 0, **asked}
    answers = []
    for model in opened:
        torch.manual_seed(0)
        answers.append(model.generate(**asked))
    return answers[0], answers[1]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 40},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, **prompts(1)},
        {"use_cache": False},
        {"attention_mask": None, **{k: v for k, v in prompts(2).items() if k == "input_ids"}},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampled", "beams", "lookup", "no-cache", "no-mask", "processors"],
)
def test_the_same_ids_as_the_source(opened: tuple[Any, Any], asked: dict[str, Any]) -> None:
    found, wanted = both(opened, **asked)
    assert found.tolist() == wanted.tolist()
    assert len({tuple(row[7:]) for row in wanted.tolist()}) > 1 or len(wanted) == 1


def test_streamed_ids_come_one_by_one(opened: tuple[Any, Any]) -> None:
    class Collector:
        def __init__(self) -> None:
            self.heard: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.heard.append(value.flatten().tolist())

        def end(self) -> None:
            self.heard.append([])

    collector = Collector()
    found = opened[0].generate(**prompts(1), max_new_tokens=5, pad_token_id=0, streamer=collector)
    assert [len(part) for part in collector.heard] == [7, 1, 1, 1, 1, 1, 0]
    assert sum(collector.heard, []) == found[0].tolist()  # noqa: RUF017


def test_a_cache_that_was_returned_goes_on(opened: tuple[Any, Any]) -> None:
    given = prompts(1)
    first = opened[0].generate(
        **given, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True
    )
    further = {"input_ids": first.sequences, "max_new_tokens": 5, "pad_token_id": 0}
    calls: list[int] = []
    session = opened[0].sessions["decoder"]
    run = session.run_tensors

    def counted(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(feeds["input_ids"].shape[1])
        return run(feeds)

    session.run_tensors = counted
    try:
        found = opened[0].generate(**further, past_key_values=first.past_key_values)
    finally:
        del session.run_tensors
    assert calls == [1, 1, 1, 1, 1]  # nothing of the prompt is computed again
    assert found.tolist() == opened[1].generate(**further).tolist()


def test_the_cache_stays_in_the_runtimes_memory(opened: tuple[Any, Any]) -> None:
    """What a step returns is what the next reads: the same addresses, without a copy."""
    session = opened[0].sessions["decoder"]
    run = session.run_tensors
    given: list[set[int]] = []
    returned: list[set[int]] = []

    def watched(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = run(feeds)
        given.append({t.data_ptr() for name, t in feeds.items() if name.startswith("past_")})
        returned.append({t.data_ptr() for n, t in outputs.items() if n.startswith("present_")})
        return outputs

    session.run_tensors = watched
    try:
        opened[0].generate(**prompts(), max_new_tokens=4, pad_token_id=0)
    finally:
        del session.run_tensors
    assert given[1:] == returned[:-1]


def test_it_holds_no_weights(opened: tuple[Any, Any]) -> None:
    assert {p.device.type for p in opened[0].model.parameters()} == {"meta"}
    assert opened[0].model.device.type == "cpu"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (prompts(1, CONTEXT + 1), f"{CONTEXT + 1} tokens are more than the context holds"),
        ({"max_new_tokens": CONTEXT}, "7 tokens and 40 new ones are more than the context"),
        ({"max_new_tokens": None, "max_length": 99}, "7 tokens and 92 new ones"),
        ({"attention_mask": torch.tensor([[1] * 7, [0] * 7, [1] * 7])}, "prompt 1 .* is empty"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "asks for contrastive search"),
        ({"dola_layers": "high"}, "asks for dola generation"),
        ({"num_beams": 4, "num_beam_groups": 2}, "asks for group beam search"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "asks for constrained beam search"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "take output_attentions"),
    ],
    ids=["prompt", "new-tokens", "max-length", "empty-row", "no-tokens", "cache", "quantised",
         "contrastive", "dola", "groups", "words", "attentions"],
)
def test_what_it_cannot_honour_is_refused(
    opened: tuple[Any, Any], asked: dict[str, Any], found: str
) -> None:
    with pytest.raises(UsageError, match=found) as caught:
        opened[0].generate(**{**prompts(), "max_new_tokens": 4, "pad_token_id": 0, **asked})
    assert caught.value.allowed


def test_a_past_of_the_wrong_length_is_refused(opened: tuple[Any, Any]) -> None:
    given = prompts(1)
    made = opened[0].model(**given)
    with pytest.raises(UsageError, match=r"attention_mask has shape \[1, 9\]") as caught:
        opened[0].model(
            input_ids=given["input_ids"][:, :1], attention_mask=torch.ones(1, 9, dtype=torch.int64),
            past_key_values=made.past_key_values,
        )  # fmt: skip
    assert "[1, 8]" in caught.value.allowed
    other = opened[0].model(**prompts(3))
    with pytest.raises(UsageError, match="the cache has 2 layers of shape"):
        opened[0].model(
            input_ids=given["input_ids"][:, :1], past_key_values=other.past_key_values
        )


def test_a_context_that_is_full_is_no_silent_cut(opened: tuple[Any, Any]) -> None:
    made = opened[0].model(input_ids=prompts(1, CONTEXT)["input_ids"])
    with pytest.raises(UsageError, match="41 tokens are more than the context holds"):
        opened[0].model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=made.past_key_values
        )


@pytest.mark.parametrize("damage", ["missing", "changed", "weights"])
def test_a_damaged_component_is_refused_before_it_is_opened(
    exported: Path, damage: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    file = copy / ("model.safetensors" if damage == "weights" else "decoder.onnx")
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(DigestMismatch) as caught:
        load_pipeline(copy)
    assert caught.value.exit_code == 4


def test_one_graph_does_not_generate(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), out, validate=False)
    with pytest.raises(UsageError, match="is one graph, which does not generate"):
        load_pipeline(out)


def test_several_graphs_are_no_single_session(exported: Path) -> None:
    with pytest.raises(UsageError, match="is several graphs: decoder") as caught:
        pipeline.open_artifact(exported)
    assert "load_pipeline" in caught.value.hint


def test_tied_weights_are_stored_once(exported: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "np") as weights:
        shapes = [tuple(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
    assert shapes.count((99, 32)) == 1


@pytest.mark.parametrize("kind", ["openai-gpt", "xlnet"])
def test_a_model_without_a_cache_reads_its_text_again_or_keeps_hidden_states(
    kind: str, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    source = tiny(kind, "text-generation", initializer_range=0.6)
    artifact = pipeline.export("onnx", pipeline.ModelRequest(str(source)), tmp_path / "out",
                               validate=False)
    reference = checkpoints.load_reference(checkpoints.resolve(str(source))).module
    with load_pipeline(artifact.root, threads=1) as found:
        for asked in ({}, {"num_beams": 3}, {"do_sample": True}):
            ours, theirs = both((found, reference), **asked)
            assert ours.tolist() == theirs.tolist()
        with pytest.raises(UsageError, match="more than the context holds"):
            found.generate(torch.ones(1, CONTEXT + 1, dtype=torch.int64), max_new_tokens=2)


def test_an_empty_mapping_asks_for_nothing(opened: tuple[Any, Any]) -> None:
    found, _ = opened
    ids = torch.ones(1, 2, dtype=torch.int64)
    assert found.model(input_ids=ids, mm_encoder_outputs={}).logits.shape[1] == 2
    with pytest.raises(UsageError, match="does not take mm_encoder_outputs"):
        found.model(input_ids=ids, mm_encoder_outputs={"image": ids})
