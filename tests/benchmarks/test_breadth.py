"""Tiny configs are what their classes need to run, whatever the model type."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import modelport
import pytest
import transformers

BREADTH = Path(modelport.__file__).parent / "benchmarks" / "breadth"


@pytest.fixture(scope="module")
def breadth():
    sys.path.insert(0, str(BREADTH))
    try:
        import page
        import shrink
    finally:
        sys.path.remove(str(BREADTH))
    return SimpleNamespace(page=page, tiny=shrink.tiny)


@pytest.fixture
def tiny(breadth):
    return breadth.tiny


def test_an_encoder_that_generates_is_told_that_it_is_a_decoder(tiny):
    config = transformers.ErnieConfig()
    assert tiny(config, "ernie", "text-generation").is_decoder
    assert not tiny(config, "ernie", "fill-mask").is_decoder


def test_a_decoder_beside_an_encoder_has_a_token_to_begin_with(tiny):
    config = tiny(transformers.T5Config(), "t5", "text2text-generation")
    assert config.decoder_start_token_id == config.pad_token_id == 0
    assert tiny(transformers.BartConfig(), "bart").decoder_start_token_id == 2


def test_what_is_published_names_no_directory_of_this_machine(breadth):
    said = f"Load model from {tempfile.gettempdir()}/coverage-a_1/model.onnx failed at /model/x"
    assert breadth.page.placeless(said) == "Load model from model.onnx failed at /model/x"
    assert breadth.page.placeless(f'"{sys.prefix}/lib/a.py"') == '"a.py"'
