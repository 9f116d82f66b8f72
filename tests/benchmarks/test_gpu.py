"""The GPU benchmark: what it concludes from figures, and its whole path on a CPU at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLACE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


def cell(batch: int, sequence: int, ms: float, db: float | None) -> dict[str, Any]:
    return {"batch": batch, "sequence": sequence, "first": 0.5, "samples": [ms / 1e3] * 11,
            "host": 1e-4, "with_copies": [ms / 1e3 * 1.1] * 3, "sqnr_db": db}  # fmt: skip


def found(**columns: tuple[float, float | None]) -> dict[str, Any]:
    """A grid of one shape, (1, 16), with milliseconds and signal to noise by variant."""
    runs = {
        name: {
            number: {"status": "ok", "opened": 1.0, "cells": [cell(1, 16, ms, db)]}
            for number in range(3)
        }
        for name, (ms, db) in columns.items()
    }  # fmt: skip
    return {
        "plan": {"device": "cuda"}, "shapes": [[1, 16]], "runs": runs,
        "work": [{"flops": 1e9, "bytes": 4e8}],
        "ceilings": {"device": "cuda", "threads": 1, "gemm": {"float32": 5e13, "float16": 8e14},
                     "bandwidth": 4e12},
    }  # fmt: skip


def test_a_fast_and_right_artifact_reaches_the_targets(load: Any) -> None:
    grid = load("grid")
    data = found(**{"eager fp32": (8.0, 200.0), "eager fp16": (7.0, 55.0),
                    "ONNX Runtime fp16, fused": (0.5, 55.0)})  # fmt: skip
    rows = grid.table(json.loads(json.dumps(data)))
    assert {r["variant"]: r["verdict"] for r in rows} == dict.fromkeys(
        ("eager fp32", "eager fp16", "ONNX Runtime fp16, fused"), "right")
    ours = next(r for r in rows if r["ours"])
    assert ours["speedup"] == pytest.approx(16)
    assert ours["of_gemm"] == pytest.approx(1e9 / 0.5e-3 / 8e14)
    assert [c["reached"] for c in grid.claims(rows, grid.warm_up(data), {})] == [True, True, None]


def test_what_is_wrong_is_not_fast(load: Any) -> None:
    grid = load("grid")
    data = found(**{"eager fp32": (8.0, 200.0), "ONNX Runtime fp16, fused": (0.5, 3.0)})
    rows = grid.table(data)
    assert rows[1]["verdict"] == "wrong: 3 dB, 30 needed"
    assert [c["reached"] for c in grid.claims(rows, {}, {})] == [None, None, None]


def test_a_peer_ahead_by_more_than_five_percent_is_told(load: Any) -> None:
    grid = load("grid")
    for mine, reached in ((1.04, True), (1.10, False)):
        data = found(**{"eager fp32": (8.0, 200.0), "compile reduce-overhead fp16": (1.0, 50.0),
                        "ONNX Runtime fp16, fused": (mine, 50.0)})  # fmt: skip
        claims = grid.claims(grid.table(data), {}, {})
        assert claims[1]["reached"] is reached
        assert ("behind at 1×16" in claims[1]["found"]) is not reached


def test_what_was_not_measured_leaves_a_target_open(load: Any) -> None:
    grid = load("grid")
    absent = {"compile max-autotune fp16": "no time was left for it"}
    for mine, reached in ((0.5, True), (4.0, None)):
        data = found(**{"eager fp32": (8.0, 200.0), "ONNX Runtime fp16, fused": (mine, 55.0),
                        "eager fp16": (4.1, 55.0)})  # fmt: skip
        claims = grid.claims(grid.table(data), {}, absent)
        assert [c["reached"] for c in claims] == [reached, None, None]


def test_an_earlier_run_on_such_a_machine_keeps_its_sections(load: Any, tmp_path: Path) -> None:
    kept = load("sections").kept
    gpu = {"name": "H100", "driver": "1"}
    now = {"device": "cuda", "small": False, "environment": {
        "packages": {"torch": "2"}, "cpu": "some", "gpus": [gpu]}}
    path = tmp_path / "gpu.json"
    assert kept(path, now) == {}
    path.write_text(json.dumps({**now, "sections": {"t5": {"status": "ok"}}}))
    assert kept(path, now) == {"t5": {"status": "ok"}}
    for other in ({**now, "small": True}, {**now, "environment": {
            **now["environment"], "gpus": [{**gpu, "name": "H200"}]}}):
        assert kept(path, other) == {}


def test_warm_up_is_held_to_its_limit(load: Any) -> None:
    grid = load("grid")
    name = "CUDA graphs by bucket, compiled fp16"
    assert grid.claims([], {name: 59.0}, {})[2]["reached"] is True
    assert grid.claims([], {name: 61.0}, {})[2]["reached"] is False


def test_the_article_on_sentences_is_checked_as_found(load: Any) -> None:
    sentences = load("sentences")
    runs = {
        name: {0: {"passes": [
            {"order": "padded", "batch": b, "sentences": 10, "seconds": s, "padding": 0.1}
            for b, s in times.items()]}}
        for name, times in {
            "eager fp32": {1: 2.9, 64: 0.11}, "TorchScript fp32": {64: 0.105},
            "ONNX Runtime fp16, fused": {64: 0.1},
        }.items()
    }  # fmt: skip
    rows = sentences.table({"runs": runs})
    claims = sentences.claims(rows, {})
    assert [c["reached"] for c in claims] == [True, True]
    assert claims[0]["found"].startswith("29.0 ×")
    runs["TorchScript fp32"][0]["passes"][0]["seconds"] = 0.13
    assert sentences.claims(sentences.table({"runs": runs}), {})[1]["reached"] is False


@pytest.mark.parametrize(("small", "word"), [(False, "reached"), (True, "not judged")])
def test_tiny_sizes_reach_nothing(load: Any, tmp_path: Path, small: bool, word: str) -> None:
    report = load("report")
    environment = {"packages": {}, "gpus": [], "cpu": "some", "cores": 2}
    claim = {"claim": "fast", "found": "very", "reached": True}
    report.write({
        "environment": environment, "device": "cuda", "small": small,
        "sections": {"correct": {"status": "ok", "seconds": 1.0, "result": {"claims": [claim]}},
                     "t5": {"status": "failed", "seconds": 5.0, "reason": "killed after 5 s"}},
    }, tmp_path)  # fmt: skip
    text = (tmp_path / "gpu.md").read_text()
    assert f"| fast | very | {word} |" in text
    assert "Not finished: killed after 5 s" in text


def test_without_a_card_it_says_so_before_anything_else(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, str(PLACE), "--output", str(tmp_path)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 6
    assert done.stderr == (
        "error: torch sees no CUDA device here; --device cpu --small tries the same path\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_path_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PLACE), "--device", "cpu", "--small", "--seconds", "1200",
         "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [s["status"] for s in report["sections"].values()] == ["ok"] * 5
    assert (tmp_path / "out" / "speedup.svg").read_text().startswith("<svg")
    verdicts = {r["verdict"] for r in report["sections"]["grid"]["result"]["rows"]}
    assert verdicts == {"right"}
