"""One suite for every runtime: the same contract, whatever runs below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from modelport import checkpoints, exporters, pipeline, runtimes, validate
from modelport.errors import BackendUnavailable, SpecError, UsageError
from modelport.session import Session
from modelport.spec import ModelSpec

Opened = tuple[Session, ModelSpec]


@pytest.fixture(scope="module")
def sources(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, device: str
) -> Callable[[str], object]:
    """What a runtime opens, by format: an artifact of a tiny model, or the model itself."""
    made: dict[str, object] = {}
    model = tiny("bert")

    def get(name: str) -> object:
        if name not in made:
            if name == runtimes.CHECKPOINT:
                made[name] = checkpoints.load_reference(checkpoints.resolve(str(model)))
            else:
                exporter = exporters.get(name)
                fields = {f.name for f in dataclasses.fields(exporter.options_type)}
                options = exporter.options_type(
                    **({"device": device} if "device" in fields else {})
                )
                exporter.check(options)
                out = tmp_path_factory.mktemp(name) / "out"
                made[name] = pipeline.export(
                    name, pipeline.ModelRequest(str(model)), out, options, validate=False
                )
        return made[name]

    return get


@pytest.fixture(params=[(r, f) for r in runtimes.names() for f in runtimes.get(r).formats],
                ids=lambda p: f"{p[0]}-{p[1]}")  # fmt: skip
def opened(
    request: pytest.FixtureRequest, sources: Callable[[str], object], device: str
) -> Iterator[Session]:
    name, format_ = request.param
    runtime = runtimes.get(name)
    if reason := runtime.unavailable(device):
        pytest.skip(reason)
    try:
        source = sources(format_)
    except BackendUnavailable as absent:
        pytest.skip(str(absent))
    with runtime.open(source, device) as session:  # type: ignore[arg-type]
        yield session


def feeds(spec: ModelSpec, batch: int, sequence: int) -> dict[str, np.ndarray]:
    plan = validate.plan(spec, sizes={"batch": (batch,), "sequence": (sequence,)})
    return validate.draw(spec, plan.cases[0])


def test_outputs_have_the_names_dtypes_and_shapes_of_the_spec(opened: Session) -> None:
    for batch, sequence in ((1, 1), (3, 7), (2, 40)):
        outputs = opened.run(feeds(opened.spec, batch, sequence))
        assert tuple(outputs) == opened.spec.output_names
        for tensor in opened.spec.outputs:
            value = outputs[tensor.name]
            shape = opened.spec.shape(tensor, {"batch": batch, "sequence": sequence})
            assert (str(value.dtype), value.shape) == (tensor.dtype, shape)
            assert np.isfinite(value).all()


def test_the_same_feeds_give_the_same_outputs(opened: Session) -> None:
    given = feeds(opened.spec, 3, 5)
    first, second = opened.run(given), opened.run(given)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_outputs_are_the_callers_to_keep(opened: Session) -> None:
    first = opened.run(feeds(opened.spec, 2, 5))
    kept = {name: value.copy() for name, value in first.items()}
    other = {n: np.flip(v, axis=1).copy() for n, v in feeds(opened.spec, 2, 5).items()}
    opened.run(other)
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_wrong_feeds_are_refused_and_the_session_lives_on(opened: Session) -> None:
    good = feeds(opened.spec, 2, 5)
    first = opened.spec.input_names[0]
    for bad in (
        {},
        {**good, "unheard_of": good[first]},
        {**good, first: good[first].astype(np.int32)},
        {**good, first: good[first][0]},
        {n: v[:0] for n, v in good.items()},
        {n: np.repeat(v, 9, axis=1) for n, v in good.items()},  # 45 tokens, 40 positions
    ):
        with pytest.raises(SpecError):
            opened.run(bad)
        with pytest.raises(SpecError):
            opened.bind(bad)
    opened.run(good)


def test_bind_launches_again_and_again(opened: Session) -> None:
    launch = opened.bind(feeds(opened.spec, 2, 7))
    for _ in range(3):
        launch()
    opened.synchronize()


SHAPE_WORK = {
    "Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Cast", "Constant",
    "ConstantOfShape", "Range", "Reshape", "Expand", "Equal", "Where", "Add", "Sub", "Mul", "Div",
}  # fmt: skip
"""What ONNX Runtime rightly leaves on the CPU of a GPU session: arithmetic on sizes."""


def test_placement_is_where_it_was_asked_for(opened: Session, device: str) -> None:
    placement = opened.placement()
    assert placement.device == device
    assert placement.providers
    if device == "cuda" and placement.nodes:
        assert placement.nodes.get("CUDAExecutionProvider", 0) > placement.nodes.get(
            "CPUExecutionProvider", 0
        )
        assert set(placement.fallback) <= SHAPE_WORK


def test_closing_twice_is_allowed_and_running_then_is_not(opened: Session) -> None:
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        opened.run(feeds(opened.spec, 1, 2))


@pytest.mark.parametrize("name", runtimes.names())
def test_an_unknown_option_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)no option nonsense.*allowed"):
        runtimes.get(name).resolve_options({"nonsense": 1})


@pytest.mark.parametrize("name", runtimes.names())
def test_an_absent_device_says_why(name: str, sources: Callable[[str], object]) -> None:
    import torch

    runtime = runtimes.get(name)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    reason = runtime.unavailable("cuda")
    assert reason
    if runtimes.CHECKPOINT in runtime.formats:
        with pytest.raises(BackendUnavailable):
            runtime.open(sources(runtimes.CHECKPOINT), "cuda")  # type: ignore[arg-type]
