"""Inputs, outputs and ranges are derived from the model, and hold when it is run."""

from __future__ import annotations

import functools
import itertools
import json
import logging

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from modelport.checkpoints import inputs, load, load_reference, probe, resolve, samples, tasks
from modelport.checkpoints.facts import Facts
from modelport.errors import UsageError
from modelport.spec import Dim, ModelSpec, TensorSpec

TEXT = ("batch", "sequence")


def spec_of(directory, **options):
    return load(resolve(str(directory), **options)).spec


def test_token_types_only_where_the_model_uses_them(tiny):
    assert spec_of(tiny("bert")).input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert spec_of(tiny("camembert")).input_names == ("input_ids", "attention_mask")
    assert spec_of(tiny("distilbert")).input_names == ("input_ids", "attention_mask")


def test_token_types_where_the_tokenizer_makes_them(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("camembert"), tmp_path / "copy", lambda s: s)
    (copy / "tokenizer_config.json").write_text(json.dumps(
        {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}))
    segments = spec_of(copy).inputs[2]
    assert (segments.name, segments.high) == ("token_type_ids", 1)


def test_roles_bounds_and_padding(tiny):
    ids, mask, segments = spec_of(tiny("bert")).inputs
    assert (ids.role, ids.high, ids.pad, ids.shape) == ("tokens", 99, 0, TEXT)
    assert (mask.role, segments.role, segments.high) == ("mask", "segments", 2)


@pytest.mark.parametrize(("kind", "longest"), [
    ("bert", 40), ("distilbert", 40), ("gpt2", 40), ("deberta-v2", 40),
    ("roberta", 38), ("camembert", 38), ("xlm-roberta", 38), ("mpnet", 38)])
def test_the_longest_sequence_is_the_longest_that_runs(tiny, kind, longest):
    reference = load_reference(resolve(str(tiny(kind))))
    assert reference.spec.dims["sequence"].max == longest
    probe_at(reference, longest)
    if kind != "deberta-v2":  # its positions are relative: any length runs
        with pytest.raises((IndexError, RuntimeError)):
            probe_at(reference, longest + 1)


def probe_at(reference, length):
    with torch.no_grad():
        reference.module(*probe._feeds(reference.spec.inputs, length).values())


def test_the_tokenizer_may_allow_less(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("bert"), tmp_path / "copy", lambda s: s)
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 24}')
    assert spec_of(copy).dims["sequence"] == Dim(1, 24, 24)
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert spec_of(copy).dims["sequence"].max == 40


def test_a_model_that_halves_the_sequence_says_how_many_tokens_it_needs(tmp_path):
    import transformers

    config = transformers.FunnelConfig(
        vocab_size=99, d_model=16, n_head=2, d_head=8, d_inner=20, block_sizes=[1, 1, 1])
    transformers.FunnelModel(config).save_pretrained(tmp_path / "funnel")
    assert spec_of(tmp_path / "funnel").dims["sequence"].min == 5


def test_ranges_can_be_overridden(tiny):
    loaded = load(resolve(str(tiny("bert"))), dims={"batch": Dim(1, 2, 4), "unknown": Dim(1, 1, 1)})
    assert loaded.spec.dims == {"batch": Dim(1, 2, 4), "sequence": Dim(1, 40, 40)}


def test_choices_are_a_dimension(tiny):
    spec = spec_of(tiny("bert", "multiple-choice"))
    assert spec.inputs[0].shape == ("batch", "choices", "sequence")
    assert spec.outputs[0].shape == ("batch", "choices")


def test_images(tiny):
    spec = spec_of(tiny("vit"))
    assert spec.inputs == (TensorSpec("pixel_values", "float32", ("batch", 3, 12, 12), "pixels"),)
    assert set(spec.dims) == {"batch"}


def test_audio_frames_are_a_dimension_of_the_outputs(tiny):
    spec = spec_of(tiny("wav2vec2", "feature-extraction"))
    assert spec.inputs[0].shape == ("batch", "samples")
    assert spec.outputs[0].shape == ("batch", "frames", 32)
    assert spec.dims["samples"] == Dim(645, 16_000, 160_000)
    assert spec.dims["frames"] == Dim(2, 49, 499)


def test_an_encoder_decoder_takes_both_sides(tiny):
    spec = spec_of(tiny("t5"))
    assert spec.input_names == ("input_ids", "attention_mask", "decoder_input_ids")
    assert [t.shape[1] for t in spec.outputs] == ["target", "sequence"]


@pytest.mark.parametrize("kind", [
    kind for kind, task in tiny_models.TASKS.items() if not tasks.TASKS[task].parts])
