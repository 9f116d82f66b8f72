"""TorchScript: one archive that Python and C++ load, tied to the device it was made on.

The weights are mapped from the checkpoint's files while the archive is written, so memory holds
them once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, ClaimError
from . import Exporter, Written

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..artifacts import Artifact
    from ..checkpoints.model import Attention, LoadedModel

ARCHIVE = "model.pt"
RECORD = "modelport.json"
"""Name of the archive's extra file that says what the archive is."""

CONTROL_FLOW = {"branches": "prim::If", "loops": "prim::Loop"}


@dataclass(frozen=True, slots=True)
class TorchScriptOptions:
    """What can be asked of a TorchScript archive."""

    mode: str = field(
        default="trace",
        metadata={
            "help": "trace records one run; script compiles the code, or else the exported graph",
            "choices": ("trace", "script"),
        },
    )
    device: str = field(
        default="cpu",
        metadata={"help": "where the archive will run", "choices": ("cpu", "cuda")},
    )
    attention: str = field(
        default="sdpa",
        metadata={
            "help": "attention: sdpa is fused, eager is single operators",
            "choices": ("sdpa", "eager"),
        },
    )


class TorchScriptExporter(Exporter[TorchScriptOptions]):
    options_type = TorchScriptOptions
    notice = (
        "TorchScript has been deprecated since torch 2.11, and does not exist on Python 3.14 and "
        "later; its successor is `modelport export aotinductor`"
    )

    def check(self, options: TorchScriptOptions) -> None:
        if sys.version_info >= (3, 14):
            raise BackendUnavailable(
                f"TorchScript does not exist on Python {sys.version_info[0]}.{sys.version_info[1]}",
                allowed="Python 3.11 to 3.13",
                hint="modelport export aotinductor",
            )
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                "torch sees no CUDA device here, and an archive for one can only be made on one",
                allowed="--device cpu, or a machine with a GPU",
                hint="modelport doctor",
            )

    def strategies(self, options: TorchScriptOptions) -> tuple[str, ...]:
        # Only code that torch.jit.script reads keeps its own branches and loops, so it goes first;
        # it refuses what it cannot read within milliseconds.
        return ("script", "export") if options.mode == "script" else ("trace",)

    def attention(self, options: TorchScriptOptions) -> Attention:
        return "eager" if options.attention == "eager" else "sdpa"

    def export(
        self,
        model: LoadedModel,
        parent: Artifact | None,
        out: Path,
        options: TorchScriptOptions,
        strategy: str,
    ) -> None:
        import torch

        from . import _torch_capture as capture
        from ._torch_weights import real_weights

        make = {"trace": _traced, "script": _scripted, "export": _exported}[strategy]
        attention = capture.attention(model, options.attention)
        with real_weights(model, options.device), capture.quiet(), torch.no_grad():
            made, frozen_choices = make(model, options.device)
            frozen = torch.jit.freeze(made.eval())
            record = _record(model, options, strategy, frozen_choices, attention)
            torch.jit.save(frozen, str(out / ARCHIVE), _extra_files={RECORD: json.dumps(record)})

    def read_back(
        self, model: LoadedModel, out: Path, options: TorchScriptOptions
    ) -> Written:
        import torch

        from . import _torch_capture as capture

        extra = {RECORD: ""}
        with capture.quiet(), torch.no_grad():
            load: Any = torch.jit.load
            module = load(str(out / ARCHIVE), map_location=options.device, _extra_files=extra)
            record = json.loads(extra[RECORD])
            if record["device"] != options.device:
                raise ClaimError(f"the archive is for {record['device']}", allowed=options.device)
            _require_inputs(module, model)
            for sizes in (None, capture.other_sizes(model)):
                tensors = capture.sample_tensors(model, options.device, sizes)
                used = sizes or model.spec.check(model.samples)
                capture.require_outputs(module(*tensors), model.spec, used)
        facts = {
            "mode": record["mode"],
            "route": record["route"],
            "attention": record["attention"],
            **_control_flow(module),
            "frozen_choices": record["frozen_choices"],
            "nodes": len(list(module.inlined_graph.nodes())),
            "weight_bytes": _weight_bytes(module),
        }
        if facts["attention"] is None:
            del facts["attention"]
        target = {"device": record["device"], "torch": record["torch"]}
        return Written(model.spec, facts, target)


def _traced(model: LoadedModel, device: str) -> tuple[torch.jit.ScriptModule, int]:
    """Record one run. Python that chose a path by a value, once for all, is counted."""
    import torch

    from . import _torch_capture as capture

    module = capture.named(model.module, model.spec)
    tensors = capture.sample_tensors(model, device)
    jit: Any = torch.jit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", jit.TracerWarning)
        traced = jit.trace(module, tensors, check_trace=False)
    choices = {(w.filename, w.lineno) for w in caught if w.category is jit.TracerWarning}
    return traced, len(choices)


def _scripted(model: LoadedModel, device: str) -> tuple[torch.jit.ScriptModule, int]:
    """Compile the module's own code, with its branches and loops."""
    from ._torch_script import compile_module

    return compile_module(model.module, model.spec), 0


def _exported(model: LoadedModel, device: str) -> tuple[torch.jit.ScriptModule, int]:
    """Compile the graph that ``torch.export`` takes from the module."""
    from . import _torch_capture as capture
    from ._torch_script import compile_program

    module = capture.named(model.module, model.spec)
    tensors = capture.sample_tensors(model, device)
    program = capture.program(module, tensors, model.spec, ranges=False)
    return compile_program(program, model.spec.input_names), 0


def _record(
    model: LoadedModel, options: TorchScriptOptions, route: str, frozen_choices: int,
    attention: str | None,
) -> dict[str, Any]:
    """What the archive says of itself."""
    import torch
    import transformers

    from .. import __version__

    return {
        "source": model.source.digest,
        "spec": dataclasses.asdict(model.spec),
        "mode": options.mode,
        "route": route,
        "device": options.device,
        "attention": attention,
        "frozen_choices": frozen_choices,
        "modelport": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _require_inputs(module: Any, model: LoadedModel) -> None:
    """Compare the names of the graph's inputs with the spec's."""
    found = [value.debugName() for value in list(module.graph.inputs())[1:]]
    names = [name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name
             for name in found]
    if tuple(names) != model.spec.input_names:
        raise ClaimError(
            f"the archive takes {', '.join(names) or 'nothing'}",
            allowed=", ".join(model.spec.input_names),
        )


def _control_flow(module: Any) -> dict[str, int]:
    """How many branches and loops are left in the graph, nested ones included."""
    graph = module.inlined_graph
    return {
        name: len(graph.findAllNodes(kind, recurse=True))
        for name, kind in CONTROL_FLOW.items()
    }


def _weight_bytes(module: Any) -> dict[str, int]:
    """Bytes of all constants and attributes by dtype; a tied weight counts once."""
    graph = module.inlined_graph  # made anew at each access, and its nodes die with it
    constants = [
        node.t("value")
        for node in graph.findAllNodes("prim::Constant", recurse=True)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    seen = {t.data_ptr(): t for t in (*constants, *module.parameters(), *module.buffers())}
    found: dict[str, int] = {}
    for value in seen.values():
        dtype = str(value.dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + value.numel() * value.itemsize
    return found


EXPORTER = TorchScriptExporter()
