"""Graphs are small, weights stream into safetensors, and both are the same every time."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from modelport.artifacts import onnx_files
from modelport.artifacts.weights import numpy_dtype, read_header
from modelport.errors import CheckpointError, UsageError
from modelport.spec import TensorSpec
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

FLOAT = ir.DataType.FLOAT


def _value(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.val(name, tensor.dtype, list(tensor.shape.numpy()))
    value.const_value = tensor
    return value


def _model(*tensors: tuple[str, ir.TensorProtocol], opset: int = 17) -> ir.Model:
    """A graph with one Identity for each weight, so that a runtime gives them back."""
    values = [_value(name, tensor) for name, tensor in tensors]
    nodes = [ir.node("Identity", [value]) for value in values]
    x = ir.val("x", FLOAT, ["batch", "sequence", 4])
    nodes.append(ir.node("Neg", [x]))
    outputs = []
    for index, node in enumerate(nodes):
        out = node.outputs[0]
        out.name = f"out{index}"
        out.dtype = node.inputs[0].dtype
        out.shape = node.inputs[0].shape
        outputs.append(out)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=values,
                     opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=7 if opset < 15 else 10)


def _checkpoint(path: Path, **arrays: np.ndarray) -> dict:
    save_file(arrays, path)
    return read_header(path)


def _array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _hashes(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def _read_back(root: Path) -> dict[str, np.ndarray]:
    model = onnx_files.load(root)
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def test_a_checkpoint_used_as_it_is_is_copied_whole(tmp_path: Path, root: Path):
    arrays = {"a": _array(64, 64), "b": _array(512), "tiny": _array(3)}
    refs = _checkpoint(tmp_path / "ck.safetensors", **arrays)
    tensors = [(f"layer.{n}", onnx_files.tensor(r, f"layer.{n}")) for n, r in refs.items()]
    assert onnx_files.save(_model(*tensors), root) == ("model.onnx", "model.safetensors")
    original = (tmp_path / "ck.safetensors").read_bytes()
    assert (root / "model.safetensors").read_bytes() == original
    assert (root / "model.safetensors").stat().st_nlink == 1
    for name, found in _read_back(root).items():
        np.testing.assert_array_equal(found, arrays[name.removeprefix("layer.")])
    # what is below 1 KiB is in the graph, where shape inference reads it
    assert (root / "model.onnx").stat().st_size < 2000
    proto = onnx.load(root / "model.onnx", load_external_data=False)
    places = {t.name: t.data_location for t in proto.graph.initializer}
    assert places == {"layer.a": 1, "layer.b": 1, "layer.tiny": 0}


def test_shards_are_copied_in_their_order(tmp_path: Path, root: Path):
    tensors = []
    for shard in (2, 1):
        refs = _checkpoint(tmp_path / f"m-0000{shard}.safetensors", w=_array(64, 64, seed=shard))
        tensors.append((f"w{shard}", onnx_files.tensor(refs["w"], f"w{shard}")))
    names = onnx_files.save(_model(*tensors), root)
    assert names[1:] == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for shard in (1, 2):
        assert np.array_equal(
            load_file(root / names[shard])["w"], _array(64, 64, seed=shard)
        )


def test_only_what_is_used_is_streamed_from_a_file_used_in_part(tmp_path: Path, root: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", used=_array(64, 64), unused=_array(64, 64))
    onnx_files.save(_model(("used", onnx_files.tensor(refs["used"], "used"))), root)
    stored = load_file(root / "model.safetensors")
    assert list(stored) == ["used"]
    np.testing.assert_array_equal(stored["used"], _array(64, 64))


def test_what_comes_beside_a_whole_copy_is_kept_in_the_graph_or_in_a_last_file(
    tmp_path: Path, root: Path
):
    refs = _checkpoint(tmp_path / "ck.safetensors", w=_array(64, 64))
    copied = ("w", onnx_files.tensor(refs["w"], "w"))
    positions = ("positions", ir.tensor(np.arange(514), name="positions"))
    assert onnx_files.save(_model(copied, positions), root)[1:] == ("model.safetensors",)
    assert np.array_equal(_read_back(root)["positions"], np.arange(514))
    large = ("large", ir.tensor(_array(600, 600), name="large"))
    names = onnx_files.save(_model(copied, large), root)
    assert names[1:] == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert np.array_equal(load_file(root / names[2])["large"], _array(600, 600))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_conversion_happens_while_writing(tmp_path: Path, root: Path, dtype: str):
    array = _array(300, 300)
    refs = _checkpoint(tmp_path / "ck.safetensors", w=array, tiny=array[0, :5].copy())
    tensors = [(name, onnx_files.tensor(ref, name, dtype)) for name, ref in refs.items()]
    onnx_files.save(_model(*tensors), root)
    expected = {"w": array.astype(numpy_dtype(dtype))}
    expected["tiny"] = expected["w"][0, :5]
    found = _read_back(root)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)
        assert np.array_equal(dict(tensors)[name].numpy(), value)
    assert onnx_files.describe(root).weight_bytes == {dtype: (90_005) * value.dtype.itemsize}


def test_a_value_that_does_not_fit_fails_and_leaves_nothing(tmp_path: Path, root: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", w=np.full(512, 1e6, np.float32))
    with pytest.raises(UsageError, match=r"w of ck\.safetensors holds 1e"):
        onnx_files.save(_model(("w", onnx_files.tensor(refs["w"], "w", "float16"))), root)
    assert not list(root.iterdir())


def test_tied_weights_are_written_once(tmp_path: Path, root: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", w=_array(64, 64), x=_array(64, 64))
    shared = ir.tensor(_array(64, 64, seed=3), name="s")
    tensors = [(n, onnx_files.tensor(refs["w"], n)) for n in ("one", "two")]
    onnx_files.save(_model(*tensors, ("three", shared), ("four", shared)), root)
    assert sorted(load_file(root / "model.safetensors")) == ["one", "three"]
    found = _read_back(root)
    assert np.array_equal(found["one"], found["two"])
    assert np.array_equal(found["three"], found["four"])
    assert onnx_files.describe(root).weight_bytes == {"float32": 2 * 64 * 64 * 4}


def test_every_dtype_comes_back(root: Path):
    kinds = ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "uint16",
             "int32", "uint32", "int64", "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
             "float8_e4m3fnuz", "complex64", "complex128"]
    arrays = {k: np.arange(2048).astype(np.uint8).astype(numpy_dtype(k)) for k in kinds}
    arrays["int4"] = (np.arange(4096) % 8).astype(ml_dtypes.int4)
    tensors = [(n, ir.tensor(a, name=n)) for n, a in arrays.items()]
    tensors.append(("text", ir.StringTensor(np.array([b"x" * 2000], object), name="text")))
    onnx_files.save(_model(*tensors), root)
    found = _read_back(root)
    for name, array in arrays.items():
        assert found[name].tobytes() == array.tobytes(), name
    assert found["text"][0] == b"x" * 2000
    sizes = onnx_files.describe(root).weight_bytes
    assert sizes["int4"] == 2048
    assert sizes["complex128"] == 2048 * 16


def test_the_same_input_gives_the_same_bytes_and_stays_as_it_was(tmp_path: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", a=_array(64, 64), b=_array(300))
    hashes = []
    for number, metadata in enumerate(({"b": "1", "a": "2"}, {"a": "2", "b": "1"})):
        root = tmp_path / f"out{number}"
        root.mkdir()
        model = _model(*[(n, onnx_files.tensor(r, n, "bfloat16")) for n, r in refs.items()])
        tensors = [v.const_value for v in model.graph.initializers.values()]
        onnx_files.save(model, root, metadata=metadata)
        assert [v.const_value for v in model.graph.initializers.values()] == tensors
        assert model.metadata_props == {}
        hashes.append(_hashes(root))
    assert hashes[0] == hashes[1]
    assert onnx_files.describe(root).metadata == {"a": "2", "b": "1"}


def test_an_artifact_is_written_over_the_one_it_was_loaded_from(tmp_path: Path, root: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", a=_array(64, 64), b=_array(64, 64, seed=1))
    onnx_files.save(_model(*[(n, onnx_files.tensor(r, n)) for n, r in refs.items()]), root)
    before = _hashes(root)
    onnx_files.save(onnx_files.load(root), root)
    assert _hashes(root) == before
    (tmp_path / "ck.safetensors").unlink()
    assert np.array_equal(_read_back(root)["b"], _array(64, 64, seed=1))


def test_a_name_used_in_two_subgraphs_is_stored_twice(root: Path):
    arrays = {"then_branch": _array(20, 20), "else_branch": _array(20, 20, seed=1)}

    def branch(key: str) -> ir.AttrGraph:
        value = _value("weight", ir.tensor(arrays[key], name="weight"))
        node = ir.node("Neg", [value])
        return ir.AttrGraph(key, ir.Graph([], node.outputs, nodes=[node], initializers=[value]))

    condition = ir.val("condition", ir.DataType.BOOL, [])
    choose = ir.Node("", "If", [condition], attributes=[branch(key) for key in arrays])
    graph = ir.Graph([condition], choose.outputs, nodes=[choose], opset_imports={"": 17}, name="g")
    onnx_files.save(ir.Model(graph, ir_version=8), root)
    stored = load_file(root / "model.safetensors")
    assert sorted(stored) == ["weight", "weight#2"]
    inner = [g.initializers["weight"] for g in onnx_files.load(root).graph.subgraphs()]
    found = {value.const_value.numpy().tobytes() for value in inner}
    assert found == {array.tobytes() for array in arrays.values()}


def test_a_conversion_streams_into_any_file(tmp_path: Path):
    array = _array(300)
    refs = _checkpoint(tmp_path / "ck.safetensors", w=array)
    stream = io.BytesIO()
    onnx_files.tensor(refs["w"], "w", "float16").tofile(stream)
    assert stream.getvalue() == array.astype(np.float16).tobytes()


def test_subgraphs_and_constants_are_written_too(tmp_path: Path, root: Path):
    refs = _checkpoint(tmp_path / "ck.safetensors", w=_array(40, 40), c=_array(30, 30))

    def branch(key: str) -> ir.Graph:
        # both branches name their weight alike
        value = _value("weight", onnx_files.tensor(refs[key], "weight"))
        node = ir.node("ReduceSum", [value])
        node.outputs[0].name = f"sum_{key}"
        node.outputs[0].dtype, node.outputs[0].shape = FLOAT, ir.Shape([1, 1])
        return ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[value], name=key)

    condition = ir.val("condition", ir.DataType.BOOL, [])
    choose = ir.Node("", "If", [condition], attributes=[
        ir.AttrGraph("then_branch", branch("w")), ir.AttrGraph("else_branch", branch("c"))
    ], num_outputs=1)
    constant = ir.Node("", "Constant", [], attributes=[
        ir.AttrTensor("value", onnx_files.tensor(refs["c"], "value"))
    ], num_outputs=1)
    for node, name, shape in ((choose, "chosen", [1, 1]), (constant, "constant", [30, 30])):
        node.outputs[0].name, node.outputs[0].dtype = name, FLOAT
        node.outputs[0].shape = ir.Shape(shape)
    graph = ir.Graph([condition], [choose.outputs[0], constant.outputs[0]],
                     nodes=[choose, constant], opset_imports={"": 17}, name="g")
    onnx_files.save(ir.Model(graph, ir_version=8), root)
    onnx.checker.check_model(root / "model.onnx")
    assert onnx_files.describe(root).nodes == 4

    import onnxruntime

    session = onnxruntime.InferenceSession(root / "model.onnx", providers=["CPUExecutionProvider"])
    for flag, array in ((True, _array(40, 40)), (False, _array(30, 30))):
        chosen, held = session.run(None, {"condition": np.array(flag)})
        np.testing.assert_allclose(np.squeeze(chosen), array.sum(), rtol=1e-4)
        np.testing.assert_array_equal(held, _array(30, 30))


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 24])
def test_a_runtime_opens_it_at_every_opset(tmp_path: Path, root: Path, opset: int):
    import onnxruntime

    refs = _checkpoint(tmp_path / "ck.safetensors", w=_array(64, 64), b=_array(7))
    tensors = [("w", onnx_files.tensor(refs["w"], "w")), ("b", onnx_files.tensor(refs["b"], "b"))]
    onnx_files.save(_model(*tensors, opset=opset), root)
    onnx.checker.check_model(root / "model.onnx")
    session = onnxruntime.InferenceSession(root / "model.onnx", providers=["CPUExecutionProvider"])
    w, b, _ = session.run(None, {"x": np.zeros((1, 2, 4), np.float32)})
    np.testing.assert_array_equal(w, _array(64, 64))
    np.testing.assert_array_equal(b, _array(7))
    found = onnx_files.describe(root)
    assert found.opsets == {"": opset}
    assert found.ir_version == (7 if opset < 15 else 10)
    assert found.inputs == (TensorSpec("x", "float32", ("batch", "sequence", 4)),)
    assert found.outputs[2] == TensorSpec("out2", "float32", ("batch", "sequence", 4))
    assert found.nodes == 3


def test_describe_tells_what_is_unknown(root: Path):
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [], "g", [make("a", 1, None), make("b", 7, [None, "n", 0])],
        [onnx.helper.make_tensor_sequence_value_info("s", 1, [2])],
    )
    (root / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    found = onnx_files.describe(root)
    assert found.inputs == (
        TensorSpec("a", "float32", ("...",)), TensorSpec("b", "int64", ("?", "n", 0))
    )
    assert found.outputs == (TensorSpec("s", "sequence", ("...",)),)


def test_a_reference_that_contradicts_its_shape_is_refused(tmp_path: Path, root: Path):
    (tmp_path / "w").write_bytes(bytes(4096))
    wrong = ir.ExternalTensor(str(tmp_path / "w"), 0, 4095, FLOAT, shape=ir.Shape([1024]), name="w")
    with pytest.raises(CheckpointError):
        onnx_files.save(_model(("w", wrong)), root)
    short = ir.ExternalTensor(str(tmp_path / "w"), 8, 4096, FLOAT, shape=ir.Shape([1024]), name="w")
    with pytest.raises(CheckpointError):
        onnx_files.save(_model(("w", short)), root)
    assert not list(root.iterdir())


def test_a_checkpoint_behind_links_is_read(tmp_path: Path, root: Path):
    """The hub's cache holds links, and some installers make hard links."""
    (tmp_path / "blobs").mkdir()
    _checkpoint(tmp_path / "blobs" / "0123", w=_array(64, 64))
    (tmp_path / "blobs" / "copy").hardlink_to(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    refs = read_header(tmp_path / "snapshot" / "model.safetensors")
    onnx_files.save(_model(("w", onnx_files.tensor(refs["w"], "w"))), root)
    assert (root / "model.safetensors").stat().st_nlink == 1
    assert np.array_equal(_read_back(root)["w"], _array(64, 64))


MEMORY = """
import json, resource, sys
from pathlib import Path
import onnx_ir as ir
from modelport.artifacts import onnx_files
from modelport.artifacts.weights import read_header
file = Path(sys.argv[1])
size = 3 << 30
header = json.dumps({f"w{n}": {"dtype": "BF16", "shape": [size // 6],
          "data_offsets": [n * size // 3, (n + 1) * size // 3]} for n in range(3)}).encode()
with file.open("wb") as stream:
    stream.write(len(header).to_bytes(8, "little") + header)
    stream.truncate(8 + len(header) + size)
values = []
for name, ref in read_header(file).items():
    value = ir.val(name, ir.DataType.BFLOAT16, list(ref.shape))
    value.const_value = onnx_files.tensor(ref, name)
    values.append(value)
x = ir.val("x", ir.DataType.FLOAT, [1])
node = ir.node("Neg", [x])
node.outputs[0].name = "y"
graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 17})
model = ir.Model(graph, ir_version=10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
onnx_files.save(model, file.parent)
onnx_files.load(file.parent)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_more_weights_than_a_protobuf_holds(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "checkpoint")],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10, "more than 32 MiB for 3 GiB"
