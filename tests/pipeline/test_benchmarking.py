"""``modelport bench`` on tiny models: artifacts, bare files, their source, shapes and a corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from modelport import pipeline
from modelport.cli import execute
from modelport.commands.bench import _grid
from modelport.errors import UsageError

QUICK = ["--rounds", "1", "--seconds", "0.05", "--threads", "1", "--json"]


@pytest.fixture(scope="module")
def source(tiny) -> Path:
    return tiny("camembert", "text-classification")


@pytest.fixture(scope="module")
def artifact(source, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bench") / "onnx"
    pipeline.export("onnx", pipeline.ModelRequest(str(source)), root, validate=False)
    return root


@pytest.fixture(scope="module")
def bare(artifact, tmp_path_factory) -> Path:
    """The same graph as a file somebody else might have made, its weights beside it."""
    folder = tmp_path_factory.mktemp("theirs")
    for file in artifact.glob("model.*"):
        shutil.copy(file, folder)
    return folder / "model.onnx"


def bench(capsys, *arguments) -> dict:
    code = execute(["bench", *map(str, arguments), *QUICK])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def options(**given):
    defaults = dict.fromkeys(
        ("baseline", "baseline_revision", "runtime_names", "batch_sizes", "seq_lens", "threads",
         "batching", "corpus", "memory_limit", "p95", "scenario", "target_rate"))
    fixed = {"baseline_weights": "pretrained", "device": "cpu", "token_budget": 4096, "rounds": 5,
             "samples": 140, "seconds": 1.0, "timeout": 1.0, "duration": 60.0,
             "target_latency": 100.0}
    return _grid(**{**defaults, **fixed, **given}).sweep


def test_artifact_file_and_source_are_measured_side_by_side(
    artifact, bare, source, tmp_path, capsys
):
    found = bench(capsys, artifact, bare, "--baseline", source, "--batch-sizes", "2",
                  "--seq-lens", "5", "--output", tmp_path / "run")
    rows = {row["cell"]["subject"]: row for row in found["rows"]}
    assert set(rows) == {"onnx", f"{bare.parent.name}/model.onnx", "model/torch_eager"}
    assert {row["status"] for row in rows.values()} == {"ok"}, [r["detail"] for r in rows.values()]
    assert found["reference"] == "model/torch_eager"
    assert rows[f"{bare.parent.name}/model.onnx"]["parity"] == "not validated"
    assert rows["onnx"]["share"]["flops_per_second"] > 0
    assert json.loads((artifact / "benchmark.json").read_text()) == found


def test_other_weights_beside_a_bare_file_are_another_measurement(bare, tmp_path):
    from modelport.pipeline.benchmarking import _digest

    before = _digest(bare, {})
    copy = tmp_path / "copy"
    shutil.copytree(bare.parent, copy)
    assert _digest(copy / "model.onnx", {}) == before
    assert _digest(copy / "model.onnx", {"dims": {}}) != before  # held to another contract
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert _digest(copy / "model.onnx", {}) != before


def test_a_bare_file_alone_needs_the_model_it_came_from(bare, tmp_path):
    with pytest.raises(UsageError, match="does not say what goes in") as caught:
        pipeline.bench([bare], tmp_path / "run", pipeline.Grid())
    assert "--baseline" in caught.value.hint


def test_a_text_without_a_tokenizer_is_refused(artifact, tmp_path):
    text = tmp_path / "sentences.txt"
    text.write_text("One sentence.\n")
    with pytest.raises(UsageError, match="has a tokenizer") as caught:
        pipeline.bench([artifact], tmp_path / "run", pipeline.Grid(corpus=text))
    assert "built-in" in caught.value.hint


@pytest.fixture(scope="module")
def image(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("image") / "vit"
    pipeline.export("onnx", pipeline.ModelRequest(str(tiny("vit"))), root, validate=False)
    return root


def test_a_model_of_images_is_measured_once_for_each_batch_size(image, tmp_path, capsys):
    found = bench(capsys, image, "--batch-sizes", "1,2", "--output", tmp_path / "run")
    assert [(r["cell"]["batch"], r["cell"]["sequence"], r["tokens"]) for r in found["rows"]] == [
        (1, 0, None), (2, 0, None)]
    assert {r["workload"] for r in found["recommendations"]} == {"by batch size"}


def test_a_recipe_for_any_kind_passes_over_what_images_do_not_take(
    image, tmp_path, capsys
):
    found = bench(capsys, image, "--any-kind", "--batch-sizes", "1", "--seq-lens", "16",
                  "--batching", "sorted", "--output", tmp_path / "run")
    assert [r["cell"]["sequence"] for r in found["rows"]] == [0]


@pytest.mark.parametrize(("asked", "said"), [
    ({"sweep": {"sequences": (16,)}}, "--seq-lens"),
    ({"usual": ("sequence",), "sweep": {"batchings": ("sorted",)}}, "--batching")])
def test_a_model_of_images_takes_no_sentences(image, tmp_path, asked, said):
    with pytest.raises(UsageError, match="takes no sequence") as caught:
        pipeline.bench([image], tmp_path / "run", pipeline.Grid(**asked))
    assert said in caught.value.hint


def test_images_and_sentences_are_not_measured_together(image, artifact, tmp_path):
    with pytest.raises(UsageError, match="takes no sequence, and others do"):
        pipeline.bench([image, artifact], tmp_path / "run", pipeline.Grid(usual=("sequence",)))


def test_sizes_that_an_artifact_does_not_take_are_refused_where_named_and_else_left_out(
    artifact, tmp_path
):
    from modelport import artifacts
    from modelport.pipeline.benchmarking import _fitting

    spec = artifacts.read(artifact).spec
    most = spec.dims["sequence"].max
    with pytest.raises(UsageError, match=f"does not take a sequence of {most + 1}") as caught:
        pipeline.bench([artifact], tmp_path / "run",
                       pipeline.Grid(sweep={"sequences": (4, most + 1)}))
    assert caught.value.allowed == f"1 to {most}"
    usual = pipeline.Grid(usual=("sequence",), sweep={"sequences": (4, most + 1)})
    assert _fitting(usual, {"it": spec})["sequences"] == (4,)
    assert _fitting(pipeline.Grid(), {"it": spec})["batches"] == (1, 2, 4, 8, 16, 32, 64)


def test_each_artifact_counts_the_operations_of_its_own_source(artifact, tiny, tmp_path, capsys):
    """A deeper model beside it would else lend it its own."""
    other = tmp_path / "other"
    pipeline.export("onnx", pipeline.ModelRequest(str(tiny("bert"))), other, validate=False)
    for order in ((artifact, other), (other, artifact)):
        found = bench(capsys, *order, "--batch-sizes", "1", "--seq-lens", "4", "--output",
                      tmp_path / f"run-{order[0].name}")
        counted = {r["cell"]["subject"]: r["share"]["flops_per_second"] * r["p50"]["value"]
                   for r in found["rows"]}
        alone = {root.name: _alone(root) for root in order}
        assert counted == pytest.approx(alone)


def _alone(root: Path) -> float:
    from types import SimpleNamespace

    from modelport import artifacts
    from modelport.pipeline.benchmarking import _work

    found = artifacts.read(root)
    identity = found.manifest.identity
    subject = SimpleNamespace(identity=identity, weight_bytes=7)
    work = _work([subject], [found], None)(SimpleNamespace(identity=identity, batch=1, sequence=4))
    assert work.bytes > 7
    return work.flops


def test_a_source_that_decides_by_values_is_measured_without_its_operations(
    artifact, tmp_path, capsys, monkeypatch
):
    from modelport.runtimes.benchmark import ceilings

    def decides(module, inputs):
        raise NotImplementedError("aten::unique_consecutive: no data")

    monkeypatch.setattr(ceilings, "count_flops", decides)
    found = bench(capsys, artifact, "--batch-sizes", "1", "--seq-lens", "4", "--output",
                  tmp_path / "run")
    assert found["rows"][0]["share"] is None
    assert "unique_consecutive" in found["notes"][0]


def test_a_model_that_generates_is_refused_beside_graphs(artifact, tmp_path, monkeypatch):
    import dataclasses

    from modelport import artifacts

    read = artifacts.read(artifact)
    several = dataclasses.replace(read, manifest=dataclasses.replace(
        read.manifest, components={"encoder": None}))
    monkeypatch.setattr(artifacts, "verify", lambda _: several)
    with pytest.raises(UsageError, match="generates"):
        pipeline.bench([artifact], tmp_path / "run", pipeline.Grid())


def test_without_a_corpus_the_shapes_are_measured():
    found = options()
    assert found["batches"] == (1, 2, 4, 8, 16, 32, 64)
    assert found["sequences"] == (16, 128, 384)
    assert (found["batchings"], found["traffic"]) == ((), ())


def test_a_corpus_is_measured_instead_of_shapes_and_in_all_three_ways(tmp_path):
    found = options(corpus=tmp_path)
    assert (found["batches"], found["sequences"]) == ((), ())
    assert found["batchings"] == ("padded", "sorted", "token-budget")
    assert found["corpus_batches"] == (32,)
    assert options(batching="sorted", batch_sizes="1,8")["corpus_batches"] == (1, 8)


def test_shapes_are_measured_beside_a_corpus_when_lengths_are_named():
    found = options(batching="sorted", seq_lens="16")
    assert (found["sequences"], found["batchings"]) == ((16,), ("sorted",))


def test_a_scenario_is_measured_alone():
    found = options(scenario="server,offline", target_rate=5.0, target_latency=20.0)
    assert [t.scenario for t in found["traffic"]] == ["Server", "Offline"]
    assert (found["traffic"][0].rate, found["traffic"][0].limit) == (5.0, 0.02)
    assert (found["batches"], found["batchings"]) == ((), ())


@pytest.mark.parametrize("option", ["--batching", "--scenario"])
def test_an_unknown_choice_names_the_known_ones(option, artifact, capsys):
    assert execute(["bench", str(artifact), option, "nonsense"]) == 2
    assert "nonsense is none of" in capsys.readouterr().err


def test_a_runtime_takes_options_and_each_is_a_column(artifact, source, tmp_path, capsys):
    pytest.importorskip("openvino")
    found = bench(capsys, artifact, "--baseline", source, "--batch-sizes", "1", "--seq-lens", "4",
                  "--output", tmp_path / "run", "--runtimes",
                  "openvino:precision=bf16,onnxruntime:level=basic,torch_eager:dtype=bfloat16,"
                  "torch_eager")
    rows = {row["cell"]["subject"]: row["cell"] for row in found["rows"]}
    assert set(rows) == {
        "onnx/openvino:precision=bf16", "onnx/onnxruntime:level=basic",
        "model/torch_eager:dtype=bfloat16", "model/torch_eager"}
    assert rows["onnx/onnxruntime:level=basic"]["options"] == {"level": "basic"}
    assert rows["onnx/openvino:precision=bf16"]["dtype"] == "bfloat16"
    assert rows["model/torch_eager:dtype=bfloat16"]["dtype"] == "bfloat16"
    assert found["reference"] == "model/torch_eager"


@pytest.mark.parametrize(("text", "said"), [
    ("nonsense", "nonsense"), ("onnxruntime:nonsense=1", "no option nonsense"),
    ("onnxruntime:dtype=bfloat16", "no option dtype")])
def test_unknown_runtimes_and_options_are_refused(text, said, artifact, tmp_path):
    with pytest.raises(UsageError, match=said):
        pipeline.bench([artifact], tmp_path / "run", pipeline.Grid(runtimes=(text,)))


def test_the_source_is_measured_whatever_runtimes_are_named(artifact, source, tmp_path, capsys):
    found = bench(capsys, artifact, "--baseline", source, "--batch-sizes", "1", "--seq-lens", "4",
                  "--runtimes", "onnxruntime,torch_eager:dtype=bfloat16", "--output",
                  tmp_path / "run")
    assert {row["cell"]["subject"] for row in found["rows"]} == {
        "onnx", "model/torch_eager", "model/torch_eager:dtype=bfloat16"}
    assert found["reference"] == "model/torch_eager"


def test_what_compiles_the_source_is_not_what_it_is_measured_against(source):
    from modelport.pipeline.benchmarking import Entrant, _of_baseline

    found = _of_baseline(pipeline.ModelRequest(str(source)).resolve(),
                         [Entrant.of("onnxruntime"), Entrant.of("torch_compile")])
    assert [one.runtime for one in found] == ["torch_compile", "torch_eager"]


def test_the_source_for_another_task_is_another_measurement(artifact, source, tmp_path):
    from modelport.pipeline.benchmarking import Entrant, _of_baseline

    (first,), (second,) = (
        _of_baseline(pipeline.ModelRequest(str(source), task=task).resolve(),
                     [Entrant.of("torch_eager")])
        for task in ("text-classification", "feature-extraction"))
    assert first.identity != second.identity


def test_an_artifact_that_no_named_runtime_opens_is_refused(artifact, tmp_path):
    with pytest.raises(UsageError, match=r"torchscript opens .*onnx") as caught:
        pipeline.bench([artifact], tmp_path / "run", pipeline.Grid(runtimes=("torchscript",)))
    assert "onnxruntime" in caught.value.allowed


ONE = ["--batch-sizes", "1", "--seq-lens", "4", "--runtimes", "onnxruntime", *QUICK]


def test_a_run_is_held_against_an_older_one(artifact, tmp_path, capsys):
    """The whole gate by its exit codes; what counts as slower is the statistics' business."""
    def asked(output, *more):
        code = execute(["bench", str(artifact), *ONE, "--output", str(output), *map(str, more)])
        return code, capsys.readouterr()

    old, new = tmp_path / "old", tmp_path / "new"
    assert asked(old)[0] == 0
    kept = (old / "benchmark.json").read_bytes()
    code, said = asked(old, "--against", old)
    assert code == 2
    assert "would be replaced" in said.err
    assert (old / "benchmark.json").read_bytes() == kept
    code, said = asked(new, "--against", old)
    assert code == 0
    assert "not compared" in said.err  # one round supports no claim
    json.loads(said.out)
    code, said = asked(new, "--against", old, "--seq-lens", "5")
    assert code == 3
    assert "no measurement has a counterpart" in said.err
    json.loads(said.out)  # one document: the error comes after it, on stderr
    assert asked(new, "--against", tmp_path)[0] == 2


