"""The article's page: written from the results kept of each machine, and from nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


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
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_results_are_named_after_the_processor(load: Any, processor: str, name: str) -> None:
    assert load("_resumable").file_name(processor) == name
