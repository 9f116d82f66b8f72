"""An archive runs in C++: the program in docs/torchscript.md gives Python's numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import hand_made
import modelport
import numpy as np
import pytest
import torch
from modelport import checkpoints, exporters, runtimes

if TYPE_CHECKING:
    from collections.abc import Callable

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documented program, compiled against the libraries inside the torch wheel."""
    page = (Path(modelport.__file__).parent / "docs" / "torchscript.md").read_text()
    source = re.search(r"```cpp\n(.*?)```", page, re.DOTALL)
    assert source is not None
    assert len(source[1].splitlines()) <= 40
    directory = tmp_path_factory.mktemp("cpp")
    (directory / "run.cpp").write_text(source[1])
    wheel = Path(torch.utils.cmake_prefix_path).parents[1]
    assert COMPILER is not None
    command = [
        COMPILER, "-std=c++20", "-O1", str(directory / "run.cpp"), "-o", str(directory / "run"),
        f"-I{wheel / 'include'}", f"-I{wheel / 'include/torch/csrc/api/include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-L{wheel / 'lib'}", f"-Wl,-rpath,{wheel / 'lib'}", "-Wl,--no-as-needed",
        "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("mode", ["trace", "script"])
def test_the_documented_program_gives_pythons_numbers(
    mode: str, program: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    exporter = exporters.get("torchscript")
    options = exporter.options_type(mode=mode)
    checkpoint = checkpoints.resolve(str(tiny("camembert")))
    model = checkpoints.load(checkpoint)
    artifact = hand_made.written(
        exporter, model, tmp_path / "out", options, exporter.strategies(options)[-1]
    )
    reference = runtimes.get("torch_eager").open(checkpoints.load_reference(checkpoint))
    for batch, length in ((1, 1), (3, 17)):
        ids = (np.arange(batch * length) % 90 + 5).reshape(batch, length)
        mask = np.ones_like(ids)
        mask[:, length - 1] = int(length == 1)
        expected = reference.run({"input_ids": ids, "attention_mask": mask})["logits"]
        done = run(program, str(artifact.root / "model.pt"), str(batch), str(length))
        assert done.returncode == 0, done.stderr
        shape, *values = done.stdout.splitlines()
        assert [int(size) for size in shape.split()] == list(expected.shape)
        found = np.array(values, np.float32).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.abs(found - expected[:, ::-1]).max() > 1e-2 or length == 1  # could have failed


def test_what_is_no_archive_ends_the_program_with_a_message(
    program: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.pt").write_bytes(b"not an archive")
    done = run(program, str(tmp_path / "model.pt"), "1", "1")
    assert done.returncode == 1
    assert done.stderr
