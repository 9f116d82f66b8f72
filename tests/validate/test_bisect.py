"""The first bad point is named, in few runs, and written down so that it can be rerun."""

from __future__ import annotations

import json
import subprocess
import sys
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelport.errors import DestinationExists, UsageError
from modelport.validate import Point, Reproduction, find_first, write_reproduction

SHAPE = (2, 600)


class Chain:
    """A chain of layers whose values are known; from ``bad`` on the candidate is off."""

    def __init__(self, length: int, bad: int | None, ratio: float = 1e3) -> None:
        self.points = [Point(f"layer.{i}", f"/c/{i}", f"r.{i}") for i in range(length)]
        self.bad = length if bad is None else bad
        self.ratio = ratio
        self.runs = 0

    def exact(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).standard_normal(SHAPE)

    def noise(self, index: int, side: int) -> np.ndarray:
        return np.random.default_rng([index, side]).standard_normal(SHAPE) * 3e-7

    def truth(self, names):
        return {n: self.exact(int(n[2:])) for n in names}

    def reference(self, names):
        return {n: (self.exact(i) + self.noise(i, 1)).astype(np.float32)
                for n in names for i in [int(n[2:])]}

    def candidate(self, names):
        self.runs += 1
        return {n: (self.exact(i) + self.noise(i, 2) * (self.ratio if i >= self.bad else 1))
                .astype(np.float32).reshape(2, 1, 600) for n in names for i in [int(n[3:])]}

    def find(self, at_once=0):
        return find_first(self.points, self.candidate, self.reference, self.truth, at_once=at_once)


@given(st.integers(1, 200), st.data(), st.integers(0, 5))
def test_the_first_bad_point_is_found(length, data, at_once):
    bad = data.draw(st.none() | st.integers(0, length - 1))
    chain = Chain(length, bad)
    found = chain.find(at_once)
    if bad is None:
        assert found is None
        return
    assert found.name == f"layer.{bad}"
    assert found.before == (f"layer.{bad - 1}" if bad else "")
    names = [probe.point.name for probe in found.chain]
    assert names == [f"layer.{i}" for i in range(max(0, bad - 3), min(length, bad + 4))]
    if at_once == 1:
        assert chain.runs <= ceil(log2(length + 1)) + 6
    if at_once == 0:
        assert chain.runs == 1


def test_a_nan_and_an_integer_leave_the_band_at_once():
    points = [Point("ids", "a", "a"), Point("x", "b", "b"), Point("y", "c", "c")]
    good = {"a": np.arange(4), "b": np.ones(4, np.float32), "c": np.ones(4, np.float32)}
    nan = good | {"b": np.array([1, np.nan, 1, 1], np.float32)}
    taps = (lambda names: nan, lambda names: good, lambda names: good)
    assert find_first(points, *taps).name == "x"
    shifted = nan | {"a": np.arange(4) + 1}
    found = find_first(points, lambda names: shifted, *taps[1:])
    assert (found.name, found.before) == ("ids", "")
    assert found.probe.reason == "4 values differ"


def test_values_that_cannot_be_matched_are_passed_over_and_said():
    chain = Chain(3, 2)

    def reshaped(names):
        return {n: v.reshape(-1)[:7] if n == "/c/1" else v
                for n, v in chain.candidate(names).items()}

    found = find_first(chain.points, reshaped, chain.reference, chain.truth)
    assert found.name == "layer.2"
    assert "not compared: shapes" in found.chain[1].reason


def test_without_truth_a_fixed_allowance_decides():
    chain = Chain(9, 4, ratio=1e5)
    found = find_first(chain.points, chain.candidate, chain.reference, None)
    assert found.name == "layer.4"
    assert found.probe.rho is None


def test_a_tap_that_lacks_a_value_is_an_error():
    chain = Chain(3, 1)
    with pytest.raises(UsageError, match="no value for r"):
        find_first(chain.points, chain.candidate, lambda names: {}, chain.truth)
    assert find_first([], chain.candidate, chain.reference, None) is None


class TestReproduction:
    def content(self, **changes):
        values = {"graph": b"", "graph_name": "cut.onnx",
                  "inputs": {"/deep/../name": np.arange(3), "file": np.ones(2)},
                  "candidate": np.ones(SHAPE, np.float32),
                  "reference": np.zeros(SHAPE, np.float32)} | changes
        return Reproduction(**values)

    def test_the_script_shows_the_difference(self, tmp_path):
        culprit = Chain(9, 4).find()
        root = write_reproduction(tmp_path / "made" / "here", culprit, self.content())
        record = json.loads((root / "culprit.json").read_text())
        assert record["culprit"]["probe"]["point"]["name"] == "layer.4"
        assert record["inputs"] == ["/deep/../name", "file"]
        run = subprocess.run([sys.executable, "reproduce.py"], cwd=root, capture_output=True,
                             text=True, check=True)
        assert "FAIL layer.4" in run.stdout
        assert "ok   layer.3" in run.stdout
        assert "largest error 1" in run.stdout
        assert {p.name for p in root.iterdir()} == {"culprit.json", "inputs.npz", "outputs.npz",
                                                    "reproduce.py"}
        assert list(root.parent.iterdir()) == [root]

    def test_an_existing_directory_is_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("x")
        culprit = Chain(9, 4).find()
        with pytest.raises(DestinationExists):
            write_reproduction(tmp_path / "mine", culprit, self.content())
        with pytest.raises(UsageError, match="plain file name"):
            write_reproduction(tmp_path / "r", culprit, self.content(graph_name="../x.onnx"))
        assert [p.name for p in tmp_path.iterdir()] == ["mine"]
