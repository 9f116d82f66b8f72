"""CUDA graphs by bucket: how requests reach a recording, and on a GPU, that it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelport import checkpoints, runtimes, validate
from modelport.errors import BackendUnavailable
from modelport.runtimes import torch_cudagraphs

RUNTIME = runtimes.get("torch_cudagraphs")
SHAPES = ((3, 5), (2, 17), (1, 1), (4, 5), (3, 6))


@pytest.fixture
def model(tiny: Callable[..., Path]) -> checkpoints.LoadedModel:
    return checkpoints.load_reference(checkpoints.resolve(str(tiny("bert"))))


def feeds(model: checkpoints.LoadedModel, batch: int, sequence: int) -> dict[str, np.ndarray]:
    plan = validate.plan(model.spec, sizes={"batch": (batch,), "sequence": (sequence,)})
    right = [case for case in plan.cases if case.padding in ("right", "none")]
    return validate.draw(model.spec, right[-1])


def test_without_a_gpu_it_says_so(model: checkpoints.LoadedModel) -> None:
    assert RUNTIME.unavailable("cpu") == "CUDA graphs run on cuda only; add --device cuda"
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            RUNTIME.open(model, "cuda")


def _interpreted(forward: Any, inputs: Sequence[torch.Tensor]) -> torch_cudagraphs.Recording:
    """What a recording does, on the CPU: runs on its inputs, writes into its outputs."""
    with torch.inference_mode():
        outputs = tuple(torch.empty_like(value) for value in forward(*inputs))

    @torch.inference_mode()
    def replay() -> None:
        for held, value in zip(outputs, forward(*inputs), strict=True):
            held.copy_(value)

    return torch_cudagraphs.Recording(inputs, outputs, replay)


def test_every_shape_is_served_by_its_bucket(
    model: checkpoints.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_cudagraphs, "record", _interpreted)
    eager = runtimes.get("torch_eager").open(model)
    session = torch_cudagraphs.CudaGraphSession(model, "cpu", {"threads": 0, "compiled": False})
    with eager, session:
        for batch, sequence in (*SHAPES, *reversed(SHAPES)):
            given = feeds(model, batch, sequence)
            wanted = eager.run(given)
            for name, value in session.run(given).items():
                np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5)
            launch = session.bind(given)
            launch()
            for name, value in launch.download().items():
                np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5)
        # (3, 5), (4, 5) and (3, 6) are two buckets: 3 × 6 and 4 × 6.
        assert len(session.warm_up_seconds) == 4


def test_a_launch_keeps_its_own_inputs(
    model: checkpoints.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch_cudagraphs.Recording] = []

    def recorded(forward: Any, inputs: Sequence[torch.Tensor]) -> torch_cudagraphs.Recording:
        made.append(_interpreted(forward, inputs))
        return made[-1]

    monkeypatch.setattr(torch_cudagraphs, "record", recorded)
    eager = runtimes.get("torch_eager").open(model)
    session = torch_cudagraphs.CudaGraphSession(model, "cpu", {"threads": 0, "compiled": False})
    with eager, session:
        first, second = feeds(model, 3, 6), feeds(model, 3, 5)
        launch = session.bind(first)
        session.bind(second)()
        session.run(second)
        launch()
        for value, wanted in zip(made[0].outputs, eager.run(first).values(), strict=True):
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("compiled", [False, True])
def test_replay_equals_eager(model: checkpoints.LoadedModel, compiled: bool) -> None:
    eager = runtimes.get("torch_eager").open(model, "cuda")
    session = RUNTIME.open(model, "cuda", {"compiled": compiled})
    with eager, session:
        for batch, sequence in (*SHAPES, *reversed(SHAPES)):
            given = feeds(model, batch, sequence)
            wanted = eager.run(given)
            for name, value in session.run(given).items():
                np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5)
