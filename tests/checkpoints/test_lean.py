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
assert gc.isenabled() and not gc.get_freeze_count()
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


def test_what_a_caller_froze_stays_frozen() -> None:
    _output("""
import gc
gc.freeze()
before = gc.get_freeze_count()
from modelport.checkpoints import lean
lean.preload()
assert gc.isenabled() and 0 < gc.get_freeze_count() <= before  # some of it was freed
""")


def test_a_program_of_our_own_collects_nothing_that_an_import_made() -> None:
    _output(OWN + """
import gc
assert gc.isenabled() and gc.get_freeze_count() > 100_000
""")


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


def test_what_talks_to_a_hub_comes_when_it_is_used() -> None:
    _output(OWN + """
assert "huggingface_hub.hf_api" not in sys.modules
import huggingface_hub
from transformers.utils import hub
from transformers import safetensors_conversion
assert isinstance(hub.hf_api(), huggingface_hub.HfApi) and isinstance(hub.hf_api(), hub.HfApi)
assert type(huggingface_hub.HfApi) is type and huggingface_hub.snapshot_download.__module__
assert safetensors_conversion.Discussion.__call__
assert not [name for name, value in vars(huggingface_hub).items()
            if type(value).__name__ == "Later"]
""")


def test_a_frame_knows_its_module_as_well_as_the_search_does() -> None:
    _output("""
import inspect, sys
search = inspect.getmodule
from modelport.checkpoints import lean
lean.own_process()
import json.decoder

def frames():
    try:
        json.decoder.JSONDecoder().decode("{")
    except ValueError as error:
        trace = error.__traceback__
        while trace:
            yield trace.tb_frame
            trace = trace.tb_next

found = [inspect.getmodule(frame) for frame in frames()]
assert found == [search(frame) for frame in frames()] and json.decoder in found
spoof = {"__name__": "json", "inspect": inspect, "sys": sys}
exec("here = inspect.getmodule(sys._getframe())", spoof)  # says that it is json's
assert spoof["here"] is not sys.modules["json"]
assert inspect.getmodule(json.decoder.JSONDecoder) is json.decoder
""")


RENAMINGS = """
from transformers import conversion_mapping
for name, found in conversion_mapping._build_checkpoint_conversion_mapping().items():
    for transform in found:
        key = "model.layers.0.self_attn.q_proj.weight"
        print(name, transform.compiled_sources.pattern, transform.rename_source_key(key))
"""


def test_renamings_of_weights_are_compiled_when_they_are_used() -> None:
    own = _output(OWN + """
from copy import deepcopy
from transformers import conversion_mapping
found = conversion_mapping._build_checkpoint_conversion_mapping()
every = [transform.compiled_sources for several in found.values() for transform in several]
assert len(every) > 500 and not [one for one in every if "_compiled" in vars(one)]
assert deepcopy(every[0]).search("nothing at all") is None and "_compiled" in vars(every[0])
""" + RENAMINGS)
    assert own == _output(RENAMINGS)