def test_outputs_have_the_shapes_that_the_spec_says(tiny, kind):
    reference = load_reference(resolve(str(tiny(kind))))
    spec, feeds = reference.spec, reference.samples
    sizes = spec.check(feeds)
    with torch.no_grad():
        outputs = reference.module(*(torch.from_numpy(f) for f in feeds.values()))
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        assert str(value.dtype) == f"torch.{tensor.dtype}"
        for dim, size in zip(tensor.shape, value.shape, strict=True):
            if isinstance(dim, int) or dim in sizes:
                assert sizes.get(dim, dim) == size, (tensor, tuple(value.shape))


@pytest.mark.parametrize(("kind", "task"), [
    *tiny_models.TASKS.items(), ("bert", "multiple-choice")])
def test_samples(tiny, kind, task):
    loaded = load(resolve(str(tiny(kind, task))))
    sizes = loaded.spec.check(loaded.samples)
    assert all(size >= 2 for size in sizes.values())
    assert len(set(sizes.values())) == len(sizes)
    mask = loaded.samples.get("attention_mask")
    if mask is None:
        return
    assert 0 < mask.mean() < 1
    assert (np.diff(mask, axis=-1) <= 0).all(), "padding is on the right"
    assert mask.any(axis=-1).all(), "no row is empty"
    ids, pad = loaded.samples["input_ids"], loaded.spec.inputs[0].pad
    assert ids.max() < loaded.spec.inputs[0].high
    if pad is not None:
        assert ((ids == pad) == (mask == 0)).all()


def test_boxes_are_boxes():
    spec = ModelSpec((TensorSpec("bbox", "int64", (*TEXT, 4), "boxes", high=100),), (),
                     {"batch": Dim(1, 2, 8), "sequence": Dim(1, 9, 40)})
    boxes = samples.example(spec)["bbox"]
    assert (boxes[..., 0] <= boxes[..., 2]).all()
    assert (boxes[..., 1] <= boxes[..., 3]).all()
    assert 0 <= boxes.min() <= boxes.max() < 100


def test_layout_models_get_boxes(tmp_path):
    import transformers

    config = transformers.LayoutLMConfig(**tiny_models.CONFIGS["bert"],
                                         max_2d_position_embeddings=64)
    transformers.LayoutLMForTokenClassification(config).save_pretrained(tmp_path / "layout")
    spec = spec_of(tmp_path / "layout")
    assert spec.inputs[1] == TensorSpec("bbox", "int64", (*TEXT, 4), "boxes", high=64)


@pytest.mark.parametrize(("low", "high"), list(itertools.product((1, 2, 3), (3, 4, 9))))
def test_sizes_stay_in_range_and_differ_between_steps(low, high):
    dims = {"batch": Dim(low, low, high), "sequence": Dim(low, low, high + 8)}
    one, two = samples.sizes(dims), samples.sizes(dims, step=1)
    for chosen in (one, two):
        assert all(max(2, dims[n].min) <= s <= dims[n].max for n, s in chosen.items())
    assert all(one[n] != two[n] for n, dim in dims.items() if max(2, dim.min) < dim.max)


def test_a_range_below_the_usual_sizes_is_sampled_far_apart():
    """Or a length that strides divide by four would seem not to change."""
    dims = {"batch": Dim(1, 8, 64), "frames": Dim(1, 32, 32)}
    assert [samples.sizes(dims, step)["frames"] for step in (0, 1)] == [32, 16]


class _Base(torch.nn.Module):
    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        import transformers

        self.config = transformers.BertConfig(**tiny_models.CONFIGS["bert"])


def test_inputs_that_nobody_can_derive(tmp_path):
    class Strange(_Base):
        def forward(self, input_ids, graph_edges, spin=None):
            return {"out": input_ids}

    with pytest.raises(UsageError, match="can't be derived: graph_edges") as e:
        inputs.derive(Strange(), tmp_path, "feature-extraction", "float32")
    assert e.value.exit_code == 2


def test_a_forward_that_fails_on_everything(tmp_path):
    class Failing(_Base):
        def forward(self, input_ids, attention_mask=None):
            raise ValueError("needs a graph")

    with pytest.raises(UsageError, match="needs a graph"):
        inputs.derive(Failing(), tmp_path, "feature-extraction", "float32")


def test_none_of_the_inputs_is_known(tmp_path):
    class Other(_Base):
        def forward(self, graph=None):
            return {"out": graph}

    with pytest.raises(UsageError, match="none of the inputs of Other is known: graph"):
        inputs.derive(Other(), tmp_path, "feature-extraction", "float32")


