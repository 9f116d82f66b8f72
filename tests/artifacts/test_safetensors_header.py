"""A header is believed only if it describes its file to the last byte."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelport.artifacts.weights import read_header, read_metadata
from modelport.errors import CheckpointError, PickleRefused
from safetensors.numpy import save

if TYPE_CHECKING:
    from pathlib import Path


def _bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _refused(tmp_path: Path, content: bytes) -> CheckpointError:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(file) in caught.value.found
    assert caught.value.hint
    return caught.value


GOOD = {"a": _entry(), "b": _entry("I64", [], [8, 16])}


def test_a_good_file_is_read(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(_bytes({"__metadata__": {"format": "pt"}, **GOOD}, bytes(16)))
    refs = read_header(file)
    start = file.stat().st_size - 16
    assert [(n, r.offset - start, r.nbytes, r.dtype, r.shape) for n, r in refs.items()] == [
        ("a", 0, 8, "float32", (2,)), ("b", 8, 8, "int64", ())
    ]
    assert read_metadata(file) == {"format": "pt"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\1\0\0", "truncated: 3 bytes"),
        (_bytes(GOOD, bytes(15)), "truncated: 15 bytes of data where the header names 16"),
        (_bytes(GOOD, bytes(17)), "1 bytes follow"),
        (_bytes(GOOD)[:40], "truncated: a header"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "more than 100000000"),
        (b"\xff" * 8 + b"{}", "more than 100000000"),
        (_bytes(b" {}"), "does not start with"),
        (_bytes(b"{'a': 1}"), "not JSON"),
        (_bytes(b'{"\xff": 1}'), "not JSON"),
        (_bytes(b"{" + b'"a":{' * 100_000), "not JSON"),
        (_bytes(b'{"a": NaN}'), "NaN"),
        (_bytes(b'{"a": {}, "a": {}}'), "a key twice"),
        (_bytes(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}'), "twice"),
        (_bytes({"a": []}), "the entry of 'a'"),
        (_bytes({"a": {**_entry(), "extra": 1}}, bytes(8)), "the entry of 'a'"),
        (_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "the entry of 'a'"),
        (_bytes({"a": _entry("F33")}, bytes(8)), "dtype 'F33'"),
        (_bytes({"a": _entry(["F32"])}, bytes(8)), "dtype"),
        (_bytes({"a": _entry(shape=[-2])}, bytes(8)), "shape [-2]"),
        (_bytes({"a": _entry(shape=[True, 2])}, bytes(8)), "shape [True, 2]"),
        (_bytes({"a": _entry(shape=[2.0])}, bytes(8)), "shape [2.0]"),
        (_bytes({"a": _entry(shape=[1 << 63] * 8)}, bytes(8)), "shape"),
        (_bytes({"a": _entry(shape=[1 << 62, 4])}, bytes(8)), "spans 8 bytes"),
        (_bytes({"a": _entry(shape=[3])}, bytes(8)), "spans 8 bytes"),
        (_bytes({"a": _entry(offsets=[8, 0])}, bytes(8)), "data_offsets [8, 0]"),
        (_bytes({"a": _entry(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
        (_bytes({"a": _entry(offsets=[0, 4, 8])}, bytes(8)), "data_offsets"),
        (_bytes({"a": _entry(offsets="08")}, bytes(8)), "data_offsets"),
        (_bytes({"a": _entry(), "b": _entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (_bytes({"a": _entry(), "b": _entry()}, bytes(8)), "overlaps"),
        (_bytes({"a": _entry(), "b": _entry(offsets=[9, 17])}, bytes(17)), "gap"),
        (_bytes({"a": _entry(offsets=[1, 9])}, bytes(9)), "gap"),
        (_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
        (_bytes({"__metadata__": []}), "__metadata__"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "more than"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, problem: str):
    assert problem in _refused(tmp_path, content).found


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [_zip(), *(pickle.dumps({"a": list(range(99))}, p) for p in (2, 3, 4, 5))]
)
def test_a_pickle_under_this_name_is_refused(tmp_path: Path, content: bytes):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(PickleRefused) as caught:
        read_header(file)
    assert caught.value.exit_code == 4
    assert "--allow-pickle" in caught.value.hint


def test_what_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "absent", "."):
        with pytest.raises(CheckpointError):
            read_header(tmp_path / name)


def test_a_link_is_followed_as_the_hub_cache_is_made_of_them(tmp_path: Path):
    (tmp_path / "blob").write_bytes(_bytes(GOOD, bytes(16)))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert list(read_header(tmp_path / "model.safetensors")) == ["a", "b"]


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_header_or_a_clear_error(tmp_path: Path, content: bytes):
    file = tmp_path / "model.safetensors"
    for data in (content, _bytes(content), _bytes(b"{" + content)):
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError, PickleRefused):
            read_header(file)


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_never_makes_a_tensor_leave_its_file(tmp_path: Path, data: st.DataObject):
    good = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.arange(4)}))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(good), data.draw(st.integers(0, len(good)))]))
    file = tmp_path / "model.safetensors"
    file.write_bytes(good[:cut])
    try:
        refs = read_header(file)
    except (CheckpointError, PickleRefused):
        return
    assert all(r.offset + r.nbytes <= cut for r in refs.values())
    assert sum(r.nbytes for r in refs.values()) == cut - min(r.offset for r in refs.values())
