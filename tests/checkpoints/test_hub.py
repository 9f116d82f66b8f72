"""Models from a hub: a real download from a small server on this machine, and no answer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models

_file = Path(__file__).with_name("hub_server.py")
_spec = importlib.util.spec_from_file_location("hub_server", _file)
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

ASK = """
import json, sys
from modelport.checkpoints import resolve
from modelport.errors import ModelportError
try:
    c = resolve(sys.argv[1], **json.loads(sys.argv[2]))
except ModelportError as error:
    print(json.dumps({"error": type(error).__name__, "code": error.exit_code, "text": str(error)}))
else:
    s = c.source
    print(json.dumps({"root": str(c.root), "revision": s.revision, "digest": s.digest,
                      "task": s.task, "files": sorted(p.name for p in c.root.iterdir()),
                      "weights": s.weights, "pickle": s.pickle}))
"""


@pytest.fixture
def ask(tmp_path):
    """Resolve in a process of its own: huggingface_hub reads its environment once, on import."""

    def run(model, environment=None, **options):
        variables = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **(environment or {})}
        done = subprocess.run([sys.executable, "-c", ASK, model, json.dumps(options)], text=True,
                              env=variables, capture_output=True, check=True, timeout=60)
        return json.loads(done.stdout)

    return run


@pytest.fixture
def repository(tiny, tmp_path):
    copy = tiny_models.rewritten(tiny("bert"), tmp_path / "repository", lambda s: s)
    (copy / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    for name in ("README.md", "pytorch_model.bin", "tf_model.h5", "setup.py"):
        (copy / name).write_text("not wanted")
    return copy


def test_downloads_config_tokenizer_and_safetensors_of_one_commit(ask, repository):
    with hub_server.serve("owner/tiny", repository) as hub:
        got = ask("owner/tiny", {"HF_ENDPOINT": hub.url})
        assert got["revision"] == hub_server.COMMIT
        assert got["task"] == "fill-mask"
        assert got["files"] == ["config.json", "model.safetensors", "vocab.txt"]
        asked = " ".join(hub.requests)
        assert "pytorch_model.bin" not in asked
        assert "README" not in asked
    # The hub is gone now: the cache answers, to the name and to the commit.
    for options in ({}, {"revision": hub_server.COMMIT}):
        assert ask("owner/tiny", {"HF_ENDPOINT": hub.url}, **options)["digest"] == got["digest"]
    assert ask("owner/tiny", {"HF_HUB_OFFLINE": "1"})["digest"] == got["digest"]


def test_random_weights_fetch_no_weights(ask, repository):
    with hub_server.serve("owner/tiny", repository) as hub:
        got = ask("owner/tiny", {"HF_ENDPOINT": hub.url}, weights="random", seed=3)
        assert got["weights"] == "random"
        assert "vocab.txt" in got["files"]
        assert "safetensors" not in " ".join(hub.requests)
        # A cache that holds only the config is no pretrained model.
    assert ask("owner/tiny", {"HF_HUB_OFFLINE": "1"})["error"] == "HubUnreachable"


def test_shards_are_fetched(ask, tiny):
    with hub_server.serve("tiny", tiny("bert", shards=3)) as hub:
        got = ask("tiny", {"HF_ENDPOINT": hub.url})
        assert sum(name.endswith(".safetensors") for name in got["files"]) >= 3


def test_shards_are_called_what_the_index_calls_them(ask, tiny, tmp_path):
    repository = tiny_models.rewritten(tiny("bert"), tmp_path / "repository", lambda s: s)
    name = "model.safetensors-00001-of-00001.safetensors"
    (repository / "model.safetensors").rename(repository / name)
    weight_map = dict.fromkeys(tiny_models.tensors(tiny("bert")), name)
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (repository / "model.fp16-00001-of-00001.safetensors").write_text("not wanted")
    with hub_server.serve("tiny", repository) as hub:
        got = ask("tiny", {"HF_ENDPOINT": hub.url})
        assert got["files"] == ["config.json", name, "model.safetensors.index.json"]


def test_a_pickle_on_the_hub(ask, tiny, tmp_path):
    with hub_server.serve("owner/old", tiny_models.pickled(tiny("bert"), tmp_path / "p")) as hub:
        refused = ask("owner/old", {"HF_ENDPOINT": hub.url})
        assert (refused["error"], refused["code"]) == ("PickleRefused", 4)
        assert "/owner/old/resolve/main/pytorch_model.bin" not in hub.requests
        assert not any("pytorch_model.bin" in path for path in hub.requests)
        assert ask("owner/old", {"HF_ENDPOINT": hub.url}, allow_pickle=True)["pickle"]


@pytest.mark.parametrize(("name", "options"), [
    ("owner/none", {}), ("owner/tiny", {"revision": "no-such-branch"})])
def test_what_the_hub_does_not_have(ask, repository, name, options):
    with hub_server.serve("owner/tiny", repository) as hub:
        got = ask(name, {"HF_ENDPOINT": hub.url}, **options)
    assert (got["error"], got["code"]) == ("UsageError", 2)


@pytest.mark.parametrize("environment", [
    {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_no_answer_names_the_ways_out_and_does_not_wait(ask, environment):
    start = time.monotonic()
    got = ask("camembert-base", environment)
    assert time.monotonic() - start < 20
    assert (got["error"], got["code"]) == ("HubUnreachable", 6)
    for word in ("--weights random", "HF_HUB_OFFLINE", "HF_HOME"):
        assert word in got["text"]
