"""What stands in for torch's compiler, symbolic shapes and sympy, until they are needed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modelport.checkpoints import standins
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import BertConfig, BertModel, CTRLConfig, CTRLModel

ALONE = """
import sys
from modelport.checkpoints import standins
standins.put()
import torch
torch.empty(2, device="meta").normal_()
HEAVY = ("sympy.core", "torch.utils._sympy", "torch._inductor", "torch._dynamo.eval_frame",
         "torch._prims.executor", "torch._export")
assert not set(HEAVY) & set(sys.modules)
"""

OWN = f"""
from modelport.checkpoints import lean
lean.own_process()
lean.preload()
{ALONE}"""

ASKS = {
    "compile": "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).sum() == 4",
    "export": """
class Module(torch.nn.Module):
    def forward(self, x):
        return x + 1
torch.export.export(Module(), (torch.ones(2),))""",
    "an attribute": "assert torch._dynamo.reset",
    "a part": """
import torch._dynamo.eval_frame as part
assert part is torch._dynamo.eval_frame is sys.modules["torch._dynamo.eval_frame"]""",
    "a name": "from torch._dynamo import optimize",
    "a mask of one's own": """
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():
    pass""",
}


def _output(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_process_of_an_export_imports_any_of_them(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=4)).save_pretrained(tmp_path / "bert")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "modelport", "export", "onnx", "--model",
         tmp_path / "bert", "--output", tmp_path / "out"],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True,
        check=True)
    found = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert found.count("torch.nn.modules.linear") == 2  # what a module imports is shown
    assert not {"sympy.core", "torch.utils._sympy.functions", "torch._inductor",
                "torch._dynamo.eval_frame", "torch.distributed.tensor", "torch._prims",
                "torch._meta_registrations", "huggingface_hub.hf_api"} & set(found)
    assert found.count("modelport.validate.bisect") < 3  # what runs the artifact judges nothing


def test_looking_through_all_modules_asks_for_nothing() -> None:
    _output(OWN + """
import inspect, importlib.util
inspect.getmodule(inspect.currentframe())
assert importlib.util.find_spec("torch._dynamo")
[hasattr(module, "__file__") for module in list(sys.modules.values())]
assert not set(HEAVY) & set(sys.modules)
""")


def test_settings_of_the_compiler_are_the_real_ones() -> None:
    _output(OWN + """
import torch, torch._dynamo.config
before = torch._dynamo.config
before.cache_size_limit = 3
torch._dynamo.reset()
assert torch._dynamo.config is before is sys.modules["torch._dynamo.config"]
assert torch._dynamo.config.cache_size_limit == 3
""")


@pytest.mark.parametrize("asked", ASKS)
def test_the_compiler_is_there_once_it_is_needed(asked: str) -> None:
    """It then knows what was decorated before it came."""
    _output(OWN + ASKS[asked] + """
import torch._dynamo
assert type(torch._dynamo).__name__ == "module"
assert sys.modules["torch._dynamo"] is torch._dynamo
from torch._dynamo import trace_rules, variables
from transformers.modeling_utils import PreTrainedModel
recorded = PreTrainedModel.can_record_outputs.fget
assert trace_rules.lookup_callable(recorded) is variables.TorchInGraphFunctionVariable
torch.empty(2, device="meta").normal_()
""")


DISABLED = {
    "a method": """
class Part(torch.nn.Linear):
    @torch._dynamo.disable
    def forward(self, x):
        return super().forward(x)
assert not set(HEAVY) & set(sys.modules)
assert Part(2, 2)(torch.ones(1, 2)).shape == (1, 2)""",
    "a module": "assert isinstance(torch._dynamo.disable(torch.nn.Linear(2, 2)), torch.nn.Module)",
    "a class": "assert issubclass(torch._dynamo.disable(torch.nn.Linear), torch.nn.Module)",
}


@pytest.mark.parametrize("what", DISABLED)
def test_what_is_disabled_stays_what_it_is(what: str) -> None:
    _output(OWN + DISABLED[what])


PLAIN = (True, False, 0, 1, 3, 0.5, (), (1, 2), [1, 2], (1, 3), torch.Size((1, 2)), (True, 2))


@pytest.mark.filterwarnings("ignore:guard_size_oblivious will be removed")
@pytest.mark.parametrize("name", standins.ANSWERS)
def test_plain_values_are_answered_as_the_real_functions_answer(name: str) -> None:
    plain, answer = standins.ANSWERS[name]
    real = getattr(symbolic_shapes, name)
    answered = 0
    for args in (*itertools.product(PLAIN), *itertools.product(PLAIN, PLAIN)):
        if not all(map(plain, args)) or (len(args) == 1) == (name == "sym_eq"):
            continue
        if len(args) == 2 and name not in ("sym_and", "sym_or", "sym_eq"):
            continue
        answered += 1
        expected = real(*args)
        assert (type(answer(*args)), answer(*args)) == (type(expected), expected), args
    assert answered


@pytest.mark.parametrize("name", standins.ANSWERS)
def test_symbols_are_never_taken_for_plain(name: str) -> None:
    plain, _ = standins.ANSWERS[name]
    size = ShapeEnv().create_unbacked_symint()
    for value in (size, size == 1, (2, size), torch.ones(()), None, "1"):
        assert not plain(value)


SYMBOLS = {
    "a symbol": """
