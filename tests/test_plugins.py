from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from modelport import exporters, plugins, runtimes
from modelport.errors import UsageError


def test_every_exporter_and_runtime_file_is_found_by_its_name() -> None:
    for package in (exporters, runtimes):
        files = {p.stem for p in Path(package.__file__).parent.glob("*.py")}
        assert set(plugins.names(package)) == {f for f in files if not f.startswith("_")}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"(?s)'nope'.*allowed: .*onnx"):
        exporters.get("nope")


def test_dropping_a_file_in_is_enough(tmp_path: Path) -> None:
    package = tmp_path / "formats"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_private.py").touch()
    (package / "new.py").write_text("THING = 42\n")
    code = (
        "import formats; from modelport import plugins; "
        "print(plugins.names(formats), plugins.load(formats, 'new', 'THING'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "('new',) 42"
