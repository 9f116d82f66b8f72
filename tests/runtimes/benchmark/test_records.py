from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from benchmark_fakes import cell
from modelport.errors import UsageError
from modelport.runtimes.benchmark.records import Cell, Sampling, cell_from, write_json


def test_a_cell_survives_its_json():
    one = cell(batching="sorted", sequence=0, dims={"frames": 3})
    assert cell_from(json.loads(json.dumps(asdict(one)))) == one


@pytest.mark.parametrize("change", [
    {"identity": "other"}, {"batch": 2}, {"sequence": 9}, {"threads": 2}, {"device": "cuda"},
    {"dtype": "bfloat16"}, {"round": 1}, {"twin": True}, {"options": {"level": "basic"}},
    {"seed": 1}, {"runtime": "other"}, {"sampling": Sampling(samples=20)}, {"spinning": False}])
def test_the_key_changes_with_all_that_changes_the_result(change):
    assert replace(cell(), **change).key("here") != cell().key("here")


def test_the_key_depends_on_the_environment_and_the_corpus_but_not_on_the_path():
    one = cell(batching="padded")
    assert replace(one, path="elsewhere").key("here", "words") == one.key("here", "words")
    assert one.key("there", "words") != one.key("here", "words")
    assert one.key("here", "others") != one.key("here", "words")
    assert cell().key("here", "words") == cell().key("here", "others")  # fixed shapes have none


@pytest.mark.parametrize("data", [
    {}, {"sampling": {}}, {**asdict(cell()), "extra": 1}, {**asdict(cell()), "sampling": {"n": 1}}])
def test_what_is_not_a_cell_is_refused(data):
    with pytest.raises(UsageError, match="not a cell"):
        cell_from(data)


@pytest.mark.parametrize("change", [{"batch": 0}, {"threads": 0}, {"sequence": -1}])
def test_a_cell_that_computes_nothing_is_refused(change):
    with pytest.raises(UsageError):
        Cell(**{**asdict(cell()), **change})


@pytest.mark.parametrize("change", [
    {"samples": 0}, {"min_samples": 0}, {"min_samples": 101}, {"warmup": -1}, {"seconds": -1.0}])
def test_a_sampling_that_cannot_be_done_is_refused(change):
    with pytest.raises(UsageError):
        Sampling(**change)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_without_a_sequence_is_named_by_its_batch():
    assert cell(batch=8, sequence=0).work() == "batch 8"
    assert cell(batch=8, sequence=16).work() == "8×16"
