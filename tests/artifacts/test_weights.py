"""Weights stream: written as the reference library reads them, converted and scanned in pieces."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelport.artifacts import copying, weights
from modelport.artifacts.weights import (
    convert_chunks,
    copy_file,
    nonfinite,
    numpy_dtype,
    read,
    read_chunks,
    read_header,
    read_metadata,
    write_safetensors,
)
from modelport.checkpoints.model import TensorRef
from modelport.errors import CheckpointError, ModelportError, StorageError, UsageError
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (
    *FLOATS, "float8_e4m3fn", "float8_e5m2", "bool", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64",
)


@st.composite
def stored(draw):
    """Tensors by name: every dtype, scalars and empty ones among them."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    found = {}
    for name in names:
        if name == "__metadata__" or not name.isprintable():
            continue
        dtype = numpy_dtype(draw(st.sampled_from(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = int(np.prod(shape)) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        if dtype == np.bool_:
            raw = bytes(byte & 1 for byte in raw)
        found[name] = np.frombuffer(raw, dtype).reshape(shape)
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and (
        one.tobytes() == other.tobytes()
    )


@given(stored())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_reference_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, arrays):
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    ours.unlink(missing_ok=True)
    save_file(arrays, theirs, metadata={"format": "pt"})
    refs = read_header(theirs)
    assert set(refs) == set(arrays)
    assert all(_same(read(ref), arrays[name]) for name, ref in refs.items())

    written = write_safetensors(
        ours,
        [(n, str(a.dtype), a.shape, [a.tobytes()]) for n, a in arrays.items()],
        {"format": "pt"},
    )
    assert written == read_header(ours)
    assert read_metadata(ours) == {"format": "pt"}
    found = dict(deserialize(ours.read_bytes()))
    original = dict(deserialize(theirs.read_bytes()))
    assert found == original  # dtype, shape and bytes
    with safe_open(ours, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    for ref in written.values():
        assert ref.offset % numpy_dtype(ref.dtype).itemsize == 0


def test_data_starts_at_a_multiple_of_64_and_is_the_same_every_time(tmp_path: Path):
    entries = [(f"w{n}", "float32", (n,), [bytes(4 * n)]) for n in range(1, 9)]
    refs = write_safetensors(tmp_path / "a", entries, {"b": "2", "a": "1"})
    write_safetensors(tmp_path / "b", entries, {"a": "1", "b": "2"})
    assert min(ref.offset for ref in refs.values()) % 64 == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([("a", "float32", (2,), [bytes(4)])], ModelportError),
        ([("a", "float32", (2,), [bytes(8), b"1"])], ModelportError),
        ([("a", "float32", (), [b""])], ModelportError),
        ([("a", "U8", (1,), [b"1"])], UsageError),
        ([("a", "uint8", (1,), [b"1"]), ("a", "uint8", (1,), [b"1"])], UsageError),
        ([("__metadata__", "uint8", (1,), [b"1"])], UsageError),
        ([("a", "float4_e2m1fn", (3,), [b"12"])], UsageError),
    ],
)
def test_tensors_that_cannot_be_written_are_refused(tmp_path: Path, entries, error):
    with pytest.raises(error):
        write_safetensors(tmp_path / "w", entries)


def test_a_tensor_comes_from_a_file_chunks_or_a_call(tmp_path: Path):
    refs = write_safetensors(tmp_path / "a", [("x", "uint8", (6,), [b"ab", bytearray(b"cdef")])])
    data = memoryview(b"abcdef")
    write_safetensors(
        tmp_path / "b",
        [("1", "uint8", (6,), refs["x"]), ("2", "uint8", (6,), lambda: iter([data[:3], data[3:]]))],
    )
    assert {n: read(r).tobytes() for n, r in read_header(tmp_path / "b").items()} == {
        "1": b"abcdef", "2": b"abcdef"
    }
    with pytest.raises(ModelportError):
        write_safetensors(tmp_path / "c", [("1", "uint8", (5,), refs["x"])])


def test_a_source_cut_short_is_a_checkpoint_error(tmp_path: Path):
    (tmp_path / "a").write_bytes(bytes(100))
    ref = TensorRef(tmp_path / "a", 50, 80, "float32", (20,))
    for use in (
        lambda: write_safetensors(tmp_path / "b", [("1", "float32", (20,), ref)]),
        lambda: list(read_chunks(ref)),
        lambda: nonfinite(ref),
        lambda: read(ref),
    ):
        with pytest.raises(CheckpointError, match="ends at byte 100"):
            use()


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    monkeypatch.setattr("os.statvfs", lambda _: type("Full", (), {"f_bavail": 0, "f_frsize": 1}))
    with pytest.raises(StorageError, match="needed"):
        write_safetensors(tmp_path / "b", [("1", "uint8", (1,), [b"1"])])
    monkeypatch.setattr(copying, "_clone", lambda *_: False)
    with pytest.raises(StorageError, match="needed"):
        copy_file(tmp_path / "a", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_disk_that_fills_up_while_writing_says_so(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StorageError, match="full"):
        write_safetensors(tmp_path / "b", [("1", "uint8", (1,), [b"1"])])


@pytest.mark.parametrize("way", ["best", "kernel", "buffer"])
def test_a_copy_is_equal_and_a_file_of_its_own(tmp_path: Path, monkeypatch, way):
    if way != "best":
        monkeypatch.setattr(copying, "_clone", lambda *_: False)
    if way == "buffer":
        monkeypatch.setattr(copying, "_kernel_copy", lambda *_: 0)
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "link").symlink_to("a")
    how = copy_file(tmp_path / "link", tmp_path / "b")
    assert how in {"best": ("reflink", "kernel"), "kernel": ("kernel",), "buffer": ("buffer",)}[way]
    assert (tmp_path / "b").read_bytes() == data
    assert (tmp_path / "b").stat().st_nlink == 1
    assert not (tmp_path / "b").is_symlink()
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError):
        copy_file(tmp_path, tmp_path / "c")


