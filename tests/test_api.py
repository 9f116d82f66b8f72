from __future__ import annotations

import subprocess
import sys

import modelport
import pytest


@pytest.mark.parametrize("name", modelport.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(modelport, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = modelport.nothing_like_this


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import modelport, sys; "
        "print(sorted({'torch', 'transformers', 'onnx', 'numpy', 'pydantic', 'rich'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
