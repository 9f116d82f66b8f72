"""What importing transformers through us costs, and that it is the same transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEAN = """
import gc, sys
from modelport.checkpoints import lean
lean.preload()
from transformers.utils import import_utils
assert "torch" in sys.modules and "scipy.optimize" not in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 500_000
assert import_utils.create_import_structure_from_path.__name__ != "answer"
"""

NAMES = """
import transformers.models
print(len(transformers.models.__all__), *sorted(transformers.models.__all__))
from transformers.models.bert import BertModel
from transformers.loss.loss_for_object_detection import linear_sum_assignment
print(*linear_sum_assignment([[1, 2], [0, 3]]))
"""


OWN = """
import sys
from modelport.checkpoints import lean
lean.own_process()
lean.preload()
HEAVY = ("sympy", "torch._inductor", "torch.distributed.tensor", "torch._dynamo.eval_frame")
assert not set(HEAVY) & set(sys.modules)
"""

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


def test_it_holds_what_the_plain_import_holds() -> None:
    lean = _output(LEAN + NAMES)
    assert lean == _output(NAMES)
    assert int(lean.split()[0]) > 1000


def test_a_caller_without_collection_stays_without() -> None:
    assert _output("""
import gc
gc.disable()
before = gc.get_freeze_count()
from modelport.checkpoints import lean
lean.preload()
print(gc.isenabled(), gc.get_freeze_count() - before)
""") == "False 0\n"


def test_a_program_of_our_own_imports_no_compiler() -> None:
    own = _output(OWN + NAMES)
    assert own == _output(NAMES)


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
    _output(OWN + "import torch\ntorch.empty(2, device='meta').normal_()\n" + ASKS[asked] + """
import torch._dynamo
assert type(torch._dynamo).__name__ == "module"
assert sys.modules["torch._dynamo"] is torch._dynamo
from torch._dynamo import trace_rules, variables
from transformers.modeling_utils import PreTrainedModel
recorded = PreTrainedModel.can_record_outputs.fget
assert trace_rules.lookup_callable(recorded) is variables.TorchInGraphFunctionVariable
torch.empty(2, device="meta").normal_()
""")


def test_a_version_that_wants_more_is_imported_as_it_is() -> None:
    _output("""
import sys
from modelport.checkpoints import lean
lean.own_process()
lean._WANTED = ("transformers.nothing_of_that_name",)
lean.preload()
import transformers.modeling_utils
from transformers import BertModel
assert transformers.modeling_utils.PreTrainedModel in BertModel.__mro__
""")
