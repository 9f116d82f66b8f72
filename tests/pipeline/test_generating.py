"""An artifact that generates, through every command: run, inspect, publish, pull, verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelport import artifacts, checkpoints, load_pipeline, pipeline, validate
from modelport.cli import execute
from modelport.errors import UsageError
from modelport.exporters.onnx import OnnxOptions
from modelport.pipeline import deriving, generating, validating
from modelport.pipeline.texts import TEXTS
from modelport.session import Placement, Session
from modelport.spec import Dim, ModelSpec, TensorSpec

WORDS = "proof before deployment is what it says and nothing is claimed that was not measured"


@pytest.fixture(scope="module")
def written(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer of whole words, exported."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("written")
    shutil.copytree(tiny("gpt2", "text-generation", initializer_range=0.6), place / "model")
    known = {word: i for i, word in enumerate(dict.fromkeys(WORDS.split()))}
    rest = {f"w{i}": i for i in range(len(known), 98)}
    words = Tokenizer(models.WordLevel({**known, **rest, "<end>": 98}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<end>"
                            ).save_pretrained(place / "model")
    request = pipeline.ModelRequest(str(place / "model"))
    pipeline.export("onnx", request, place / "out", validate=False)
    return place / "out"


def test_texts_are_read_without_a_token_to_pad_with(written: Path, tmp_path: Path) -> None:
    source = pipeline.ModelRequest(str(written.parent / "model"), task="feature-extraction")
    out = pipeline.export("onnx", source, tmp_path / "out", validate=False).root
    limits = pipeline.Limits(sizes={"batch": (1,), "sequence": (2,)}, cache=False)
    report = pipeline.validate_artifact(out, limits=limits)
    assert report.accepted, report.failures
    texts = {case.shape.split()[0]: case.padding for case in report.cases if case.origin == "text"}
    assert texts.keys() == {"batch=1", "batch=3", "batch=8"}
    assert texts["batch=8"] == "right"
    (part,) = checkpoints.load(checkpoints.resolve(str(written.parent / "model"))).parts.values()
    assert deriving.samples(part)[-1]["input_ids"].shape[0] == len(TEXTS)


def test_a_bare_file_is_no_model_of_several_graphs(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(written.parent / "model")
    assert execute(["validate", str(written / "decoder.onnx"), "--reference", model]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "text-generation is several graphs (decoder)" in said
    assert f"modelport export onnx --model {model}" in said


def test_tokens_of_speech_are_those_of_its_logits_and_draws_are_draws(
    tiny: Callable[..., Path]
) -> None:
    root = tiny("whisper", "automatic-speech-recognition", init_std=0.8)
    features = TensorSpec("input_features", "float32", ("batch", 8, 40), "features")
    spec = ModelSpec((features,), (), {"batch": Dim(1, 2, 4)})
    given = np.random.default_rng(0).standard_normal((3, 8, 40)).astype(np.float32)
    with generating._source(checkpoints.resolve(str(root)), "float32", None, "cpu",
                            generating.Free, spec, 6, True) as session:
        found = session.run({"input_features": given})
    assert found["greedy"].shape == found["logits"].shape[:2]
    assert (found["greedy"][:, 0] == found["logits"][:, 0].argmax(-1)).all()
    draws = [found[f"sampled {seed}"] for seed in generating.SEEDS]
    assert not any(np.array_equal(found["greedy"], draw) for draw in draws)


def test_run_says_what_the_model_says(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", str(written), "--text", "proof before", "--max-new-tokens", "6"]
    assert execute([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["task"] == "text-generation"
    assert answer["outputs"]["generated"] == {"shape": [1, 8], "dtype": "int64"}
    with load_pipeline(written, threads=1) as model:
        prompt = model.prompt(["proof before"])
        assert answer["answer"] == model.text(model.generate(**prompt, max_new_tokens=6))[0]
    assert answer["answer"].startswith("proof before ")
    assert execute([*asked, "--sample", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert execute([*asked, "--sample", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert execute([*asked, "--beams", "2"]) == 0


def test_a_limit_alone_fails_nothing(written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written, tmp_path / "out")
    report = pipeline.validate_artifact(out, limits=pipeline.Limits(max_seconds=1e-6))
    every = ["part=decoder", "part=steps", "part=generated", "part=generated"]
    assert [case.shape.split()[0] for case in report.cases] == every, "the first of each"
    assert {left.case.split()[0] for left in report.left_out} == set(every)
    assert report.verdict == "pass", report.failures
    assert report.narrowed


@pytest.mark.parametrize(("limit", "narrowed"), [(500.0, True), (3600.0, False), (None, False)])
def test_what_is_generated_counts_as_coverage_and_shares_do_not_count_as_limits(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    limit: float | None, narrowed: bool,
) -> None:
    """The decoder has time for all that coverage rests on; then the clock says that it is over."""
    monkeypatch.setattr(generating, "share", lambda end, stages: 0.0 if stages == 1 else 100.0)
    parts: list[float | None] = []
    real = validating._judge

    def judge(*given: Any) -> validate.ParityReport:
        parts.append(given[4])
        return real(*given)

    monkeypatch.setattr(validating, "_judge", judge)
    out = shutil.copytree(written, tmp_path / "out")
    report = pipeline.validate_artifact(out, limits=pipeline.Limits(max_seconds=limit))
    assert parts == [100.0]
    assert {left.case.split()[0] for left in report.left_out} >= {"part=generated"}
    assert report.narrowed == narrowed
    assert any(note.startswith("narrowed by") for note in report.notes) == narrowed


@pytest.mark.parametrize(
    ("config", "found"),
    [({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
     ({"dola_layers": "high"}, "asks for dola generation"),
     ({"output_attentions": True, "return_dict_in_generate": True}, "take output_attentions"),
     ({"max_length": 99}, "2 tokens and 97 new ones are more than the context holds")],
    ids=["cache", "dola", "attentions", "length"],
)  # fmt: skip
def test_run_refuses_a_generation_config_it_cannot_honour(
    written: Path, tmp_path: Path, config: dict[str, Any], found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = shutil.copytree(written.parent / "model", tmp_path / "model")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    request = pipeline.ModelRequest(str(source))
    pipeline.export("onnx", request, tmp_path / "out", validate=False)
    assert execute(["run", str(tmp_path / "out"), "--text", "proof before"]) == 2
    assert found in capsys.readouterr().err


def test_run_refuses_a_component_that_is_gone_or_changed(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = shutil.copytree(written, tmp_path / "lost")
    (lost / "decoder.onnx").unlink()
    changed = shutil.copytree(written, tmp_path / "changed")
    with (changed / "decoder.onnx").open("ab") as file:
        file.write(b"more")
    for place, found in ((lost, "decoder.onnx is missing"), (changed, "decoder.onnx has")):
        assert execute(["run", str(place), "--text", "proof"]) == 4
        assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "found"),
    [(["--text", ""], "'' has no tokens"),
     (["--text", "proof " * 41], "41 tokens are more than the context holds"),
     (["--text", "proof", "--max-new-tokens", "41"], "more than the context holds")],
)  # fmt: skip
def test_run_refuses_what_does_not_fit(
    written: Path, asked: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["run", str(written), *asked]) == 2
    assert found in capsys.readouterr().err


def test_uneven_texts_are_padded_on_the_left(written: Path) -> None:
    with load_pipeline(written, threads=1) as model:
        prompt = model.prompt(["proof", "it says what is measured"])
        assert prompt["attention_mask"].tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
        alone = model.generate(**model.prompt(["proof"]), max_new_tokens=5)
        together = model.generate(**prompt, max_new_tokens=5)
        assert together[0, -5:].tolist() == alone[0, -5:].tolist()
        with pytest.raises(UsageError, match="'' has no tokens"):
            model.prompt(["proof", ""])


def test_inspect_shows_the_component(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "decoder.onnx" in shown
    assert "past_key_0 … past_value_1, 4 of them  float32[batch, 4, past, 8]" in shown
    assert "attention_mask  int64[batch, past+sequence]" in shown
    assert execute(["inspect", str(written), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["manifest"]
    assert record["components"]["decoder"]["facts"]["opset"] == 17


def test_published_pulled_and_verified(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, pulled = f"file://{tmp_path}/repository", tmp_path / "pulled"
    assert execute(["publish", str(written), place, "--allow-unproven"]) == 0
    assert execute(["pull", place, str(pulled)]) == 0
    assert execute(["verify", str(pulled)]) == 0
    capsys.readouterr()
    assert artifacts.read(pulled).manifest == artifacts.read(written).manifest
    with load_pipeline(pulled, threads=1) as model:
        assert model.generate(**model.prompt(["proof"]), max_new_tokens=3).shape == (1, 4)
    (pulled / "decoder.onnx").unlink()
    assert execute(["verify", str(pulled)]) == 4


def test_half_precision_applies_to_the_component(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    source = pipeline.ModelRequest(str(tiny("gpt2", "text-generation")))
    pipeline.export("onnx", source, out, OnnxOptions(dtype="fp16"), validate=False)
    manifest = artifacts.verify(out).manifest
    weights = manifest.components["decoder"].facts["weight_bytes"]
    assert weights["float16"] > weights.get("float32", 0)
    assert manifest.facts["precision"] == "float16"


class Given(Session):
    """Answers with what it was given."""

    runtime = "given"

    def __init__(self, spec: Any, outputs: Mapping[str, np.ndarray]) -> None:
        super().__init__(spec)
        self._outputs = outputs

    def placement(self) -> Placement:
        return Placement("cpu")

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(self._outputs)


def compared(written: Path, **changed: np.ndarray) -> dict[str, str]:
    """Verdicts by output, of a candidate that differs from its reference in ``changed``."""
    prompt = generating._Prompt.of(artifacts.read(written))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (3, 4))
    logits = rng.standard_normal((3, 4, 99)).astype(np.float32)
    logits[np.arange(3)[:, None], np.arange(4), tokens] = 9.0
    wanted = {"greedy": tokens, "logits": logits, "sampled 0": tokens + 1, "sampled 1": tokens,
              "beams": tokens, "scores": np.array([-3.0, -4.0, -5.0])}  # fmt: skip
    candidate = Given(prompt.spec, {**wanted, **changed})
    truth = Given(prompt.forced(), {"logits": logits.astype(np.float64)})
    found = generating._Tokens(candidate, Given(prompt.spec, wanted), lambda: truth)
    found.compare(validate.Case((("batch", 3), ("sequence", 5)), "left", 1))
    return {result.output: result.verdict for result in found._results}


def test_equal_tokens_pass(written: Path) -> None:
    names = ("greedy", "sampled 0", "sampled 1", "beams")
    assert compared(written) == dict.fromkeys(names, "pass")


def test_other_greedy_tokens_fail(written: Path) -> None:
    assert compared(written, greedy=np.full((3, 4), 98))["greedy"] == "fail"


def test_one_other_draw_is_noted_and_two_fail(written: Path) -> None:
    other = np.full((3, 4), 98)
    assert compared(written, **{"sampled 0": other}) == {
        "greedy": "pass", "sampled 1": "pass", "beams": "pass"
    }  # fmt: skip
    both = compared(written, **{"sampled 0": other, "sampled 1": other})
    assert (both["sampled 0"], both["sampled 1"]) == ("fail", "fail")


def test_other_beams_pass_at_equal_scores_only(written: Path) -> None:
    other = np.full((3, 4), 98)
    assert compared(written, beams=other)["beams"] == "pass"
    worse = np.array([-3.0, -4.0, -5.1])
    assert compared(written, beams=other, scores=worse)["beams"] == "fail"


def test_a_side_that_raises_is_the_outcome_of_its_case(written: Path) -> None:
    class Broken(Given):
        def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise ValueError("no such layer")

    spec = generating._Prompt.of(artifacts.read(written)).spec
    logits = np.zeros((3, 4, 99), np.float32)
    for broken, side in ((True, "source"), (False, "artifact")):
        sides = [Given(spec, {"logits": logits}), Broken(spec, {})]
        candidate, reference = sides if broken else sides[::-1]
        found = generating._Tokens(candidate, reference, lambda: sides[0])  # noqa: B023
        found.compare(validate.Case((("batch", 3), ("sequence", 5)), "none", 1))
        (result,) = found._results
        assert result.verdict == "fail"
        assert result.reason == f"the {side}'s generate fails: no such layer"


def heard(spec: Any, cases: list[validate.Case], *, deaf: bool) -> validate.Verdict:
    """The verdict of the generation gate where answers follow from the prompt's last token, or not.

    The last token of every row is content: rows are padded on the left.
    """

    class Model(Session):
        runtime = "made up"

        def placement(self) -> Placement:
            return Placement("cpu")

        def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            last = feeds["input_ids"][:, -1] * (0 if deaf else 1)
            logits = np.random.default_rng(0).standard_normal((99, 1, 99))[last]
            return {"greedy": logits.argmax(-1), "logits": logits.astype(np.float32)}

    compared = generating._Tokens(Model(spec), Model(spec), lambda: Model(spec))
    for case in cases:
        compared.compare(case)
    empty = validate.ParityReport("pass", {}, validate.Rule(), True, 1, (), (), (), (), {}, 0.0)
    return compared.added_to(empty).gates["generation"]


def test_equal_prompts_may_be_answered_alike_and_others_may_not(written: Path) -> None:
    spec = generating._Prompt.of(artifacts.read(written)).spec
    twice = [validate.Case((("batch", 3), ("sequence", 5)), "left", 1)] * 2
    assert heard(spec, twice, deaf=False) == "pass"
    assert heard(spec, twice, deaf=True) == "suspect"


def test_a_prompt_is_what_is_not_padding(written: Path) -> None:
    spec = generating._Prompt.of(artifacts.read(written)).spec
    ids = np.array([[9, 9, 4, 5], [7, 7, 4, 5], [1, 2, 4, 5]])
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    one, two, other = generating._contents(spec, {"input_ids": ids, "attention_mask": mask})
    assert one == two != other
