"""The harness: a pair in a process of its own, what it records, and the page made of records."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import page
import pytest
from measure import Attempt, Record
from pairs import _ORDER as ORDER
from pairs import MUST, Pair, pairs

HARNESS = Path(__file__).parents[2] / "benchmarks" / "breadth"


def record(model_type: str, task: str, outcome: str, cause: str = "", **more: object) -> Record:
    tried = tuple(Attempt(s, 17, "failed") for s in ("trace", "dynamo", "transformers"))
    return Record(model_type, task, "Cls", "text encoder", True, outcome,  # type: ignore[arg-type]
                  cause=cause, attempts=tried if outcome in ("wrong", "failed") else (), **more)


@pytest.mark.timeout(280)
def test_pairs_are_measured_recorded_and_not_measured_again(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    command = [sys.executable, str(HARNESS), "--only", "distilbert", "--tasks",
               "fill-mask,multiple-choice", "--strategies", "trace,torchscript", "--no-page",
               "--records", str(records)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [Record.of(json.loads(line)) for line in records.read_text().splitlines()]
    assert {r.task for r in found} == {"fill-mask", "multiple-choice"}
    for r in found:
        assert (r.outcome, r.strategy, r.torchscript) == ("right", "trace", "right"), first.stdout
        assert r.comparisons > 20
        assert r.attempts[0].outcome == "right"
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == ""
    assert len(records.read_text().splitlines()) == 2


def test_what_fails_by_a_hair_is_not_refused_beforehand() -> None:
    said = "logits: error 3.81 times that of the reference, {} times what is allowed"
    near, far = (record(name, "fill-mask", "wrong", said.format(times))
                 for name, times in (("near", "1.18"), ("far", "1.18e+04")))
    assert set(page.known_failures([near, far])["onnx"]) == {"far"}  # type: ignore[call-overload]


def test_every_required_model_type_has_pairs() -> None:
    every = pairs()
    assert set(MUST) <= {p.model_type for p in every}
    assert every[0].must
    assert len({(p.model_type, p.task) for p in every}) == len(every)


def test_the_page_counts_what_ran_and_claims_nothing_of_the_rest() -> None:
    made = [record("bert", "fill-mask", "right", strategy="trace", opset=17, seconds=2.0),
            record("bert", "text-classification", "wrong", "scores came out static"),
            record("odd", "fill-mask", "not eager", "X needs inputs that can't be derived: y")]
    every = [Pair(r.model_type, r.task, "Cls", "text encoder") for r in made]
    text = page.markdown(made, [*every, Pair("bert", "ctc", "Cls", "text encoder")])
    assert "4 pairs are listed, 3 were measured, 1 were not reached" in text
    assert "2 ran eagerly from a tiny config; of these **1 (50.0 %)" in text
    assert "| wrong | a dimension came out static | 1 | bert |" in text
    assert "ctc: not reached" in text


def test_the_published_page_is_made_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = json.loads(page.RESULTS.read_text("utf-8"))
    monkeypatch.setattr(page, "environment", lambda: measured["environment"])
    records = [Record.of(value) for value in measured["records"]]
    every = [Pair(r.model_type, r.task, r.class_name, r.kind)  # type: ignore[arg-type]
             for r in records]
    every.sort(key=lambda p: (not p.must, ORDER.index(p.kind)))
    assert measured["pairs"] == len(every)
    assert page.markdown(records, every) == page.PAGE.read_text("utf-8")


def test_known_failures_are_those_that_everything_was_tried_on() -> None:
    tried = record("bert", "fill-mask", "failed", "scores came out static", torchscript="right")
    traced = Record("bert", "ctc", "Cls", "text encoder", True, "failed",
                    attempts=(Attempt("trace", 17, "failed"),))
    right = record("bert", "question-answering", "right")
    found = page.known_failures([tried, traced, right])["onnx"]
    assert found == {"bert": {"fill-mask": {
        "cause": "a dimension came out static", "torchscript": True,
        "tasks": ["question-answering"]}}}


def test_what_is_published_names_no_directory_of_this_machine() -> None:
    said = f"Load model from {tempfile.gettempdir()}/coverage-a_1/model.onnx failed at /model/x"
    assert page.placeless(said) == "Load model from model.onnx failed at /model/x"
    assert page.placeless(f'"{sys.prefix}/lib/a.py"') == '"a.py"'
