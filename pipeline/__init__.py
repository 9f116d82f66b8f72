"""The only place where stages are composed: resolve, load, export, read back, validate, place.

Data flows one way. Nothing here knows a format by name; formats come from :mod:`..exporters` and
what opens them from :mod:`..runtimes`.
"""

from __future__ import annotations

from .benchmarking import Grid, against, bench, open_path
from .bisecting import Bisection, bisect
from .exporting import default_output, export
from .generation_speed import GenerationGrid, bench_generation, generates, open_generator
from .opening import load_pipeline, open_artifact, open_pipeline, open_session
from .request import ModelRequest
from .subjects import named
from .validating import Limits, parity_report, validate_artifact

__all__ = [
    "Bisection",
    "GenerationGrid",
    "Grid",
    "Limits",
    "ModelRequest",
    "against",
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
    "validate_artifact",
]