def _ref(tmp_path: Path, array: np.ndarray) -> TensorRef:
    file = tmp_path / "array.bin"
    file.write_bytes(b"head" + array.tobytes())
    return TensorRef(file, 4, array.nbytes, str(array.dtype), array.shape)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversion_rounds_as_numpy_does_in_pieces(tmp_path: Path, monkeypatch, source, target):
    monkeypatch.setattr(weights, "_CONVERT", 1000)
    array = np.random.default_rng(0).standard_normal(4321).astype(numpy_dtype(source))
    array[:4] = [np.nan, np.inf, -np.inf, -0.0]
    ref = _ref(tmp_path, array)
    pieces = [bytes(piece) for piece in convert_chunks(ref, target)]
    assert len(pieces) == 5
    found = np.frombuffer(b"".join(pieces), numpy_dtype(target))
    np.testing.assert_array_equal(
        found.astype(np.float64), array.astype(numpy_dtype(target)).astype(np.float64)
    )
    assert read(ref, target).tobytes() == found.tobytes()


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [("float32", "float16", 65520.0), ("bfloat16", "float16", -1e5), ("float64", "float32", 1e39),
     ("float64", "bfloat16", 1e39), ("float32", "bfloat16", 3.4e38)],
)
def test_a_value_that_does_not_fit_is_named_not_made_infinite(tmp_path, source, target, value):
    array = np.array([1.0, value], numpy_dtype(source))
    with pytest.raises(UsageError) as caught:
        list(convert_chunks(_ref(tmp_path, array), target, name="encoder.weight"))
    assert "encoder.weight" in caught.value.found
    assert target in caught.value.found
    assert caught.value.hint


def test_only_floats_convert(tmp_path: Path):
    with pytest.raises(UsageError):
        list(convert_chunks(_ref(tmp_path, np.arange(3)), "float32"))
    with pytest.raises(UsageError):
        list(convert_chunks(_ref(tmp_path, np.ones(3)), "int64"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
                                   "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_nonfinite_agrees_with_the_dtype_on_every_bit_pattern(tmp_path: Path, dtype):
    kind = numpy_dtype(dtype)
    array = np.arange(1 << 8 * kind.itemsize, dtype=f"uint{8 * kind.itemsize}").view(kind)
    with np.errstate(all="ignore"):
        expected = np.count_nonzero(~np.isfinite(array.astype(np.float64)))
    assert expected > 0
    assert nonfinite(_ref(tmp_path, array)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=64))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonfinite_counts_wide_floats(tmp_path: Path, dtype, values):
    array = np.array(values, np.float32).astype(dtype)
    assert nonfinite(_ref(tmp_path, array)) == np.count_nonzero(~np.isfinite(array))


def test_nonfinite_sees_one_bad_value_anywhere(tmp_path: Path):
    array = np.full(300_000, np.finfo(np.float32).max, np.float32)
    assert nonfinite(_ref(tmp_path, array)) == 0
    for place in (0, 65_535, 65_536, 299_999):
        bad = array.copy()
        bad[place] = np.nan
        assert nonfinite(_ref(tmp_path, bad)) == 1
    assert nonfinite(_ref(tmp_path, np.arange(5))) == 0
    assert nonfinite(_ref(tmp_path, np.zeros(0, np.float32))) == 0
    assert nonfinite(_ref(tmp_path, np.array(np.nan, ml_dtypes.bfloat16))) == 1


MEMORY = """
import resource, sys
from pathlib import Path
import ml_dtypes, numpy
from modelport.artifacts.weights import *
from modelport.checkpoints.model import TensorRef
file = Path(sys.argv[1])
n = file.stat().st_size
ref = TensorRef(file, 0, n, "bfloat16", (n // 2,))
next(convert_chunks(ref, "float32"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert nonfinite(ref) == 0
refs = write_safetensors(file.with_name("out"),
    [("w", "float32", ref.shape, lambda: convert_chunks(ref, "float32")),
     ("v", "uint8", (n,), ref)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_resident_memory_does_not_grow_with_the_tensor(tmp_path: Path):
    file = tmp_path / "big"
    with file.open("wb") as stream:
        stream.truncate(100 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 10, "more than 16 MiB for a 100 MiB tensor"
