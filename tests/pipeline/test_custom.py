"""Modules of one's own go through the same exporters, parity and manifest."""

from __future__ import annotations

import gc
import inspect
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import modelport
import pytest
import torch
from modelport import artifacts, checkpoints, pipeline
from modelport.checkpoints import consent, custom
from modelport.cli import execute
from modelport.errors import CheckpointError, ParityError, RemoteCodeRefused, UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.exporters.torchscript import TorchScriptOptions
from modelport.pipeline import benchmarking
from modelport.spec import Dim

FACTORY = """
import torch


class Scorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 8)
        self.inner = torch.nn.Linear(8, 5)

    def forward(self, ids, weights):
        mixed = (self.table(ids) * weights[..., None]).sum(1)
        return {"scores": self.inner(mixed).tanh(), "total": mixed.sum(-1)}


def scorer():
    torch.manual_seed(3)
    ids, weights = torch.randint(0, 11, (2, 6)), torch.rand(2, 6)
    axes = {0: "batch", 1: "length"}
    return Scorer(), {"ids": ids, "weights": weights}, {"ids": axes, "weights": axes}


def nothing():
    return 7
"""


WITH_TABLE = """
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass
class Settings:
    width: int = 4


@functools.lru_cache
def table(width):
    return torch.arange(width)


class Adding(torch.nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(settings.width))

    def forward(self, x):
        return x * self.weight + table(self.weight.shape[0])


def made():
    return Adding(Settings()), (torch.rand(2, 4),)
"""


class Frozen(torch.nn.Module):
    """Its loop runs as often as the example is long: right for the example, wrong for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            total = total + self.inner(x[:, i])
        return total


class Small(torch.nn.Module):
    """What a mask keeps of a table's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.table(ids) * mask[..., None]


