from __future__ import annotations

import json
import sys

import pytest
from modelport.runtimes.benchmark import ceilings
from modelport.runtimes.benchmark.ceilings import Ceilings, Work, count_flops, share

torch = pytest.importorskip("torch")


def test_a_share_is_of_the_ceiling_of_the_same_dtype():
    top = Ceilings("cpu", 1, {"float32": 1e12}, 1e10)
    found = share(Work(5e11, 1e9), 1.0, "float32", top)
    assert (found.of_gemm, found.of_bandwidth) == (0.5, 0.1)
    assert share(Work(5e11), 1.0, "int8", top).of_gemm is None
    assert share(Work(5e11), 0.5, "float32", None).flops_per_second == 1e12


def test_operations_of_a_linear_layer_are_counted_without_computing():
    layer = torch.nn.Linear(64, 32)
    before = layer.weight.clone()
    assert count_flops(layer, (torch.zeros(8, 64),)) == 2 * 8 * 64 * 32
    assert layer.weight.device.type == "cpu"
    assert torch.equal(layer.weight, before)


def test_attention_grows_with_the_square_of_the_sequence():
    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    one, two = (count_flops(Attention(), (torch.zeros(1, 4, n, 16),)) for n in (32, 64))
    assert one == 2 * 2 * 4 * 32 * 32 * 16
    assert two == 4 * one


def test_measured_ceilings_are_plausible_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (128,)})
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 8 << 20)
    threads = torch.get_num_threads()
    try:
        assert ceilings.main(["1", "cpu", str(tmp_path / "c.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["gemm"]["float32"] > 1e8
    assert found["bandwidth"] > 1e8
    assert set(found["libraries"]) == set(found["gemm"])
    assert set(found["gemm"]) | set(found["absent"]) == {"float32", "bfloat16", "int8"}


def test_the_ceiling_is_the_best_of_the_libraries(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 20)
    times = iter([1.0, 2.0, 2.0, 2.0])  # ONNX Runtime; torch: float32, bfloat16, int8

    def took(call, device):
        call()
        return next(times, 1.0)

    monkeypatch.setattr(ceilings, "_best", took)
    threads = torch.get_num_threads()
    try:
        found = ceilings.measure(1)
    finally:
        torch.set_num_threads(threads)
    assert found.libraries == {"float32": "onnxruntime", "bfloat16": "torch", "int8": "torch"}
    assert found.gemm["float32"] == 2 * found.gemm["int8"] == 2 * 64**3


def test_no_library_is_measured_beside_the_spinning_threads_of_torch():
    """Its threads, once started, spin on between calls where a cell asks for spinning."""
    threads = torch.get_num_threads()
    try:
        libraries = [library for _, library in ceilings.products(1)]
    finally:
        torch.set_num_threads(threads)
    assert libraries == sorted(libraries, key=lambda name: name == "torch")
    assert len(set(libraries)) == 2


def test_a_library_that_is_missing_leaves_the_other(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 20)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    threads = torch.get_num_threads()
    try:
        found = ceilings.measure(1)
    finally:
        torch.set_num_threads(threads)
    assert set(found.libraries.values()) == {"torch"}
    assert not found.absent


def test_rounds_are_averaged_and_their_spread_is_kept():
    rounds = [
        Ceilings("cpu", 2, {"float32": 1e11, "int8": 3e11}, 1e10, {}, {"float32": "torch"}),
        Ceilings("cpu", 2, {"float32": 4e11}, 4e10, {"int8": "no memory"},
                 {"float32": "onnxruntime"}),
    ]
    found = ceilings.over_rounds(rounds)
    assert found.gemm == pytest.approx({"float32": 2e11, "int8": 3e11})
    assert found.bandwidth == pytest.approx(2e10)
    assert found.ranges == {"float32": (1e11, 4e11), "int8": (3e11, 3e11)}
    assert found.libraries == {"float32": "onnxruntime"}
    assert found.absent == {}
    assert ceilings.over_rounds(rounds[:1]) is rounds[0]
