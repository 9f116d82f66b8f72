"""modelport: deployment artifacts proven equal to their checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import modelport` costs nothing and pulls in no framework.
_PUBLIC: dict[str, str] = {
    "ModelportError": ".errors",
    "ModelSpec": ".spec",
    "TensorSpec": ".spec",
    "Dim": ".spec",
    "Session": ".session",
    "ModelRequest": ".pipeline",
    "Limits": ".pipeline",
    "CustomModel": ".checkpoints",
    "Consent": ".checkpoints.consent",
    "allowing": ".checkpoints.consent",
    "export": ".pipeline.custom",
    "load_pipeline": ".pipeline",
    "open_artifact": ".pipeline",
    "validate_artifact": ".pipeline",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
