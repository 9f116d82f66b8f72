"""What importing transformers through us costs, and that it is the same transformers."""

from __future__ import annotations

import subprocess
import sys

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
HEAVY = ("torch._inductor", "torch.distributed.tensor", "torch._dynamo.eval_frame", "sympy.core",
         "torch.utils._sympy")
assert not set(HEAVY) & set(sys.modules)
"""


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