def test_a_branch_on_data_is_run_with_data(tmp_path):
    class Branching(_Base):
        def forward(self, input_ids, attention_mask=None):
            if bool((input_ids > 0).any()):
                return {"last": input_ids.float(), "past_key_values": (), "hidden_states": None}
            raise ValueError("no data")

    derived = inputs.derive(Branching(), tmp_path, "feature-extraction", "float32")
    assert derived.spec.outputs == (TensorSpec("last", "float32", TEXT),)


class Remembering(torch.nn.Module):
    """Keeps a table it computed once, in two ways that transformers' models do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0))
        self.kept = {}

    def forward(self, input_ids):
        if "table" not in self.kept:
            self.kept["table"] = self.weight[torch.arange(3)]
        table = self.kept["table"] + self.added(3)
        return {"last_hidden_state": input_ids[..., None] * table + counted(3)}

    @staticmethod
    @functools.lru_cache
    def added(count):
        return torch.ones(count)


@functools.lru_cache
def counted(count):
    return torch.arange(count)


def test_what_a_module_keeps_of_a_run_without_data_is_forgotten():
    model = Remembering()
    ids = (TensorSpec("input_ids", "int64", TEXT, "tokens", high=9),)
    dims = {"batch": Dim(1, 2, 4), "sequence": Dim(1, 3, 8)}
    (found,), _ = probe.outputs(model, ids, dims, {})
    assert found.shape == (*TEXT, 3)
    assert model.kept == {}
    assert type(counted(3)) is torch.Tensor
    assert type(model.added(3)) is torch.Tensor


class Halving(torch.nn.Module):
    """Takes four tokens at least."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(7))

    def forward(self, input_ids):
        pooled = torch.nn.functional.max_pool1d(input_ids[..., 0, :].float(), 4)
        return {"logits": pooled.mean(-1, keepdim=True) * self.weight}


def test_the_shortest_text_is_found_beside_choices_of_any_number():
    text = ("batch", "choices", "sequence")
    ids = (TensorSpec("input_ids", "int64", text, "tokens", high=9),)
    dims = {"batch": Dim(1, 2, 4), "choices": Dim(2, 4, 16), "sequence": Dim(1, 9, 30)}
    _, found = probe.outputs(Halving(), ids, dims, {})
    assert found["sequence"].min == 4


class Counts(torch.nn.Module):
    """As many answers for each text as the first run has texts, and as it has tokens."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(7))

    def forward(self, input_ids):
        tokens = input_ids[..., None] * self.weight
        share = tokens.mean((1, 2)).sigmoid()
        return {"tokens": tokens, "two": torch.stack([1 - share, share], -1),
                "three": torch.stack([share] * 3, -1), "layers": torch.stack([tokens[:, 0]] * 3, 1)}


def test_few_answers_are_no_batch_and_no_sequence():
    ids = (TensorSpec("input_ids", "int64", TEXT, "tokens", high=9),)
    found, _ = probe.outputs(Counts(), ids, {"batch": Dim(1, 8, 64), "sequence": Dim(1, 9, 30)}, {})
    assert {t.name: t.shape for t in found} == {
        "tokens": (*TEXT, 7), "two": ("batch", 2), "three": ("batch", 3),
        "layers": ("batch", 3, 7)}


def test_a_video_is_a_row_of_images(tmp_path):
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=37, decoder_num_hidden_layers=1)
    found = inputs.derive(transformers.VideoMAEModel(config).eval(), tmp_path,
                          "feature-extraction", "float32")
    assert found.spec.inputs[0].shape == ("batch", 4, 3, 32, 32)


def test_characters_are_the_vocabulary_where_there_is_no_other(tmp_path):
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37)
    facts = Facts.of(transformers.CanineModel(config), tmp_path, "float32")
    assert facts.vocabulary == 0x110000


def test_frames_are_as_wide_as_the_projection_that_reads_them(tmp_path):
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37,
        feature_projection_input_dim=24)
    facts = Facts.of(transformers.Wav2Vec2BertModel(config), tmp_path, "float32")
    assert facts.feature_size == 24


@pytest.mark.parametrize("small", [True, False])
def test_a_run_goes_the_other_way_where_one_fails(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SMALL", 64 if small else 0)
    module, tried = torch.nn.Linear(2, 2), []

    def run(with_data: bool) -> bool:
        tried.append(with_data)
        value = module(torch.ones(1, 2))
        assert (type(value) is torch.Tensor) is with_data
        if len(tried) == 1:
            raise RuntimeError("not this way")
        return with_data

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.setLevel(logging.NOTSET)
    assert probe.whichever(module, run) is not small
    assert logger.level == logging.NOTSET
    assert tried == [small, not small]

    def refused(with_data: bool) -> None:
        tried.append(with_data)
        raise UsageError("never mind")

    tried.clear()
    with pytest.raises(UsageError):
        probe.whichever(module, refused)
    assert tried == [small]
