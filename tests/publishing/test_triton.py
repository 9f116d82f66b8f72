"""Model repositories of Triton, read back through the server's own protobuf classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from modelport import artifacts, profiles
from modelport.cli import execute
from modelport.destinations import triton
from modelport.errors import DestinationExists, UsageError
from modelport.pipeline import publishing
from modelport.pipeline.publishing import Gate, publish
from modelport.spec import Dim

schema = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed"
)
ANY = Gate(allow_unproven=True)


def config_of(model: Path):
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())


def as_format(root: Path, name: str, files: dict[str, bytes], **facts: object) -> Path:
    """The artifact with another format's files in the place of its own."""
    for old in ("model.onnx", "model.safetensors"):
        (root / old).unlink()
    for file, data in files.items():
        (root / file).write_bytes(data)
    manifest = dataclasses.replace(
        artifacts.read(root).manifest, format=name, facts=facts, files=artifacts.collect(root)
    )
    artifacts.write_manifest(root, manifest)
    return root


def test_onnx(proven, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "_preferred", lambda _: (4, 8, 999))
    done = publish(proven, f"triton://{tmp_path}/models", serve_as="tiny")
    assert done.places == (tmp_path / "models" / "tiny",)
    config = config_of(done.places[0])
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
    assert config.default_model_filename == "model.onnx"
    assert [(i.name, schema.DataType.Name(i.data_type), list(i.dims)) for i in config.input] == [
        ("input_ids", "TYPE_INT64", [-1]), ("attention_mask", "TYPE_INT64", [-1]),
        ("token_type_ids", "TYPE_INT64", [-1]),
    ]
    assert [(o.name, list(o.dims)) for o in config.output] == [
        ("last_hidden_state", [-1, 8]), ("pooler_output", [8]),
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    version = done.places[0] / "1"
    for name in ("model.onnx", "model.safetensors"):
        assert (version / name).read_bytes() == (proven / name).read_bytes()


def test_what_was_written_runs(proven, tmp_path):
    import numpy as np
    import onnxruntime

    (model,) = publish(proven, f"triton://{tmp_path}/models").places
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {i.name for i in config_of(model).input}
    feeds = {i.name: np.ones((2, 5), np.int64) for i in session.get_inputs()}
    assert session.run(None, feeds)[0].shape == (2, 5, 8)


def test_versions(proven, variant, tmp_path):
    url = f"triton://{tmp_path}/models"
    for _ in range(2):
        publish(proven, url, serve_as="tiny")
    model = tmp_path / "models" / "tiny"
    assert sorted(p.name for p in model.iterdir()) == ["1", "config.pbtxt"], "the same once"
    publish(variant("b"), url, ANY, serve_as="tiny")
    assert sorted(p.name for p in model.iterdir()) == ["1", "2", "config.pbtxt"]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["tiny"]


def test_two_publishers_to_one_name(proven, variant, tmp_path, monkeypatch):
    """The second comes while the first has written half of a version."""
    url, other, real = f"triton://{tmp_path}/models", variant("b"), triton.copy_file
    refused = []

    def overtaken(source: Path, place: Path) -> object:
        monkeypatch.setattr(triton, "copy_file", real)
        with pytest.raises(DestinationExists, match="another process") as caught:
            publish(other, url, ANY, serve_as="tiny")
        refused.append(caught.value)
        return real(source, place)

    dead = tmp_path / "models" / ".tiny.partial-1-0123abcd"
    dead.mkdir(parents=True)
    monkeypatch.setattr(triton, "copy_file", overtaken)
    (model,) = publish(proven, url, serve_as="tiny").places
    assert refused
    assert {p.name for p in (model / "1").iterdir()} >= {"model.onnx", "model.safetensors"}
    publish(other, url, ANY, serve_as="tiny")
    assert (model / "2" / "notes.txt").exists()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["tiny"]


def test_torchscript_names_inputs_by_position(proven, tmp_path):
    root = as_format(proven, "torchscript", {"model.pt": b"archive"})
    (model,) = publish(root, f"triton://{tmp_path}/models", ANY).places
    config = config_of(model)
    assert config.backend == "pytorch"
    assert [i.name for i in config.input][1] == "attention_mask__1"
    assert (model / "1" / "model.pt").read_bytes() == b"archive"


def engines(layout: str) -> tuple[profiles.Engine, ...]:
    length = Dim(1, 24, 24)
    each = [profiles.Profile({"batch": Dim(*b), "sequence": length})
            for b in ((1, 1, 1), (2, 8, 8))]
    return profiles.arrange(each, layout)


@pytest.mark.parametrize("layout", ["multi-profile", "engine-per-profile"])
def test_one_model_for_each_profile(proven, tmp_path, layout):
    found = engines(layout)
    files = {e.file: e.file.encode() for e in found}
    root = as_format(proven, "tensorrt", files, engines=profiles.record(found))
    places = publish(root, f"triton://{tmp_path}/models", ANY, serve_as="tiny").places
    assert [p.name for p in places] == ["tiny-batch-1", "tiny-batch-8"]
    configs = [config_of(p) for p in places]
    assert [c.max_batch_size for c in configs] == [1, 8]
    several = layout == "multi-profile"
    chosen = [list(c.instance_group[0].profile) for c in configs]
    assert chosen == [["0"], ["1" if several else "0"]]
    for place, engine in zip(places, found * 2 if several else found, strict=True):
        assert (place / "1" / "model.plan").read_bytes() == files[engine.file]
        assert not list((place / "1").glob("*.engine"))


def test_what_cannot_be_served(proven, tmp_path):
    url = f"triton://{tmp_path}/models"
    with pytest.raises(UsageError, match="no name"):
        publish(proven, url, serve_as="../x")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match="no model of Triton's"):
        publish(proven, url, serve_as="mine")
    root = as_format(proven, "aotinductor", {"model.pt2": b"x"})
    with pytest.raises(UsageError, match="no backend"):
        publish(root, url, ANY)
    assert execute(["pull", url, str(tmp_path / "x")]) == 2
    assert execute(["publish", str(root), url]) == 3, "the gate comes first"
