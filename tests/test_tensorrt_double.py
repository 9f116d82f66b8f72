"""The stand-in for TensorRT refuses what the real bindings of that version would refuse."""

from __future__ import annotations

import pytest
import tensorrt_double
from tensorrt_double import Double

MAJORS = ("10", "11")


class Behaviour:
    def Builder_create_network(self, builder: object, flags: int = 0) -> int:
        return flags

    def Builder_create_optimization_profile(self, builder: object) -> str:
        return "profile"


@pytest.fixture(params=MAJORS)
def trt(request: pytest.FixtureRequest) -> Double:
    return tensorrt_double.load(request.param, Behaviour())


def test_what_version_11_removed_raises_there_and_not_in_10() -> None:
    ten, eleven = (tensorrt_double.load(m) for m in MAJORS)
    assert int(ten.BuilderFlag.FP16) == 0
    assert not hasattr(eleven.BuilderFlag, "FP16")
    with pytest.raises(AttributeError):
        eleven.BuilderFlag.FP16  # noqa: B018
    for flag in ("BF16", "INT8", "FP8", "OBEY_PRECISION_CONSTRAINTS"):
        assert hasattr(ten.BuilderFlag, flag)
        assert not hasattr(eleven.BuilderFlag, flag)
    assert not hasattr(eleven.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    assert hasattr(ten.ICudaEngine, "device_memory_size")
    assert not hasattr(eleven.ICudaEngine, "device_memory_size")
    assert not hasattr(eleven.IBuilderConfig, "int8_calibrator")


def test_enum_values_are_those_of_the_version() -> None:
    ten, eleven = (tensorrt_double.load(m) for m in MAJORS)
    assert int(ten.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 1
    assert int(eleven.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == 0
    assert int(ten.BuilderFlag.VERSION_COMPATIBLE) == 13
    assert int(eleven.BuilderFlag.VERSION_COMPATIBLE) == 12


def test_unknown_names_raise(trt: Double) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        trt.Nonsense  # noqa: B018
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    with pytest.raises(AttributeError):
        builder.max_workspace_size = 1
    with pytest.raises(AttributeError):
        builder.build_cuda_engine(None)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {}), ((), {"flag": 1}), (("1",), {}), ((True,), {}), ((1,), {"flags": 1})],
)
def test_wrong_arguments_raise(
    trt: Double, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    builder = trt.Builder(trt.Logger())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(*args, **kwargs)
    assert builder.create_network(1) == builder.create_network(flags=1) == 1
    assert trt.called("Builder.create_network") == [{"flags": 1}, {"flags": 1}]


def test_an_enum_is_no_int_and_an_int_no_enum(trt: Double) -> None:
    builder = trt.Builder(trt.Logger())
    with pytest.raises(TypeError):
        builder.create_network(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    config = trt.make("IBuilderConfig")
    with pytest.raises(TypeError):
        config.set_flag(6)
    with pytest.raises(TypeError):
        1 << trt.BuilderFlag.TF32


def test_read_only_properties_stay_so(trt: Double) -> None:
    engine = trt.make("ICudaEngine")
    with pytest.raises(AttributeError, match="read-only"):
        engine.num_io_tensors = 3


def test_a_class_that_only_the_library_makes_cannot_be_made(trt: Double) -> None:
    with pytest.raises(TypeError, match="No constructor"):
        trt.ICudaEngine()


def test_a_derived_class_must_initialise_its_base(trt: Double) -> None:
    class Careless(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.lines: list[str] = []

    class Careful(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

    assert trt.Builder(Careful())
    with pytest.raises(TypeError, match="must be called"):
        trt.ILogger.log(Careless(), trt.ILogger.ERROR, "x")


def test_calls_and_assignments_are_recorded_in_order(trt: Double) -> None:
    config = trt.make("IBuilderConfig")
    config.builder_optimization_level = 4
    trt.Builder(trt.Logger()).create_optimization_profile()
    assert [(k, n) for k, n, _ in trt.calls] == [
        ("IBuilderConfig", "builder_optimization_level="), ("Logger", "__init__"),
        ("Builder", "__init__"), ("Builder", "create_optimization_profile"),
    ]  # fmt: skip


def test_what_the_double_does_not_know_is_said(trt: Double) -> None:
    with pytest.raises(NotImplementedError):
        trt.make("Builder").reset()