import sympy
assert not isinstance(3, sympy.Basic)
assert isinstance(sympy.Symbol("x"), sympy.Basic) and issubclass(sympy.Symbol, sympy.Basic)""",
    "a union": """
import sympy
assert isinstance(sympy.Integer(3), int | sympy.Basic) and isinstance(3, sympy.Basic | int)""",
    "a subclass": """
import sympy
class One(sympy.Basic):
    pass
assert isinstance(One(), sympy.Basic)""",
    "a part of sympy": """
import sympy.core.numbers
from sympy.core import numbers
assert sympy.core.numbers is numbers and numbers.Integer is sympy.Integer""",
    "a name of sympy": "from sympy import S; assert S.One == 1",
    "symbolic shapes": """
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.fx.experimental.symbolic_shapes import ShapeEnv
size = ShapeEnv().create_unbacked_symint()
assert guard_or_false(size == 1) is False
assert sys.modules["torch.fx.experimental.symbolic_shapes"].__file__""",
    "another function": """
from torch.fx.experimental.symbolic_shapes import free_symbols
assert not {"sympy.core", "torch.utils._sympy"} & set(sys.modules)
assert free_symbols(torch.ones(2)) == set()""",
    "a class": """
from torch.fx.experimental.symbolic_shapes import ShapeEnv
assert isinstance(ShapeEnv, type)""",
    "a function that isn't there": """
try:
    from torch.fx.experimental.symbolic_shapes import nothing_like_this
except ImportError:
    pass
else:
    raise SystemExit("it was there")""",
    "a sum of dimensions": """
import onnx_ir
assert onnx_ir.SymbolicDim("a") + 1 == onnx_ir.SymbolicDim("a + 1")""",
    "an error": """
import sympy
import torch.fx.experimental.symbolic_shapes
try:
    torch.fx.experimental.symbolic_shapes.expect_true(1)
except AssertionError as error:
    assert "1" in str(error)
else:
    raise SystemExit("nothing raised")
sympy.Symbol""",
}


@pytest.mark.parametrize("asked", SYMBOLS)
def test_symbols_are_there_once_they_are_needed(asked: str) -> None:
    _output(ALONE + SYMBOLS[asked] + """
import sympy
assert type(sympy).__name__ == "module" and sympy.__file__
assert sympy.Symbol("x") + 1 - 1 == sympy.Symbol("x")
assert sys.modules["sympy.core.basic"].Basic is sympy.Basic
torch.empty(2, device="meta").normal_()
""")


TABLES = {
    "a table": """
from torch._decomp import meta_table
assert torch.ops.aten.index.Tensor in meta_table""",
    "a package": """
import torch._decomp
assert torch._decomp.get_decompositions([torch.ops.aten.silu.default])""",
    "an attribute of torch": "assert torch._refs.add(torch.ones(1), 1) == 2",
    "a part": """
import torch._prims.rng_prims as part
assert part is torch._prims.rng_prims""",
    "a part of a part": """
from torch._refs import nn
import torch._refs.nn.functional as part
assert part is nn.functional""",
    "the registrations": "assert torch._meta_registrations.meta_index_Tensor",
    "an operator": "assert torch.ops.prims.device_put.default",
    "fake tensors": """
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    assert torch.randn(3)[torch.tensor([0, 1])].shape == (2,)""",
    "a distributed tensor": "import torch.distributed.tensor",
    "the compiler": "assert torch._dynamo.reset",
}


@pytest.mark.parametrize("asked", TABLES)
def test_what_operators_do_without_data_is_there_once_it_is_needed(asked: str) -> None:
    _output(OWN + TABLES[asked] + """
for name in ("_decomp", "_refs", "_prims", "_meta_registrations"):
    module = sys.modules[f"torch.{name}"]
    assert getattr(torch, name) is module and module.__file__
    assert type(module).__name__ == "module"
