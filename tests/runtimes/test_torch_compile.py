"""The source module through torch.compile: one compilation for all shapes."""

from __future__ import annotations

import shutil

import hand_made
import numpy as np
import pytest
import torch
from modelport import runtimes
from modelport.errors import UsageError

RUNTIME = runtimes.get("torch_compile")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")),
        reason="there is no C++ compiler here",
    ),
]


class Waves(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.sin(values) * values.size(1),)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_equal_to_eager_at_every_shape(mode: str) -> None:
    model = hand_made.loaded(Waves(), hand_made.spec(hand_made.VALUES))
    compiled = RUNTIME.open(model, options={"mode": mode})
    eager = runtimes.get("torch_eager").open(model)
    with compiled, eager:
        for batch, length in ((2, 3), (4, 5), (1, 1), (8, 16)):
            feeds = hand_made.feeds(model.spec, batch=batch, length=length)
            np.testing.assert_allclose(
                compiled.run(feeds)["y"], eager.run(feeds)["y"], rtol=1e-5, atol=1e-6
            )


def test_an_unknown_mode_names_the_known_ones() -> None:
    model = hand_made.loaded(Waves(), hand_made.spec(hand_made.VALUES))
    with pytest.raises(UsageError, match=r"(?s)fastest.*reduce-overhead"):
        RUNTIME.open(model, options={"mode": "fastest"})


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in str(RUNTIME.unavailable())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_feeds_follow_the_precision_of_the_module(dtype: torch.dtype) -> None:
    """torch_eager and torch_compile run whatever precision the model was loaded in."""
    torch.manual_seed(0)
    spec = hand_made.spec(hand_made.VALUES, output=("batch", 3))

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.head(values),)

    model = hand_made.loaded(Head().to(dtype), spec)
    feeds = hand_made.feeds(spec, batch=2, length=4)
    with runtimes.get("torch_eager").open(model) as session:
        value = session.run(feeds)["y"]
    assert str(value.dtype) == str(dtype).removeprefix("torch.")
