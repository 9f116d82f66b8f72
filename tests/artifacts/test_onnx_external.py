"""External data is read only from where an artifact may keep it. Each case here is an attack."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from modelport.artifacts import onnx_files
from modelport.artifacts.onnx_external import tensors
from modelport.errors import PathEscape, UnsafeError, UsageError
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path


def _external(name: str = "w", **keys: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "weights", "offset": "0", "length": "16"} | keys).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model(*initializers: TensorProto, nodes: tuple = (), **extra) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    main = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([*nodes, main], "g", [x], [y], initializer=initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], **extra)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    (root / "sub").mkdir(parents=True)
    (root / "weights").write_bytes(bytes(64))
    (root / "sub" / "weights").write_bytes(bytes(64))
    (tmp_path / "secret").write_bytes(bytes(64))
    return root


def _write(root: Path, model: onnx.ModelProto) -> Path:
    (root / "model.onnx").write_bytes(model.SerializeToString())
    return root


def _refused(root: Path, model: onnx.ModelProto, error: type[Exception]) -> str:
    _write(root, model)
    messages = []
    for use in (onnx_files.check_external_data, onnx_files.load, onnx_files.describe):
        with pytest.raises(error) as caught:
            use(root)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize("location", ["weights", "sub/weights"])
def test_a_file_of_the_artifact_is_accepted(root: Path, location: str):
    _write(root, _model(_external(location=location, offset="48", checksum="00")))
    onnx_files.check_external_data(root)
    onnx_files.check_external_data(root / "model.onnx")
    model = onnx_files.load(root)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), np.zeros(4))


@pytest.mark.parametrize(
    "location",
    ["../secret", "sub/../../secret", "..", ".", "", "/etc/passwd", "weights/", "./weights",
     "sub//weights", "sub\\weights", "C:weights", "weights\0", "weights\n", "~/../secret/.."],
)
def test_a_location_outside_is_refused(root: Path, location: str):
    _refused(root, _model(_external(location=location)), PathEscape)


def test_a_location_that_is_no_file_of_its_own_is_refused(root: Path, tmp_path: Path):
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").symlink_to("weights")
    (root / "folder").symlink_to(tmp_path)
    os.link(tmp_path / "secret", root / "hard")
    os.mkfifo(root / "fifo")
    for location, problem in [
        ("link", "symbolic link"), ("inner", "symbolic link"), ("folder/secret", "symbolic link"),
        ("hard", "hard link"), ("fifo", "FIFO"), ("sub", "directory"), ("weights/x", "file"),
    ]:
        assert problem in _refused(root, _model(_external(location=location)), PathEscape)
    assert "No such file" in _refused(root, _model(_external(location="absent")), UnsafeError)


@pytest.mark.parametrize(
    "keys",
    [
        {"offset": "49"}, {"offset": "64"}, {"offset": "-1"}, {"offset": "1e3"}, {"offset": ""},
        {"offset": " 0"}, {"offset": "٣"}, {"offset": "9" * 5000}, {"length": "15"},
        {"length": "17"}, {"length": "1000000000000000"}, {"length": "-16"}, {"length": ""},
        {"basepath": "/etc"}, {"Location": "x"},
    ],
)
def test_wrong_numbers_and_keys_are_refused(root: Path, keys: dict):
    assert "w" in _refused(root, _model(_external(**keys)), UnsafeError)


def test_a_tensor_that_contradicts_itself_is_refused(root: Path):
    doubled = _external()
    doubled.external_data.add(key="location", value="../secret")
    both = _external()
    both.raw_data = bytes(16)
    unplaced = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    text = _external()
    text.data_type = TensorProto.STRING
    future = _external()
    future.data_type = 99
    negative = _external()
    negative.dims[:] = [-4]
    for tensor in (doubled, both, unplaced, text, future, negative):
        _refused(root, _model(tensor), UnsafeError)
    hidden = _external(location="../secret")
    hidden.data_location = TensorProto.DEFAULT
    _refused(root, _model(hidden), PathEscape)


def test_tensors_are_found_wherever_they_hide(root: Path):
    bad = _external("bad", location="../secret")
    good = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    empty = helper.make_graph([], "g", [], [])
    inner = helper.make_graph([], "inner", [], [], initializer=[bad])
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    deep = helper.make_graph([constant], "deep", [], [])
    branch = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=empty)
    nested = helper.make_graph(
        [helper.make_node("If", ["x"], ["z"], then_branch=deep, else_branch=empty)], "n", [], []
    )
    outer = helper.make_node("If", ["x"], ["z"], then_branch=nested, else_branch=empty)
    listed = helper.make_node("Custom", [], ["c"], domain="d", tensors=[good, bad])
    sparse = helper.make_sparse_tensor(bad, numpy_helper.from_array(np.arange(4)), [9])
    held = helper.make_node("Constant", [], ["c"], sparse_value=sparse)
    function = helper.make_function(
        "d", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)]
    )
    models = [
        _model(good, nodes=(node,)) for node in (constant, branch, outer, listed, held)
    ]
    models.append(_model(good, functions=[function]))
    models.append(_model(good))
    models[-1].graph.sparse_initializer.append(sparse)
    models.append(_model(good))
    models[-1].training_info.add().algorithm.CopyFrom(inner)
    for model in models:
        assert "bad" in [tensor.name for tensor in tensors(model)]
        _refused(root, model, PathEscape)


def test_what_is_no_onnx_file_is_refused(root: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="does not exist"):
        onnx_files.load(root)
    for content in (b"", b"\xff" * 40, b"not a model"):
        (root / "model.onnx").write_bytes(content)
        with pytest.raises(UsageError, match="not an ONNX file"):
            onnx_files.load(root)
    (root / "model.onnx").unlink()
    (root / "model.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(PathEscape):
        onnx_files.load(root)


def test_a_file_larger_than_protobuf_reads_is_refused_unread(root: Path):
    with (root / "model.onnx").open("wb") as stream:
        stream.truncate(1 << 31)
    with pytest.raises(UnsafeError, match="2147483648 bytes"):
        onnx_files.load(root)


def test_subbyte_lengths_round_up(root: Path):
    tensor = _external(length="3")
    tensor.data_type = TensorProto.INT4
    tensor.dims[:] = [5]
    _write(root, _model(tensor))
    onnx_files.check_external_data(root)
