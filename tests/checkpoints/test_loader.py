"""The weightless module, filled from its references, is the module that transformers loads."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from modelport.checkpoints import load, load_reference, resolve
from modelport.errors import CheckpointError, UsageError
from safetensors import safe_open

HEADS = [
    ("bert", "feature-extraction"), ("bert", "text-classification"),
    ("electra", "token-classification"), ("deberta-v2", "question-answering"),
    ("bert", "multiple-choice"), ("wav2vec2", "feature-extraction"),
    ("vit", "feature-extraction"), ("xlm-roberta", "multiple-choice"),
]


def filled(loaded):
    """The module with each parameter read from where ``weights`` says it lies."""
    names = {ref: name for name, ref in loaded.checkpoint.tensors.items()}
    state = {}
    for name, ref in loaded.weights.items():
        with safe_open(ref.file, "pt") as file:
            state[name] = file.get_tensor(names[ref])
    own = loaded.module.state_dict()
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    loaded.module.load_state_dict(state, strict=True, assign=True)
    return loaded.module


def run(module, feeds):
    with torch.no_grad():
        return module(*(torch.from_numpy(v) for v in feeds.values()))


@pytest.mark.parametrize(("kind", "task"), [*tiny_models.TASKS.items(), *HEADS])
def test_filled_from_references_it_equals_what_transformers_loads(tiny, kind, task):
    checkpoint = resolve(str(tiny(kind, task)))
    loaded = load(checkpoint, attention="eager")
    reference = load_reference(checkpoint)
    assert checkpoint.task == task
    assert loaded.spec == reference.spec
    assert set(loaded.weights) == set(loaded.module.state_dict())
    outputs, expected = run(filled(loaded), loaded.samples), run(reference.module, loaded.samples)
    for name, one, other in zip(loaded.spec.output_names, outputs, expected, strict=True):
        assert torch.equal(one, other), name
        assert torch.isfinite(other).all()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "wav2vec2"])
def test_no_parameter_takes_memory(tiny, kind):
    loaded = load(resolve(str(tiny(kind))))
    for name, parameter in loaded.module.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.element_size(), name


def test_non_persistent_buffers_have_their_values(tiny):
    loaded = load(resolve(str(tiny("bert"))))
    buffers = dict(loaded.module.named_buffers())
    assert buffers["model.bert.embeddings.position_ids"].tolist() == [list(range(40))]


def test_stored_buffers_have_their_values(tiny):
    checkpoint = resolve(str(tiny("resnet")))
    loaded, reference = load(checkpoint), load_reference(checkpoint)
    expected = dict(reference.module.named_buffers())
    found = dict(loaded.module.named_buffers())
    assert {n.rpartition(".")[2] for n in found} >= {"running_mean", "running_var"}
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_tied_parameters_are_one_object_with_one_reference(tiny):
    loaded = load(resolve(str(tiny("camembert"))))
    model = loaded.module.model
    embedding = model.roberta.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.weight is embedding
    assert (loaded.weights["model.lm_head.decoder.weight"]
            == loaded.weights["model.roberta.embeddings.word_embeddings.weight"])


def test_a_tied_pair_stored_twice_is_tied(tiny, tmp_path):
    source = tiny("camembert")
    twice = tiny_models.rewritten(source, tmp_path / "twice", lambda s: {
        **s, "lm_head.decoder.weight": s["roberta.embeddings.word_embeddings.weight"].clone()})
    model = load(resolve(str(twice))).module.model
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


def test_a_pair_stored_with_different_values_is_not_tied(tiny, tmp_path):
    apart = tiny_models.rewritten(tiny("camembert"), tmp_path / "apart", lambda s: {
        **s, "lm_head.decoder.weight": s["roberta.embeddings.word_embeddings.weight"] + 1})
    checkpoint = resolve(str(apart))
    loaded, reference = load(checkpoint, attention="eager"), load_reference(checkpoint)
    one, = run(filled(loaded), loaded.samples)
    other, = run(reference.module, loaded.samples)
    assert torch.equal(one, other)
    assert (loaded.weights["model.lm_head.decoder.weight"]
            == checkpoint.tensors["lm_head.decoder.weight"])


def test_names_of_old_checkpoints(tiny, tmp_path):
    def old(state):
        return {k.replace("LayerNorm.weight", "LayerNorm.gamma")
                 .replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in state.items()}

    loaded = load(resolve(str(tiny_models.rewritten(tiny("bert"), tmp_path / "old", old))))
    ref = loaded.weights["model.bert.embeddings.LayerNorm.weight"]
    assert ref == loaded.checkpoint.tensors["bert.embeddings.LayerNorm.gamma"]


def test_a_base_model_from_a_checkpoint_with_a_head(tiny):
    checkpoint = resolve(str(tiny("bert")), task="feature-extraction")
    loaded = load(checkpoint)
    assert loaded.spec.output_names == ("last_hidden_state",), "no pooler is stored"
    assert load_reference(checkpoint).spec == loaded.spec
    assert (loaded.weights["model.embeddings.word_embeddings.weight"]
            == checkpoint.tensors["bert.embeddings.word_embeddings.weight"])


def test_a_base_model_from_a_checkpoint_for_generation(tiny):
    checkpoint = resolve(str(tiny("gpt2", "text-generation")), task="feature-extraction")
    assert load(checkpoint).spec.output_names == ("last_hidden_state",)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half_precision_loaded_in_single(tiny, dtype):
    checkpoint = resolve(str(tiny("bert", dtype=dtype)))
    loaded, reference = load(checkpoint, attention="eager"), load_reference(checkpoint)
    assert {ref.dtype for ref in loaded.weights.values()} == {dtype}
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.module.parameters()} == {torch.float32}
    assert torch.equal(run(filled(loaded), loaded.samples)[0],
                       run(reference.module, loaded.samples)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_asked_for(tiny, dtype):
    checkpoint = resolve(str(tiny("vit")))
    loaded, reference = load(checkpoint, dtype=dtype), load_reference(checkpoint, dtype=dtype)
    assert loaded.spec == reference.spec
    assert loaded.spec.inputs[0].dtype == loaded.spec.outputs[0].dtype == dtype
    for model in (loaded, reference):
        assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    assert loaded.samples["pixel_values"].dtype.name == dtype


def test_shards(tiny):
    checkpoint = resolve(str(tiny("bert", shards=3)))
    files = {ref.file.name for ref in checkpoint.tensors.values()}
    assert len(files) >= 3
    loaded, reference = load(checkpoint, attention="eager"), load_reference(checkpoint)
    assert torch.equal(run(filled(loaded), loaded.samples)[0],
                       run(reference.module, loaded.samples)[0])


def test_a_parameter_that_transformers_computes_is_converted_once(tmp_path):
    directory = tiny_models.build("mixtral", "feature-extraction", tmp_path / "mixture")
    checkpoint = resolve(str(directory), task="feature-extraction")
    loaded, reference = load(checkpoint, attention="eager"), load_reference(checkpoint)
    files = {ref.file for ref in loaded.weights.values()}
    assert len(files) == 1
    assert "converted" in next(iter(files)).parts
    state, expected = {}, reference.module.state_dict()
    for name, ref in loaded.weights.items():
        raw = np.fromfile(ref.file, np.float32, ref.nbytes // 4, offset=ref.offset)
        state[name] = torch.from_numpy(raw).reshape(ref.shape)
    assert set(state) == set(expected)
    assert all(torch.equal(state[n], expected[n]) for n in expected)
    before = next(iter(files)).stat().st_mtime_ns
    load(checkpoint)
    assert next(iter(files)).stat().st_mtime_ns == before


def test_a_head_that_is_not_stored_is_not_drawn_by_a_conversion(tmp_path):
    directory = tiny_models.build("mixtral", "feature-extraction", tmp_path / "mixture")
    checkpoint = resolve(str(directory), task="text-classification")
    with pytest.raises(UsageError, match=r"text-classification.*score\.weight") as e:
        load(checkpoint)
    assert e.value.allowed == "feature-extraction"


def test_a_conversion_refuses_what_is_not_finite(tmp_path):
    directory = tiny_models.build("mixtral", "feature-extraction", tmp_path / "mixture")
    name = next(n for n in tiny_models.tensors(directory) if "experts" in n)
    broken = tiny_models.with_nan(directory, tmp_path / "nan", name)
    with pytest.raises(CheckpointError, match=r"NaN or infinity: .*experts"):
        load(resolve(str(broken), task="feature-extraction"))


MINE = """
from transformers import MixtralModel
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel


