"""The only place where stages are composed: resolve, load, export, read back, validate, place.

Data flows one way. Nothing here knows a format by name; formats come from :mod:`..exporters` and
what opens them from :mod:`..runtimes`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking import Grid, bench, open_path, takes_sequence
    from .bisecting import Bisection, bisect, require_bisectable
    from .exporting import default_output, export
    from .generation_speed import GenerationGrid, bench_generation, generates, open_generator
    from .opening import load_pipeline, open_artifact, open_pipeline, open_session
    from .request import ModelRequest
    from .subjects import named
    from .validating import Limits, parity_report, validate_artifact

# Imported on first use: three processes take part in an export, and none of them benchmarks.
_HOMES = {
    "Bisection": "bisecting",
    "GenerationGrid": "generation_speed",
    "Grid": "benchmarking",
    "Limits": "validating",
    "ModelRequest": "request",
    "bench": "benchmarking",
    "bench_generation": "generation_speed",
    "bisect": "bisecting",
    "default_output": "exporting",
    "export": "exporting",
    "generates": "generation_speed",
    "load_pipeline": "opening",
    "named": "subjects",
    "open_artifact": "opening",
    "open_generator": "generation_speed",
    "open_path": "benchmarking",
    "open_pipeline": "opening",
    "open_session": "opening",
    "parity_report": "validating",
    "require_bisectable": "bisecting",
    "takes_sequence": "benchmarking",
    "validate_artifact": "validating",
}

__all__ = [
    "Bisection",
    "GenerationGrid",
    "Grid",
    "Limits",
    "ModelRequest",
    "bench",
    "bench_generation",
    "bisect",
    "default_output",
    "export",
    "generates",
    "load_pipeline",
    "named",
    "open_artifact",
    "open_generator",
    "open_path",
    "open_pipeline",
    "open_session",
    "parity_report",
    "require_bisectable",
    "takes_sequence",
    "validate_artifact",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