def test_an_invalid_run_says_so_also_beside_an_older_one(artifact, tmp_path, capsys, monkeypatch):
    """It has no counterpart there, which is not what is wrong with it."""
    from modelport.runtimes.benchmark import report

    assert execute(["bench", str(artifact), *ONE, "--output", str(tmp_path / "old")]) == 0
    monkeypatch.setattr(report.RunReport, "invalid", {"onnx · 1×4": "ran on cpu"})
    monkeypatch.setattr("modelport.runtimes.benchmark.against._grouped", lambda _: {})
    capsys.readouterr()
    asked = ["bench", str(artifact), *ONE, "--output", str(tmp_path / "new"), "--against",
             str(tmp_path / "old")]
    assert execute(asked) == 5
    assert "1 of 1 lines are invalid: onnx · 1×4: ran on cpu" in capsys.readouterr().err


def test_options_that_would_be_ignored_are_refused(artifact, monkeypatch, capsys):
    assert execute(["bench", str(artifact), "--new-tokens", "4"]) == 2
    assert "--new-tokens cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "bench", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        execute(["bench", str(artifact), "--new-tokens", "4", "--any-kind"])
    monkeypatch.setattr(pipeline, "generates", lambda _: True)
    assert execute(["bench", str(artifact), "--scenario", "server", "--p95", "3"]) == 2
    assert "--scenario cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("names", [
    ("--baseline-revision", "--baseline-weights"), ("--revision", "--weights")])
