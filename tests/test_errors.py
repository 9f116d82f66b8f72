from __future__ import annotations

import re

import modelport.errors as errors
import pytest

CLASSES = [
    c for c in vars(errors).values()
    if isinstance(c, type) and issubclass(c, errors.ModelportError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_the_drawn_tree_is_the_real_one(kind: type[errors.ModelportError]) -> None:
    drawn = re.search(rf"{kind.__name__}\s+(\d)", errors.__doc__ or "")
    assert drawn, f"{kind.__name__} is missing from the module's docstring"
    assert int(drawn.group(1)) == kind.exit_code


def test_an_error_says_found_allowed_and_what_to_try() -> None:
    error = errors.UsageError("opset 9", allowed="11 to 25", hint="--opset 11")
    assert str(error) == "opset 9\nallowed: 11 to 25\ntry: --opset 11"
    assert str(errors.UsageError("only this")) == "only this"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_an_error_survives_as_data(kind: type[errors.ModelportError]) -> None:
    error = kind("found", allowed="allowed", hint="hint")
    again = errors.from_record(error.record())
    assert type(again) is kind
    assert again.record() == error.record()


def test_what_is_no_error_of_ours_becomes_a_plain_one() -> None:
    for kind in ("Unheard", "Any", "from_record"):
        record = {**errors.UsageError("found").record(), "kind": kind}
        assert type(errors.from_record(record)) is errors.ModelportError
    error = errors.unexpected(KeyError("a"))
    assert (error.found, error.exit_code) == ("unexpected KeyError: 'a'", 1)
