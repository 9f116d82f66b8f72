from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import modelport
import pytest
from modelport import pipeline, validate


@pytest.mark.parametrize("name", modelport.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(modelport, name)


@pytest.mark.parametrize("name", pipeline.__all__)
def test_every_name_of_the_pipeline_is_there(name: str) -> None:
    assert getattr(pipeline, name)
    assert sorted(pipeline._HOMES) == pipeline.__all__


def test_every_name_of_the_judge_is_there() -> None:
    assert sorted(validate._HOMES) == sorted(validate.__all__)
    assert all(getattr(validate, name) for name in validate.__all__)


@pytest.mark.parametrize("package", [modelport, pipeline, validate])
def test_an_unknown_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = package.nothing_like_this


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import modelport, sys; "
        "print(sorted({'torch', 'transformers', 'onnx', 'numpy', 'pydantic', 'rich'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
