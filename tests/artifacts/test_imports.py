"""Opening an artifact must not cost the import of a framework."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "onnx", "onnx_ir", "numpy", "transformers", "pydantic", "safetensors")


def test_importing_artifacts_loads_nothing_heavy():
    program = "import sys, modelport.artifacts, modelport.artifacts.weights\n"
    program += "import modelport.artifacts.onnx_files\n"
    program += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_verifying_an_artifact_needs_no_framework(artifact):
    program = "import sys; from pathlib import Path; from modelport.artifacts import verify\n"
    program += f"verify(Path({str(artifact.root)!r}))\n"
    program += "print([n for n in ('torch', 'onnx', 'numpy', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
