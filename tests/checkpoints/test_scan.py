"""The background pass: digests and counts, found without a second read."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from modelport.artifacts.weights import read_header
from modelport.checkpoints.scan import _BLOCK, BackgroundScan
from modelport.errors import CheckpointError


def written(tmp_path, arrays):
    from safetensors.numpy import save_file

    file = tmp_path / "model.safetensors"
    save_file(arrays, file)
    return file, read_header(file)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_counts_in_each_dtype_across_blocks(tmp_path, dtype):
    count = 3 * _BLOCK // np.dtype(dtype).itemsize + 5
    broken = np.linspace(-1, 1, count).astype(dtype)
    broken[[0, count // 2, count - 1]] = [np.nan, np.inf, -np.inf]
    extreme = np.full(7, np.finfo(dtype).max, dtype)
    file, refs = written(tmp_path, {"a": extreme, "b": broken, "c": extreme})
    scan = BackgroundScan({"model.safetensors": file}, refs.values())
    assert scan.nonfinite == {refs["b"]: 3}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors\0{digest}\n".encode()).hexdigest()
    assert scan.digest == expected


def test_bfloat16(tmp_path):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan"), 3e38]).bfloat16()}, file)
    refs = read_header(file)
    scan = BackgroundScan({file.name: file}, refs.values())
    assert scan.nonfinite == {refs["a"]: 1}


def test_integers_have_no_nan(tmp_path):
    file, refs = written(tmp_path, {"a": np.full(9, -1, np.int64), "b": np.zeros(0, np.float32)})
    assert BackgroundScan({file.name: file}, refs.values()).nonfinite == {}


def test_the_digest_depends_on_names_and_not_on_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    digest = BackgroundScan({"a": one, "b": two}, ()).digest
    assert BackgroundScan({"b": two, "a": one}, ()).digest == digest
    assert BackgroundScan({"a": two, "b": one}, ()).digest != digest


def test_a_file_that_is_gone(tmp_path):
    scan = BackgroundScan({"a": tmp_path / "none"}, ())
    with pytest.raises(CheckpointError, match="could not be read"):
        _ = scan.digest


def test_a_file_that_became_shorter(tmp_path):
    file, refs = written(tmp_path, {"a": np.zeros(1000, np.float32)})
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="shorter"):
        _ = BackgroundScan({file.name: file}, refs.values()).digest
