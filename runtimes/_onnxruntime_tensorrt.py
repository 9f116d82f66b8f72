"""An ONNX artifact through ONNX Runtime's TensorRT provider, its engines cached beside it.

The provider builds engines while it opens a session, which takes minutes, and reads them again
from a directory. Engines are executable code, and the provider reads whatever lies there. So the
directory is named after the artifact's digest, the GPU and TensorRT, its files are compared with
the digests noted when the last session closed, and what does not agree is removed unread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

from .. import gpu
from ..errors import BackendUnavailable, UsageError
from .onnxruntime import TENSORRT, OnnxSession

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..artifacts import Artifact
    from ..spec import ModelSpec

DIGESTS = "digests.json"
LINKED = 10
"""Major version of the libnvinfer that ONNX Runtime's wheels link."""

SHAPES = {"min": "trt_profile_min_shapes", "opt": "trt_profile_opt_shapes",
          "max": "trt_profile_max_shapes"}  # fmt: skip
REDUCED = {"float16": "trt_fp16_enable", "bfloat16": "trt_bf16_enable"}


def opened(
    artifact: Artifact, path: Path, device: str, options: Mapping[str, Any]
) -> TensorRTProviderSession:
    """Open a verified ONNX artifact with the TensorRT provider first and CUDA second.

    Raises:
        UsageError: a CUDA graph is asked for, too. The provider records one, at the first run, and
            replays it in every other, whatever that one's shapes and buffers.
        BackendUnavailable: the provider or TensorRT 10 is not here, the provider does not take the
            whole graph, or ONNX Runtime fell back.
    """
    if options["cuda_graph"]:
        raise UsageError(
            "ONNX Runtime's TensorRT provider replays its first run in all others",
            allowed="one of tensorrt and cuda_graph",
            hint="the tensorrt format, whose runtime records a CUDA graph for each shape",
        )
    if reason := unavailable(device):
        raise BackendUnavailable(reason)
    here = gpu.machine()
    cache = trusted(cache_directory(artifact, here))
    chosen = provider_options(
        artifact.spec, cache, str(artifact.manifest.facts.get("precision", "")))
    return TensorRTProviderSession(artifact.spec, path, device, options, chosen, cache)


def unavailable(device: str) -> str | None:
    """Why the provider cannot be used here, in one sentence; None when it can."""
    import onnxruntime

    if device != "cuda":
        return "ONNX Runtime's TensorRT provider runs on cuda only"
    if TENSORRT not in onnxruntime.get_available_providers():
        return f'this build of onnxruntime has no {TENSORRT}: pip install "modelport[gpu]"'
    if reason := gpu.unavailable():
        return reason
    # Importing it here also puts libnvinfer where the provider finds it.
    trt = gpu.tensorrt()
    if gpu.major(trt) != LINKED:
        return (f"ONNX Runtime's TensorRT provider links TensorRT {LINKED}, and here is "
                f"{trt.__version__}: pip install 'tensorrt<{LINKED + 1}', or use the tensorrt "
                "format")
    return None


def provider_options(spec: ModelSpec, cache: Path, precision: str) -> dict[str, str]:
    """Options of the provider: one profile over the whole range of sizes, engines in ``cache``.

    Without explicit shapes it would build an engine again for each shape outside those met.
    """
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    if precision in REDUCED:  # the provider's network is weakly typed: it needs leave
        options[REDUCED[precision]] = "1"
    for bound, name in SHAPES.items():
        sizes = {dim: getattr(r, bound) for dim, r in spec.dims.items()}
        options[name] = ",".join(
            f"{t.name}:{'x'.join(map(str, spec.shape(t, sizes)))}" for t in spec.inputs
        )
    return options


def cache_directory(artifact: Artifact, here: gpu.Machine) -> Path:
    """Beside the artifact, as engines are no part of what was proven; one for each machine."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{here.gpu}-{here.tensorrt}").strip("-").lower()
    name = f".{artifact.root.name}.tensorrt"
    return artifact.root.resolve().parent / name / f"{artifact.manifest.identity[:16]}-{key}"


def trusted(cache: Path) -> Path:
    """The cache with nothing in it but files whose digests were noted; made where there is none."""
    from ..artifacts.digest import digest
    from ..errors import PathEscape

    try:
        noted: Any = json.loads((cache / DIGESTS).read_text("utf-8"))
        present = {p.name: digest(p).sha256 for p in cache.iterdir() if p.name != DIGESTS}
        agrees = present == noted
    except (OSError, ValueError, PathEscape):
        agrees = False
    if not agrees:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True, mode=0o700)
    return cache


def note(cache: Path) -> None:
    """Note the digests of what the provider wrote; not being able to costs the cache only."""
    from ..artifacts.digest import digest

    with contextlib.suppress(OSError):
        found = {p.name: digest(p).sha256 for p in sorted(cache.iterdir())
                 if p.is_file() and not p.name.startswith(DIGESTS)}
        partial = cache / f"{DIGESTS}.{os.getpid()}"
        partial.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        partial.replace(cache / DIGESTS)


class TensorRTProviderSession(OnnxSession):
    """Notes the digests of new engines when it is closed.

    Raises:
        BackendUnavailable: no node went to TensorRT.
    """

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        device: str,
        options: Mapping[str, Any],
        provider: dict[str, str],
        cache: Path,
    ) -> None:
        super().__init__(spec, path, device, options, ((TENSORRT, provider),))
        self._cache = cache
        note(cache)
        nodes = self.placement().nodes
        if nodes and not nodes.get(TENSORRT):
            raise BackendUnavailable(
                f"no node of this graph went to {TENSORRT}; "
                + ", ".join(f"{n} to {provider}" for provider, n in nodes.items()),
                hint="the tensorrt format, or the CUDA provider",
            )

    def close(self) -> None:
        super().close()
        note(self._cache)
