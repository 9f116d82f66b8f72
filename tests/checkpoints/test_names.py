"""The names of transformers' models, kept from one import to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from modelport.checkpoints import names

IMPORT = """
from modelport.checkpoints import names
with names.remembered():
    import transformers.models
from transformers.utils import import_utils
assert import_utils.create_import_structure_from_path.__name__ != "answer"
"""

NO_SCAN = """
import builtins, io
plain = open
def refused(file, *args, **kwargs):
    assert "transformers/models/" not in str(file), f"{file} was read"
    return plain(file, *args, **kwargs)
builtins.open = refused
"""

SHOW = """
import transformers.models
print(sorted(transformers.models.__all__), sorted(dir(transformers)))
"""

FOUND = {
    frozenset({"torch", "vision"}): {"image_processing_x": {"A", "B"}},
    frozenset(): {"configuration_x": {"XConfig"}, "empty": set()},
    frozenset({"torch"}): {"bert.modeling_bert": {"BertModel"}},
    frozenset({"nothing"}): {},
}


def _output(code: str, cache: Path) -> str:
    environment = {**os.environ, "MODELPORT_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    _output(IMPORT, cache)
    return cache


def test_a_second_import_reads_no_sources_and_knows_the_same_names(filled: Path) -> None:
    assert _output(NO_SCAN + IMPORT + SHOW, filled) == _output(SHOW, filled)


def test_without_a_cache_the_sources_are_read(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was read"):
        _output(NO_SCAN + IMPORT, tmp_path)


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'[[["torch"], [1]]]'])
def test_a_damaged_cache_is_replaced(filled: Path, tmp_path: Path, content: bytes) -> None:
    (kept,) = (filled / "names").iterdir()
    place = tmp_path / "names" / kept.name
    place.parent.mkdir()
    place.write_bytes(content)
    _output(IMPORT + "from transformers import BertConfig", tmp_path)
    assert place.read_bytes() == kept.read_bytes()


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a file")
    _output(IMPORT + "from transformers import BertConfig", tmp_path)


def test_what_is_already_imported_gets_the_names_too(filled: Path) -> None:
    _output("import transformers.utils\n" + NO_SCAN + IMPORT, filled)


def test_another_installation_has_a_place_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert names._place(tmp_path / "models") is None  # not where the package was installed to
    from importlib.metadata import distribution

    package = distribution("transformers")
    home = Path(str(package.locate_file("transformers"))) / "models"
    record = Path(str(package.locate_file(f"transformers-{package.version}.dist-info/RECORD")))
    before, stamp = names._place(home), record.stat()
    assert before == names._place(home)
    try:
        os.utime(record, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000))
        assert names._place(home) != before
    finally:
        os.utime(record, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("found", [FOUND, {}])
def test_what_is_stored_is_what_was_found(found: dict[Any, Any]) -> None:
    import json

    decoded = names._decoded(json.loads(json.dumps(names._encoded(found))))
    assert decoded == found
    assert list(decoded) == list(found)
