"""The only place where stages are composed: resolve, load, export, read back, validate, place.

Data flows one way. Nothing here knows a format by name; formats come from :mod:`..exporters` and
what opens them from :mod:`..runtimes`.
"""

from __future__ import annotations

from .benchmarking import Grid, against, bench, open_path
from .bisecting import Bisection, bisect
from .exporting import default_output, export
from .opening import load_pipeline, open_artifact, open_pipeline, open_session
from .request import ModelRequest
from .subjects import named
from .validating import Limits, parity_report, validate_artifact

__all__ = [
    "Bisection",
    "Grid",
    "Limits",
    "ModelRequest",
    "against",
    "bench",
    "bisect",
    "default_output",
    "export",
    "load_pipeline",
    "named",
    "open_artifact",
    "open_path",
    "open_pipeline",
    "open_session",
    "parity_report",
    "validate_artifact",
]