def test_which_baseline_of_a_hub_is_meant(names, artifact, monkeypatch, capsys):
    """The second names are those that errors about a model give."""
    asked = []

    def measured(paths, output, grid, **_):
        asked.append(grid.baseline)
        pytest.fail("measured")

    monkeypatch.setattr(pipeline, "bench", measured)
    said = ["--trust-remote-code", names[0], "0" * 40, names[1], "random"]
    with pytest.raises(pytest.fail.Exception, match="measured"):
        execute(["bench", str(artifact), "--baseline", "owner/model", *said])
    assert asked == [pipeline.ModelRequest("owner/model", revision="0" * 40, weights="random",
                                           trust_remote_code=True)]
    assert execute(["bench", str(artifact), *said]) == 2
    assert "--baseline-revision goes with --baseline" in capsys.readouterr().err


def test_a_usage_error_is_a_document_too(capsys):
    assert execute(["bench", "--json", "--rounds", "0"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["exit_code"] == 2
    assert "--rounds" in said.err


def test_all_cores_are_those_that_this_process_may_use():
    import os

    assert options()["threads"] == (len(os.sched_getaffinity(0)),)


def test_a_source_of_its_own_code_is_another_when_that_code_is(tiny, tmp_path):
    """In a hub's cache the code is a link."""
    from modelport.pipeline.sources import told_apart

    root = shutil.copytree(tiny("bert"), tmp_path / "model")
    config = json.loads((root / "config.json").read_text())
    config["auto_map"] = {"AutoModelForMaskedLM": "modeling_mine.Mine"}
    (root / "config.json").write_text(json.dumps(config))
    code = tmp_path / "blob"
    code.write_text("from transformers import BertForMaskedLM as Mine\n")
    (root / "modeling_mine.py").symlink_to(code)

    def told():
        return told_apart(pipeline.ModelRequest(str(root), trust_remote_code=True).resolve())

    first = told()
    assert told() == first
    code.write_text("from transformers import BertForMaskedLM as Mine  # another\n")
    assert told() != first
