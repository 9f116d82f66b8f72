"""AOTInductor: a compiled package (.pt2), PyTorch's successor of TorchScript archives.

The graph comes from ``torch.export`` with named dimensions and their ranges; C++ or GPU code for
it is generated and compiled, and lies in the package with the weights.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, ClaimError
from . import Exporter, Written

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..artifacts import Artifact
    from ..checkpoints.model import Attention, LoadedModel
    from ..spec import ModelSpec

PACKAGE = "model.pt2"
RECORD = "modelport"
"""Key in the package's metadata whose value says what the package is."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
COMPILERS = ("g++", "clang++")


@dataclass(frozen=True, slots=True)
class AOTInductorOptions:
    """What can be asked of an AOTInductor package."""

    device: str = field(
        default="cpu",
        metadata={"help": "where the package will run", "choices": ("cpu", "cuda")},
    )
    dtype: str = field(
        default="fp32",
        metadata={"help": "floating-point type of weights and arithmetic",
                  "choices": tuple(DTYPES)},
    )  # fmt: skip
    attention: str = field(
        default="sdpa",
        metadata={
            "help": "attention: sdpa is fused, eager is single operators",
            "choices": ("sdpa", "eager"),
        },
    )


class AOTInductorExporter(Exporter[AOTInductorOptions]):
    options_type = AOTInductorOptions

    def check(self, options: AOTInductorOptions) -> None:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                "torch sees no CUDA device here, and a package for one can only be made on one",
                allowed="--device cpu, or a machine with a GPU",
                hint="modelport doctor",
            )
        _require_compiler()

    def parent_of(self, options: AOTInductorOptions) -> str | None:
        # In bfloat16 rounding hides a wrong graph: the same package in float32 is proven first.
        return None if options.dtype == "fp32" else self.name

    def parent_options(self, options: AOTInductorOptions) -> AOTInductorOptions:
        return replace(options, dtype="fp32")

    def strategies(self, options: AOTInductorOptions) -> tuple[str, ...]:
        # Where the code's own reasoning excludes an end of a range (unfused attention excludes a
        # length of 1, though it works there), ranges are left open, and parity tells.
        return ("export", "export-open")

    def attention(self, options: AOTInductorOptions) -> Attention:
        return "eager" if options.attention == "eager" else "sdpa"

    def export(
        self,
        model: LoadedModel,
        parent: Artifact | None,
        out: Path,
        options: AOTInductorOptions,
        strategy: str,
    ) -> None:
        import torch
        from torch._inductor.package.package import package_aoti
        from torch._inductor.utils import fresh_cache

        from . import _torch_capture as capture
        from ._torch_weights import real_weights

        dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
        with (
            capture.quiet(),
            torch.no_grad(),
            tempfile.TemporaryDirectory(prefix="modelport-inductor-") as work,
            fresh_cache(dir=work),  # else a copy of the weights stays in torch's cache
        ):
            with real_weights(model, options.device, dtype):
                files = _compiled(model, options, ranges=strategy == "export")
            package_aoti(str(out / PACKAGE), files)

    def read_back(self, model: LoadedModel, out: Path, options: AOTInductorOptions) -> Written:
        import torch

        from . import _torch_capture as capture

        metadata = _metadata(out / PACKAGE)
        if metadata["AOTI_DEVICE_KEY"] != options.device:
            raise ClaimError(
                f"the package is for {metadata['AOTI_DEVICE_KEY']}", allowed=options.device
            )
        spec = model.spec
        with capture.quiet(), torch.inference_mode():
            package = torch._inductor.aoti_load_package(str(out / PACKAGE))
            for sizes in (None, capture.other_sizes(model)):
                outputs = package(*capture.sample_tensors(model, options.device, sizes))
                spec = _as_found(model.spec, outputs, DTYPES[options.dtype])
                capture.require_outputs(outputs, spec, sizes or spec.check(model.samples))
        record = json.loads(metadata[RECORD])
        facts = {
            "route": record["route"],
            "attention": record["attention"],
            "precision": DTYPES[options.dtype],
            "weight_bytes": record["weight_bytes"],
        }
        if options.dtype == "fp32":
            del facts["precision"]
        if facts["attention"] is None:
            del facts["attention"]
        target = {
            "device": metadata["AOTI_DEVICE_KEY"],
            "torch": record["torch"],
            "machine": metadata.get("AOTI_MACHINE", ""),
            "instructions": metadata.get("AOTI_CPU_ISA", ""),
            "compute_capability": metadata.get("AOTI_COMPUTE_CAPABILITY", ""),
        }
        return Written(spec, facts, {name: value for name, value in target.items() if value})


