"""Tokens against tokens: equal, or different at a tie; and answers that tell prompts apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from modelport import validate
from modelport.validate.generation import ALIKE, spread

WANTED = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def compared(actual: np.ndarray, decide: object = None) -> validate.Result:
    return validate.compare_tokens("case", "greedy", actual, WANTED, decide)


def test_equal_tokens_pass_and_are_counted() -> None:
    result = compared(WANTED.copy())
    assert (result.verdict, result.gate, result.elements) == ("pass", "generation", 8)


def test_a_difference_fails_where_nothing_excuses_it() -> None:
    result = compared(np.array([[1, 2, 9, 4], [5, 6, 7, 8]]))
    assert result.verdict == "fail"
    assert "row 0 differs at token 2" in result.reason


@pytest.mark.parametrize(
    ("margin", "error", "verdict"),
    [(0.0, 1e-6, "pass"), (1.9e-6, 1e-6, "pass"), (3e-6, 1e-6, "fail"), (math.nan, 1e-6, "fail"),
     (1.0, math.nan, "fail")],
)  # fmt: skip
def test_only_a_tie_excuses_a_difference(margin: float, error: float, verdict: str) -> None:
    asked: list[tuple[int, int]] = []

    def decide(row: int, step: int) -> tuple[float, float]:
        asked.append((row, step))
        return margin, error

    result = compared(np.array([[1, 2, 3, 4], [5, 0, 0, 0]]), decide)
    assert asked == [(1, 1)]  # what follows a difference says nothing
    assert result.verdict == verdict
    assert result.elements == 5


def test_a_sequence_that_ends_early_differs() -> None:
    result = compared(WANTED[:, :3])
    assert result.verdict == "fail"
    assert "token 3" in result.reason


def test_ties_in_every_first_token_prove_nothing() -> None:
    result = compared(WANTED + 10, lambda row, step: (0.0, 1.0))
    assert result.verdict == "fail"
    assert result.reason == "nothing was compared"


def test_answers_that_are_alike_are_suspect() -> None:
    rng = np.random.default_rng(0)
    answers = rng.standard_normal((4, 99))
    assert validate.diversity("*", "first logits", answers).verdict == "pass"
    alike = np.repeat(answers[:1], 4, axis=0) + 1e-5 * rng.standard_normal((4, 99))
    result = validate.diversity("*", "first logits", alike)
    assert result.verdict == "suspect"
    assert "equal answers prove nothing" in result.reason


def test_two_equal_answers_among_others_are_seen() -> None:
    answers = np.random.default_rng(0).standard_normal((4, 99))
    answers[3] = answers[1]
    assert spread(answers) < ALIKE


@pytest.mark.parametrize("answers", [np.zeros((3, 5)), np.ones((1, 5))])
def test_silence_and_a_single_answer_have_no_spread(answers: np.ndarray) -> None:
    assert spread(answers) == 0.0
