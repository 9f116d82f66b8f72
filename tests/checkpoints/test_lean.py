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
assert import_utils.create_import_structure_from_path.__name__ != "<lambda>"
"""

NAMES = """
import transformers.models
print(len(transformers.models.__all__), *sorted(transformers.models.__all__))
from transformers.models.bert import BertModel
from transformers.loss.loss_for_object_detection import linear_sum_assignment
print(*linear_sum_assignment([[1, 2], [0, 3]]))
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
    code = "import gc; gc.disable()\nfrom modelport.checkpoints import lean\nlean.preload()\n"
    assert _output(code + "print(gc.isenabled(), gc.get_freeze_count())") == "False 0\n"
