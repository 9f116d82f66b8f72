"""The article's page: written from the results kept of each machine, and from nothing else."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from modelport.runtimes.benchmark.environment import read

PLACE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PLACE))

    def module(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return module


def test_the_page_says_what_the_kept_results_give(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vl_convert")
    article = load("article")
    kept = sorted(article.RESULTS.glob("results-*.json.gz"))
    for file in kept:
        shutil.copy(file, tmp_path)
    shown = (article.RESULTS / "README.md").read_text("utf-8")
    monkeypatch.setattr(article, "RESULTS", tmp_path)
    text = article.write([], [("cpu", "of no interest"), ("cuda", "no card")])
    sections = text.split("\n## ")
    assert len(sections) == 1 + len(kept) + ("no card" in text)
    assert sections[: 1 + len(kept)] == shown.split("\n## ")[: 1 + len(kept)]
    assert "of no interest" not in text
    drawn = {file.name for file in tmp_path.glob("*.svg")}
    assert drawn == {line.split("(")[1].rstrip(")") for line in text.splitlines()
                     if line.startswith("![")}  # fmt: skip
    assert len(drawn) == 2 * len(kept)


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon"),
        ("Intel(R) Core(TM) i9-9900K CPU @ 3.60GHz", "intel-core-i9-9900k-3-60ghz"),
        ("AMD EPYC", "amd-epyc"),
    ],
)
def test_results_are_named_after_the_processor(load: Any, processor: str, name: str) -> None:
    environment = replace(read(), cpu=processor, gpus=({"name": "NVIDIA H100 80GB HBM3"},))
    machine = load("_resumable").machine
    assert machine(environment) == name
    assert machine(environment, "cuda") == "nvidia-h100-80gb-hbm3"