class Branching(torch.nn.Module):
    """Takes one of two paths by what is in its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.up(x)
        return self.down(x)


class Alone(Branching):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch's own are called
        return self.chosen(input)


class Pair(Branching):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.chosen(x), self.chosen(y) + x


class Named(Branching):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last": self.chosen(x), "first": x * 2}


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))


@pytest.fixture
def factory(tmp_path: Path) -> Callable[[str], str]:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    return lambda name: f"{file}:{name}"


def test_a_module_in_memory_is_exported_and_proven(tmp_path: Path) -> None:
    artifact = modelport.export(linear(), (torch.rand(2, 4),), tmp_path / "out",
                                OnnxOptions(opset=11))
    assert artifact.manifest.proven
    assert artifact.manifest.source.model == "module:Sequential"
    assert artifact.spec.inputs[0].shape == ("batch", 4)
    assert artifact.spec.outputs[0].shape == ("batch", 3)


def test_another_module_of_the_same_weights_is_judged_by_itself(tmp_path: Path) -> None:
    for activation in (torch.nn.ReLU(), torch.nn.GELU()):
        module = linear()
        module[1] = activation
        out = tmp_path / type(activation).__name__
        assert modelport.export(module, (torch.rand(2, 4),), out).manifest.proven


def test_its_ranges_are_those_given(tmp_path: Path) -> None:
    artifact = modelport.export(
        linear(), {"input": torch.rand(2, 5, 4)}, tmp_path / "out", format="torchscript",
        dims={"input": {0: "batch", 1: "length"}}, ranges={"length": Dim(2, 5, 9)})
    assert artifact.spec.dims["length"] == Dim(2, 5, 9)
    assert artifact.manifest.proven


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_of_32_bits_are_drawn_like_those_of_64(dtype: torch.dtype, tmp_path: Path) -> None:
    axes = {0: "batch", 1: "length"}
    artifact = modelport.export(
        Small(), {"ids": torch.tensor([[6, 0, 3]], dtype=dtype),
                  "mask": torch.tensor([[1, 1, 0]], dtype=dtype)},
        tmp_path / "out", dims={"ids": axes, "mask": axes})
    assert artifact.manifest.proven
    assert {t.dtype for t in artifact.spec.inputs} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("module", [Alone(), Pair(), Named()], ids=lambda m: type(m).__name__)
def test_a_script_keeps_branches_by_data(module: torch.nn.Module, tmp_path: Path) -> None:
    """A trace of the same module has one path, and fails."""
    examples = [torch.randn(2, 4)] * len(inspect.signature(module.forward).parameters)
    artifact = modelport.export(module, examples, tmp_path / "out",
                                TorchScriptOptions(mode="script"), format="torchscript")
    facts = artifact.manifest.facts
    assert artifact.manifest.proven
    assert facts["route"] == "script"
    assert facts["branches"] == len(examples)


def test_its_attention_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would not change a module of one's own"):
        modelport.export(linear(), (torch.rand(2, 4),), tmp_path / "out",
                         TorchScriptOptions(attention="eager"), format="torchscript")
    artifact = modelport.export(linear(), (torch.rand(2, 4),), tmp_path / "out",
                                format="torchscript", validate=False)
    assert "attention" not in artifact.manifest.facts


def test_what_is_right_for_the_example_alone_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        modelport.export(Frozen(), (torch.rand(2, 5, 4),), tmp_path / "out",
                         OnnxOptions(strategy="trace"), dims={"x": {0: "batch", 1: "length"}})
    assert not (tmp_path / "out").exists()


def test_a_file_runs_only_when_it_is_allowed(factory: Callable[[str], str]) -> None:
    with pytest.raises(RemoteCodeRefused, match="--trust-remote-code"):
        pipeline.ModelRequest(factory("scorer")).resolve()


def test_a_factory_is_exported_and_validated_in_another_process(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    request = pipeline.ModelRequest(factory("scorer"), trust_remote_code=True)
    artifact = modelport.export("onnx", request, tmp_path / "out")
    assert artifact.manifest.proven
    assert artifact.spec.output_names == ("scores", "total")
    assert artifact.spec.inputs[0].shape == ("batch", "length")
    assert artifact.manifest.source.remote_code


def test_a_manifest_allows_nothing(
    factory: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = pipeline.ModelRequest(factory("scorer"), trust_remote_code=True)
    out = modelport.export("onnx", request, tmp_path / "out", validate=False).root
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n{FACTORY}")
    assert execute(["validate", str(out)]) == 4
    assert f"modelport validate {out} --trust-remote-code" in capsys.readouterr().err
    counted = benchmarking._counter(artifacts.read(out).manifest.source, None)(1, 5)
    assert str(counted).startswith("RemoteCodeRefused")
    assert not ran.exists()
    assert execute(["validate", str(out), "--trust-remote-code"]) == 0
    assert ran.exists()
    assert not consent.given().trust_remote_code


def test_a_module_of_ones_own_is_measured_beside_its_artifact(
    factory: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = factory("scorer")
    out = modelport.export("onnx", pipeline.ModelRequest(model, trust_remote_code=True),
                           tmp_path / "out", validate=False).root
    asked = ["bench", str(out), "--baseline", model, "--batch-sizes", "2", "--seq-lens", "5",
             "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--json",
             "--output", str(tmp_path / "run")]
    assert execute(asked) == 4
    assert "--trust-remote-code" in capsys.readouterr().out
    assert execute([*asked, "--trust-remote-code"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"], [row["detail"] for row in rows]


def test_an_artifact_of_a_factory_that_was_edited_since_is_found_out(
    factory: Callable[[str], str], tmp_path: Path
) -> None:
    request = pipeline.ModelRequest(factory("scorer"), trust_remote_code=True)
    modelport.export("onnx", request, tmp_path / "out")
    (tmp_path / "mine.py").write_text(FACTORY.replace(".tanh()", ".sigmoid()"))
    with consent.allowing(request.allowed):
        assert pipeline.validate_artifact(tmp_path / "out").verdict == "fail"


@pytest.mark.parametrize(("name", "said"), [
    ("nothing", "returned int"), ("absent", "has no function absent")])
def test_a_factory_that_makes_no_module(
    name: str, said: str, factory: Callable[[str], str]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        pipeline.ModelRequest(factory(name), trust_remote_code=True).resolve()


def test_a_file_is_a_module_that_python_knows(tmp_path: Path) -> None:
    """Annotations are looked up in it, and tables that are filled without data are forgotten."""
    (tmp_path / "one").mkdir()
    for file in (tmp_path / "mine.py", tmp_path / "one" / "mine.py"):
        file.write_text(WITH_TABLE)
    models = [pipeline.ModelRequest(f"{file}:made", trust_remote_code=True).resolve()
              for file in (tmp_path / "mine.py", tmp_path / "one" / "mine.py")]
    modules = [checkpoints.load_reference(model).module for model in models]
    homes = {sys.modules[type(module.model).__module__] for module in modules}
    assert len(homes) == 2
    assert all(home.table.cache_info().currsize == 0 for home in homes)


def test_a_forward_that_fails_is_told_as_what_was_asked_for(tmp_path: Path) -> None:
    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("needs a graph")

    with pytest.raises(UsageError, match=r"Failing can't be run.*needs a graph") as caught:
        modelport.export(Failing(), (torch.rand(2, 4),), tmp_path / "out")
    assert "ranges" in caught.value.hint


def test_a_module_goes_when_its_owner_lets_it_go() -> None:
    module, other = linear(), linear()
    name = custom.hold(custom.CustomModel(other, (torch.rand(2, 4),)))
    assert custom.hold(custom.CustomModel(module, (torch.rand(2, 4),))) == name
    checkpoint = pipeline.ModelRequest(name).resolve()
    kept = weakref.ref(module)
    del module
    gc.collect()
    assert checkpoint.make is not None
    made = checkpoint.make()
    assert isinstance(made, custom.CustomModel)
    assert kept() is not None
    del checkpoint, made, other
    gc.collect()
    assert kept() is None
    with pytest.raises(CheckpointError, match="gone"):
        pipeline.ModelRequest(name).resolve()


def test_a_module_of_another_process_cannot_be_had() -> None:
    with pytest.raises(CheckpointError, match="memory of another process"):
        pipeline.ModelRequest("module:Gone").resolve()


@pytest.mark.parametrize(("dims", "said"), [
    ({"y": {0: "batch"}}, "y, which is no input"), ({"input": {4: "batch"}}, "axis 4")])
def test_dims_that_do_not_fit(dims: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        modelport.export(linear(), {"input": torch.rand(2, 4)}, tmp_path / "out",
                         dims=dims)  # type: ignore[arg-type]