assert torch.ops.prims.device_put is torch.ops.prims.device_put
assert type(torch.ops.prims).__name__ == "_OpNamespace"
torch.nn.functional.embedding_bag(torch.zeros(1, 2, dtype=torch.long, device="meta"),
                                  torch.empty(4, 3, device="meta"))
""")


def test_a_torch_that_nobody_tried_is_imported_as_it_is() -> None:
    _output("""
import sys
from modelport.checkpoints import lean, standins
standins._SEEN = ("1.0.",)
lean.own_process()
lean.preload()
import torch
assert not isinstance(torch._meta_registrations, standins.StandIn) and torch.ops.prims.device_put
assert not isinstance(torch.optim, standins.StandIn)
assert isinstance(torch._dynamo, standins.StandIn)
""")


COUNT = """
calls = []
def shape():
    calls.append(1)
    table = torch.empty(4, 3, device="meta")
    rows = torch.zeros(1, 2, dtype=torch.long, device="meta")
    return torch.nn.functional.embedding_bag(rows, table).shape
"""


def test_what_stops_for_want_of_an_operator_runs_again_with_it() -> None:
    """torch has no ``_embedding_bag`` without data but the one that Python registers."""
    _output(OWN + COUNT + """
try:
    shape()
except NotImplementedError:
    pass
else:
    raise SystemExit("torch has it: the test needs another operator")
assert standins.completed(shape)() == (1, 3) and len(calls) == 3
assert standins.completed(shape)() == (1, 3) and len(calls) == 4
def never():
    calls.append(1)
    raise NotImplementedError("of its own")
try:
    standins.completed(never)()
except NotImplementedError as error:
    assert str(error) == "of its own"
assert len(calls) == 5
""")


@pytest.mark.parametrize("function", ["load", "load_reference"])
def test_a_model_that_is_built_with_such_an_operator_loads(tmp_path: Path, function: str) -> None:
    """CTRL's table of positions takes a remainder; without data only Python has that."""
    CTRLModel(CTRLConfig(vocab_size=8, n_embd=4, n_layer=1, n_head=1, dff=4,
                         n_positions=8)).save_pretrained(tmp_path)
    _output(OWN + f"""
from modelport import checkpoints
from modelport.pipeline import ModelRequest
found = ModelRequest({str(tmp_path)!r}, task="feature-extraction").resolve()
assert isinstance(sys.modules["torch._meta_registrations"], standins.StandIn)
model = checkpoints.{function}(found)
assert not isinstance(sys.modules["torch._meta_registrations"], standins.StandIn)
assert model.spec.outputs and type(model.module).__name__ == "Adapter"
""")


def test_names_wait_for_their_first_use() -> None:
    _output("""
from modelport.checkpoints import standins
Path = standins.Later("pathlib", "Path")
PurePath = standins.Later("pathlib", "PurePath")
class Place:
    where: Path | None = None
    other: None | PurePath = None
assert isinstance(Path(".").resolve(), Path) and not isinstance(3, Path)
assert Path.cwd() and issubclass(type(Path.cwd()), PurePath)
class Own(PurePath):
    pass
assert [kind.__name__ for kind in Own.__mro__][1] == "PurePath"
try:
    Path.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("nothing raised")
""")


ASIDE = {
    "a part": """
import torch.ao.nn.quantized.dynamic as part
assert torch.ao.nn.quantized.dynamic is part""",
    "a step": "torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1).step()",
    "data": """
from torch.utils.data import DataLoader
assert len(list(DataLoader([1, 2]))) == 2""",
    "another quantisation": """
plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
(found,) = torch.quantization.quantize_dynamic(plain)
assert isinstance(found, torch.nn.quantized.dynamic.Linear)""",
    "a profile": """
with torch.profiler.profile() as profile:
    torch.ones(3) + 1
assert profile.key_averages()""",
    "a mask": "torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))",
    "a class": "assert torch.nn.intrinsic.ConvReLU2d and torch.nn.qat.Linear",
    "a submodule": "import torch.optim.lr_scheduler as part; assert part.StepLR",
    "export": "torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)",
    "training": "import transformers.trainer",
}


@pytest.mark.parametrize("asked", ASIDE)
def test_what_stands_aside_is_there_once_it_is_needed(asked: str) -> None:
    _output(OWN + "assert not set(standins._ASIDE) - {"
            "name for name, module in sys.modules.items() if isinstance(module, standins.StandIn)}"
            + "\n" + ASIDE[asked] + """
for name in standins._ASIDE:
    package, _, short = name.rpartition(".")
    assert getattr(sys.modules[package], short) is sys.modules[name]
""")