class Mine(MixtralPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = MixtralModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return {"last_hidden_state": states.last_hidden_state}
"""


def test_a_conversion_heeds_the_config_and_the_python_of_the_checkpoint(tmp_path):
    directory = tiny_models.build("mixtral", "text-generation", tmp_path / "mixture")

    def converted(**options):
        model = load(resolve(str(directory), task="feature-extraction", **options))
        (file,) = {ref.file for ref in model.weights.values()}
        assert "converted" in file.parts
        return type(model.module.model).__name__, file

    files = {converted(), converted()}
    assert len(files) == 1
    tiny_models.edit_config(directory, rms_norm_eps=1e-3)
    files.add(converted())
    tiny_models.edit_config(directory, auto_map={"AutoModel": "modeling_mine.Mine"})
    for more in ("", "# edited"):
        (directory / "modeling_mine.py").write_text(MINE + more)
        files.add(converted(trust_remote_code=True))
    assert [name for name, _ in files].count("Mine") == 2
    assert len({file for _, file in files}) == 4


def test_a_row_of_padding_that_transformers_sets_to_zero(tmp_path):
    import transformers

    config = transformers.FunnelConfig(
        vocab_size=40, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8,
        d_inner=24, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.FunnelModel(config).eval()
    assert model.embeddings.word_embeddings.weight.detach()[1:].any()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = 1.0
    model.save_pretrained(tmp_path / "model")
    checkpoint = resolve(str(tmp_path / "model"), task="feature-extraction")
    loaded, reference = load(checkpoint, attention="eager"), load_reference(checkpoint)
    name = "model.embeddings.word_embeddings.weight"
    ref, expected = loaded.weights[name], reference.module.state_dict()[name]
    raw = np.fromfile(ref.file, np.float32, ref.nbytes // 4, offset=ref.offset)
    assert torch.equal(torch.from_numpy(raw).reshape(ref.shape), expected)


def test_a_head_that_is_not_stored(tiny):
    checkpoint = resolve(str(tiny("bert")), task="text-classification")
    for how in (load, load_reference):
        with pytest.raises(UsageError, match=r"text-classification.*classifier") as e:
            how(checkpoint)
        assert e.value.exit_code == 2
        assert "fill-mask" in e.value.allowed
        assert "feature-extraction" in e.value.allowed
        assert "classification" not in e.value.allowed


def test_a_task_the_model_type_does_not_have(tiny):
    with pytest.raises(UsageError, match="no image-classification class for bert") as e:
        load(resolve(str(tiny("bert")), task="image-classification"))
    assert "fill-mask" in e.value.allowed


def test_weights_of_another_size_than_the_config(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("bert"), tmp_path / "copy", lambda s: s)
    tiny_models.edit_config(copy, intermediate_size=41)
    for how in (load, load_reference):
        with pytest.raises(CheckpointError, match=r"stored as \[37.*makes it \[41"):
            how(resolve(str(copy)))


def test_an_unknown_model_type(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("bert"), tmp_path / "copy", lambda s: s)
    tiny_models.edit_config(copy, model_type="no-such-model")
    with pytest.raises(CheckpointError, match="can't read"):
        load(resolve(str(copy)))


def test_a_quantized_checkpoint(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("bert"), tmp_path / "copy", lambda s: s)
    tiny_models.edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match="quantized already"):
        load(resolve(str(copy)))


def test_an_unused_nan_is_no_error_and_a_used_one_is_named(tiny, tmp_path):
    name = "bert.encoder.layer.1.output.dense.weight"
    broken = tiny_models.with_nan(tiny("bert"), tmp_path / "nan", name)
    loaded = load(resolve(str(broken)))
    with pytest.raises(CheckpointError, match=rf"NaN or infinity: {name} \(4\)") as e:
        _ = loaded.source
    assert e.value.exit_code == 2
    head = tiny_models.with_nan(tiny("bert"), tmp_path / "head", "cls.predictions.bias")
    assert load(resolve(str(head), task="feature-extraction")).source.digest


def test_nothing_reaches_stdout_or_stderr(tiny, capfd):
    checkpoint = resolve(str(tiny("camembert")), task="feature-extraction")
    load(checkpoint)
    load_reference(checkpoint)
    assert capfd.readouterr() == ("", "")


def test_transformers_is_left_as_it_was(tiny):
    from transformers import core_model_loading
    from transformers.utils import logging

    before = core_model_loading.WeightConverter.convert, logging.get_verbosity()
    load(resolve(str(tiny("bert"))))
    assert before == (core_model_loading.WeightConverter.convert, logging.get_verbosity())
