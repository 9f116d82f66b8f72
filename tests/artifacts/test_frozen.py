"""Artifacts that were written once and frozen are read, verified and run by every later version."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from modelport import artifacts, pipeline

FROZEN = Path(__file__).parents[1] / "fixtures" / "artifact-schema-1"
# Of the manifest's bytes as they were frozen: a fixture that is written anew is no old artifact.
MANIFEST = "cee140785d3d8cea044287fddd5db6010e686fb808fa81da385db97dea26aa09"


def test_schema_1_is_as_it_was_frozen() -> None:
    manifest = FROZEN / artifacts.MANIFEST
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == MANIFEST


def test_schema_1_is_read_and_verified() -> None:
    found = artifacts.verify(FROZEN).manifest
    assert found.identity == "6e684c2c9d3332648184a4fb053a8017e9492d18f81e0d05d29805bed57dd281"
    assert found.proven
    assert found.format == "onnx"
    assert found.source.model == "tiny-bert"


def test_schema_1_is_opened() -> None:
    artifact, session = pipeline.open_artifact(FROZEN)
    with session:
        outputs = session.run(
            {name: np.ones((3, 5), np.int64) for name in artifact.spec.input_names}
        )
    assert outputs["last_hidden_state"].shape == (3, 5, 8)


COMPONENTS = FROZEN.with_name("artifact-components")
COMPONENTS_MANIFEST = "6c0d6fc936afe3471933c8a6987e019e7b7e903366081c994a6a767f965fadb4"


def test_an_artifact_of_components_is_read_and_generates() -> None:
    manifest = COMPONENTS / artifacts.MANIFEST
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == COMPONENTS_MANIFEST
    found = artifacts.verify(COMPONENTS)
    assert list(found.components) == ["decoder"]
    assert found.spec.inputs == ()
    with pipeline.load_pipeline(COMPONENTS, threads=1) as model:
        prompt = {"input_ids": torch.tensor([[0, 3, 5], [7, 11, 2]]),
                  "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}  # fmt: skip
        ids = model.generate(**prompt, max_new_tokens=6, pad_token_id=0)
    assert ids.tolist() == [[0, 3, 5, 8, 19, 0, 0], [7, 11, 2, 8, 4, 8, 19]]