def _require_compiler() -> None:
    import os
    import shutil

    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in (named, *COMPILERS) if name):
        raise BackendUnavailable(
            "there is no C++ compiler here, and AOTInductor compiles what it generates",
            allowed="g++ or clang++, or another named in CXX",
            hint="apt-get install g++, or modelport export onnx",
        )


def _compiled(model: LoadedModel, options: AOTInductorOptions, *, ranges: bool) -> Any:
    """The files of a package.

    ``aoti_compile_and_package`` in its two steps, so that the mapped weights can be let go of
    before the package, which holds them too, goes through memory.
    """
    import torch

    from . import _torch_capture as capture

    record = _record(model, options, ranges)
    module = capture.named(model.module, model.spec)
    tensors = capture.sample_tensors(model, options.device)
    program = capture.program(module, tensors, model.spec, ranges=ranges)
    return torch._inductor.aot_compile(
        program.module(check_guards=False),
        tensors,
        options={
            "aot_inductor.package": True,
            "aot_inductor.metadata": {RECORD: json.dumps(record)},
            # Weights behind the code, mapped when it is loaded: one copy less, here and there.
            "aot_inductor.force_mmap_weights": True,
            # Weights lie as the kernels want them: 0.83 to 0.87 of the time for ResNet-50, 0.91 for
            # CamemBERT-base at 1 × 32. In bfloat16 larger batches get slower, BERT by 7 to 17 %.
            "freezing": options.device == "cpu" and options.dtype == "fp32",
        },
    )


def _record(model: LoadedModel, options: AOTInductorOptions, ranges: bool) -> dict[str, Any]:
    """What the package says of itself."""
    import dataclasses

    import torch
    import transformers

    from .. import __version__
    from . import _torch_capture as capture

    return {
        "source": model.source.digest,
        "spec": dataclasses.asdict(model.spec),
        "route": "export" if ranges else "export-open",
        "weight_bytes": _weight_bytes(model.module),
        "device": options.device,
        "attention": capture.attention(model, options.attention),
        "dtype": options.dtype,
        # The compiler uses whatever this processor has (-march=native); not every torch can tell.
        "processor": dict(getattr(torch.cpu, "get_capabilities", dict)()),
        "modelport": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _weight_bytes(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by dtype; a tied weight counts once."""
    found: dict[str, int] = {}
    for value in (*module.parameters(), *module.buffers()):
        dtype = str(value.dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + value.numel() * value.itemsize
    return found


def _metadata(package: Path) -> dict[str, str]:
    with zipfile.ZipFile(package) as archive:
        name = next(n for n in archive.namelist() if n.endswith("wrapper_metadata.json"))
        found: dict[str, str] = json.loads(archive.read(name))
    return found


def _as_found(spec: ModelSpec, outputs: Any, dtype: str) -> ModelSpec:
    """The spec with the outputs in the dtype asked for, where the model computes them in it.

    A model may bring some outputs back to float32; none in the dtype asked for is a broken claim.

    Raises:
        ClaimError: floating-point outputs, and none of them is of the dtype.
    """
    found = [str(value.dtype).removeprefix("torch.") for value in outputs]
    floating = [d for d in found if d in DTYPES.values()]
    if floating and dtype not in floating:
        raise ClaimError(f"the package computes in {floating[0]}", allowed=dtype)
    pairs = zip(spec.outputs, found, strict=False)
    changed = [replace(t, dtype=d) if d in DTYPES.values() else t for t, d in pairs]
    return replace(spec, outputs=(*changed, *spec.outputs[len(changed) :]))


EXPORTER = AOTInductorExporter()
