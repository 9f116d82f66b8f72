"""A manifest survives the trip through JSON, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelport.artifacts import Attempt, Component, FileEntry, Manifest, ParitySummary, Source
from modelport.artifacts.manifest import check_path, dumps, loads
from modelport.errors import PathEscape, UsageError
from modelport.spec import Dim, ModelSpec, TensorSpec

SHA = "0" * 64
names = st.text("abcdefghijklmnopqrstuvwxyz_é.", min_size=1, max_size=8)
words = st.text(max_size=12)
paths = st.lists(st.text("abcxyz_-", min_size=1, max_size=6), min_size=1, max_size=3).map("/".join)
shas = st.text("0123456789abcdef", min_size=64, max_size=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
entries = st.builds(FileEntry, shas, st.integers(0, 1 << 50))
dims = st.tuples(st.integers(1, 9), st.integers(9, 99), st.integers(99, 999)).map(
    lambda sizes: Dim(*sizes)
)
tensors = st.builds(
    TensorSpec, names, st.sampled_from(["int64", "float32", "bfloat16"]),
    st.lists(st.integers(0, 9) | names, max_size=4).map(tuple),
    st.sampled_from([None, "tokens", "mask"]), st.none() | st.integers(), st.none() | st.integers(),
)
specs = st.builds(
    ModelSpec, st.lists(tensors, max_size=2).map(tuple), st.lists(tensors, max_size=2).map(tuple),
    st.dictionaries(names, dims, max_size=2),
)
sources = st.builds(
    Source, words, words, st.sampled_from(["pretrained", "random"]), words, st.none() | words,
    st.none() | st.integers(), st.booleans(), st.booleans(),
)
summaries = st.builds(
    ParitySummary, st.sampled_from(["pass", "suspect", "fail"]), shas,
    st.dictionaries(names, words, max_size=2), st.none() | st.floats(allow_nan=False),
    st.integers(0), st.integers(0),
)
attempts = st.builds(
    Attempt, words, st.sampled_from(["kept", "rejected", "failed", "skipped"]), words,
    st.floats(0, 1e6),
)
manifests = st.builds(
    Manifest, names, specs, sources, st.dictionaries(names, json_values, max_size=3),
    st.dictionaries(names, json_values, max_size=3), st.dictionaries(names, words, max_size=2),
    st.dictionaries(paths, entries, max_size=3), st.lists(attempts, max_size=2).map(tuple),
    st.none() | summaries, st.none() | shas, st.dictionaries(names, words, max_size=2),
)


@given(manifests)
@settings(deadline=None)
def test_round_trip_is_exact_and_the_text_is_canonical(manifest: Manifest):
    text = dumps(manifest)
    again = loads(text)
    assert again == manifest
    assert dumps(again) == text
    assert text.endswith("}\n")


@pytest.fixture
def document(artifact):
    return json.loads(dumps(artifact.manifest))


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, 1.0])
def test_another_schema_says_which_one_is_supported(document, schema):
    document["schema"] = schema
    with pytest.raises(UsageError) as caught:
        loads(json.dumps(document))
    assert caught.value.allowed == "schema 1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(extra=1), "extra: unknown"),
        (lambda d: d["source"].update(extra=1), "source.extra: unknown"),
        (lambda d: d["spec"]["inputs"][0].update(extra=1), "spec.inputs.0.extra: unknown"),
        (lambda d: d.pop("format"), "format"),
        (lambda d: d.update(format=3), "format"),
        (lambda d: d["source"].update(seed="0"), "source.seed"),
        (lambda d: d["source"].update(weights="stolen"), "source.weights"),
        (lambda d: d["spec"]["inputs"][0].update(shape=[1.5]), "spec.inputs.0.shape"),
        (lambda d: d["spec"]["dims"]["batch"].update(min=-1), "spec"),
        (lambda d: d["files"]["model.onnx"].update(size=-1), "files.model.onnx.size"),
        (lambda d: d["files"]["model.onnx"].update(size="1"), "files.model.onnx.size"),
        (lambda d: d["files"]["model.onnx"].update(sha256="AB" * 32), "files.model.onnx.sha256"),
        (lambda d: d["files"]["model.onnx"].update(sha256="ab"), "files.model.onnx.sha256"),
    ],
)
def test_a_malformed_field_is_named(document, change, named):
    change(document)
    with pytest.raises(UsageError, match="malformed") as caught:
        loads(json.dumps(document))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "1", b"\xff\xfe", '{"schema": 1, "schema": 1}', "[" * 100_000,
     " " * (17 << 20), '{"schema": 1}'],
)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(UsageError):
        loads(text)


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb",
     "manifest.json"],
)
def test_a_path_out_of_the_artifact_is_refused(document, path):
    with pytest.raises(PathEscape):
        check_path(path)
    document["files"][path] = document["files"]["model.onnx"]
    with pytest.raises(PathEscape):
        loads(json.dumps(document))


@pytest.mark.parametrize("rho", [math.inf, -math.inf, math.nan])
def test_a_ratio_that_json_lacks_is_kept(artifact, rho):
    summary = ParitySummary("fail", SHA, {}, rho, 1)
    text = dumps(dataclasses.replace(artifact.manifest, parity=summary))
    json.loads(text, parse_constant=pytest.fail)
    found = loads(text).parity
    assert found is not None
    assert repr(found.worst_rho) == repr(rho)


def test_facts_may_hold_paths_and_tuples(artifact):
    facts = {"path": Path("a/b"), "pair": (1, 2), "ratio": math.inf}
    again = loads(dumps(dataclasses.replace(artifact.manifest, facts=facts)))
    assert again.facts == {"path": "a/b", "pair": [1, 2], "ratio": "Infinity"}


def test_identity_is_that_of_the_files_without_the_reports(artifact):
    manifest = artifact.manifest
    entry = FileEntry(SHA, 1)

    def with_files(**changed):
        return dataclasses.replace(manifest, files={**manifest.files, **changed}).identity

    assert with_files(**{"parity.json": entry, "benchmark.json": entry}) == manifest.identity
    assert with_files(**{"model.onnx": entry}) != manifest.identity
    assert with_files(other=entry) != manifest.identity
    backwards = dict(reversed(manifest.files.items()))
    assert dataclasses.replace(manifest, files=backwards).identity == manifest.identity
    assert dataclasses.replace(manifest, facts={"opset": 12}).identity == manifest.identity


def test_a_verdict_holds_for_exactly_one_identity(artifact):
    manifest = artifact.manifest
    assert not manifest.parity_is_current
    current = ParitySummary("pass", manifest.identity, {}, 1.0, 1)
    proven = dataclasses.replace(manifest, parity=current)
    assert proven.parity_is_current
    assert proven.proven
    files = {**manifest.files, "model.onnx": FileEntry(SHA, 1)}
    changed = dataclasses.replace(proven, files=files)
    assert not changed.parity_is_current
    assert not changed.proven
    failed = dataclasses.replace(current, verdict="fail")
    assert not dataclasses.replace(manifest, parity=failed).proven


def with_component(artifact, file):
    spec = artifact.spec
    component = Component(file, spec, {"opset": 18, "nodes": 7})
    manifest = dataclasses.replace(
        artifact.manifest, spec=ModelSpec((), ()), components={"decoder": component}
    )
    return dataclasses.replace(artifact, manifest=manifest)


def test_a_manifest_without_components_is_written_as_before_there_were_any(artifact):
    assert "components" not in json.loads(dumps(artifact.manifest))
    whole = with_component(artifact, "model.onnx")
    assert loads(dumps(whole.manifest)) == whole.manifest


def test_a_component_is_seen_as_an_artifact_of_one_graph(artifact):
    whole = with_component(artifact, "model.onnx")
    view = whole.component("decoder")
    assert (view.spec, view.graph) == (artifact.spec, "model.onnx")
    assert view.manifest.facts == {**artifact.manifest.facts, "opset": 18, "nodes": 7}
    assert view.manifest.identity == whole.manifest.identity
    assert whole.components == {"decoder": view}
    assert view.components == {}
    with pytest.raises(UsageError, match="no component encoder"):
        whole.component("encoder")


def test_a_component_names_a_file_of_the_artifact(artifact):
    whole = with_component(artifact, "../model.onnx")
    with pytest.raises(UsageError, match=r"components.decoder.file: '../model.onnx' is not among"):
        loads(dumps(whole.manifest))
