"""Buckets, ranges and routing: every size in range lands in exactly one profile."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelport import profiles
from modelport.errors import SpecError, UsageError
from modelport.profiles import Engine, Profile
from modelport.spec import Dim, ModelSpec, TensorSpec

DEFAULT = "1,2,4,8,16,32,64"
SPEC = ModelSpec(
    (TensorSpec("input_ids", "int64", ("batch", "sequence")),
     TensorSpec("pixels", "float32", ("batch", 3))),
    (TensorSpec("out", "float32", ("batch", "sequence", 8)),),
    {"batch": Dim(1, 8, 64), "sequence": Dim(1, 128, 512)},
)  # fmt: skip


def test_buckets_begin_where_the_one_before_ends() -> None:
    assert profiles.buckets(DEFAULT) == (
        Dim(1, 1, 1), Dim(2, 2, 2), Dim(3, 4, 4), Dim(5, 8, 8), Dim(9, 16, 16), Dim(17, 32, 32),
        Dim(33, 64, 64),
    )  # fmt: skip


def test_a_fixed_batch_is_written_as_a_range() -> None:
    assert profiles.buckets("8:8:8") == (Dim(8, 8, 8),)
    assert profiles.buckets("1, 2:3:8") == (Dim(1, 1, 1), Dim(2, 3, 8))


@pytest.mark.parametrize(
    "text", ["", "0", "a", "4,2", "2,2", "1,4:4:4", "1,1:2:3", "-1", "1:2", "1,,2"]
)
def test_what_is_no_list_of_buckets_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)--batch-profiles.*allowed"):
        profiles.buckets(text)


@pytest.mark.parametrize(
    ("text", "model", "wanted"),
    [
        ("auto", Dim(1, 128, 512), Dim(1, 128, 512)),
        ("auto", Dim(1, 40, 40), Dim(1, 40, 40)),
        ("auto", Dim(1, 128, 8192), Dim(1, 128, 512)),
        ("auto", Dim(200, 300, 400), Dim(200, 200, 400)),
        ("auto", Dim(600, 600, 900), Dim(600, 600, 600)),
        ("1:64:256", Dim(1, 128, 512), Dim(1, 64, 256)),
        ("128", Dim(1, 128, 512), Dim(128, 128, 128)),
    ],
)
def test_sequence_ranges(text: str, model: Dim, wanted: Dim) -> None:
    assert profiles.sequence_range(text, model) == wanted


@pytest.mark.parametrize(("model", "tops"), [
    (Dim(1, 8, 64), [1, 2, 4, 8, 16, 32, 64]), (Dim(1, 8, 500), [1, 2, 4, 8, 16, 32, 64]),
    (Dim(1, 1, 16), [1, 2, 4, 8, 16]), (Dim(1, 2, 6), [1, 2, 4, 6]), (Dim(1, 1, 1), [1]),
    (Dim(3, 3, 9), [4, 8, 9]), (Dim(100, 100, 200), [100]),
])
def test_batches_that_nobody_asked_for_end_where_the_model_does(
    model: Dim, tops: list[int]
) -> None:
    found = profiles.batch_ranges("auto", model)
    assert [bucket.max for bucket in found] == tops
    assert found[0].min == model.min
    assert [bucket.min for bucket in found[1:]] == [top + 1 for top in tops[:-1]]


@pytest.mark.parametrize(("text", "model"), [
    ("1,2,128", Dim(1, 8, 64)), ("1,2,4,8,16,32,64", Dim(1, 1, 16)), ("1,2", Dim(2, 2, 4)),
])
def test_batches_the_model_does_not_take_are_refused(text: str, model: Dim) -> None:
    with pytest.raises(UsageError, match="--batch-profiles asks for batches of 1 to") as caught:
        profiles.plan(ModelSpec((), (), {"batch": model}), text, "auto")
    assert caught.value.allowed == f"{model.min} to {model.max} for this model"


@pytest.mark.parametrize("text", ["1:128:513", "0:1:2", "8:4:2", "1:2", "x", "", "513"])
def test_sequences_the_model_does_not_take_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)--seq-lens.*allowed"):
        profiles.sequence_range(text, Dim(1, 128, 512))


def test_shapes_of_an_input_at_a_bucket() -> None:
    third = profiles.plan(SPEC, DEFAULT, "1:128:512")[2]
    assert third.shapes(SPEC, "input_ids") == ((3, 1), (4, 128), (4, 512))
    assert third.shapes(SPEC, "pixels") == ((3, 3), (4, 3), (4, 3))


@pytest.mark.parametrize("layout", ["auto", "multi-profile", "engine-per-profile"])
def test_every_batch_and_length_lands_in_exactly_one_valid_profile(
    layout: profiles.Layout,
) -> None:
    engines = profiles.arrange(profiles.plan(SPEC, DEFAULT, "1:128:512"), layout)
    for batch in range(1, 65):
        for length in (1, 2, 127, 128, 129, 511, 512):
            sizes = {"batch": batch, "sequence": length}
            admitting = [(e, p) for e, engine in enumerate(engines)
                         for p, profile in enumerate(engine.profiles) if profile.admits(sizes)]
            found = profiles.route(engines, sizes)
            assert admitting == [(found.engine, found.profile)]


@given(
    tops=st.lists(st.integers(1, 200), min_size=1, max_size=12, unique=True).map(sorted),
    batch=st.integers(1, 260),
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)).map(sorted),
    length=st.integers(1, 70),
    layout=st.sampled_from(["auto", "multi-profile", "engine-per-profile"]),
)
def test_routing_agrees_with_the_ranges(
    tops: list[int], batch: int, lengths: list[int], length: int, layout: profiles.Layout
) -> None:
    spec = replace(SPEC, dims={**SPEC.dims, "batch": Dim(1, 8, 200)})
    planned = profiles.plan(spec, ",".join(map(str, tops)), ":".join(map(str, lengths)))
    engines = profiles.arrange(planned, layout)
    assert [p for e in engines for p in e.profiles] == list(planned)
    assert len({e.file for e in engines}) == len(engines)
    sizes = {"batch": batch, "sequence": length}
    if batch > tops[-1] or not lengths[0] <= length <= lengths[-1]:
        with pytest.raises(SpecError, match="no profile takes"):
            profiles.route(engines, sizes)
        return
    found = profiles.route(engines, sizes)
    chosen = engines[found.engine].profiles[found.profile]
    assert chosen.admits(sizes)
    assert sum(p.admits(sizes) for p in planned) == 1
    assert chosen.dims["batch"].max == min(t for t in tops if t >= batch)
    dims = profiles.narrowed(SPEC, planned).dims
    assert (dims["batch"].min, dims["batch"].max) == (1, tops[-1])
    assert (dims["sequence"].min, dims["sequence"].max) == (lengths[0], lengths[-1])


def test_overlapping_profiles_go_to_the_smaller_batch() -> None:
    wide, narrow = Profile({"batch": Dim(1, 8, 64)}), Profile({"batch": Dim(1, 2, 4)})
    engines = (Engine("a", (wide, narrow)),)
    assert profiles.route(engines, {"batch": 3}).profile == 1
    assert profiles.route(engines, {"batch": 5}).profile == 0


@pytest.mark.parametrize(("count", "files"), [(1, 1), (8, 1), (9, 9)])
def test_auto_puts_up_to_eight_profiles_into_one_engine(count: int, files: int) -> None:
    planned = profiles.plan(SPEC, ",".join(map(str, range(1, count + 1))), "auto")
    assert len(profiles.arrange(planned, "auto")) == files
    assert len(profiles.arrange(planned, "multi-profile")) == 1


def test_a_model_of_fixed_shapes_has_one_profile_without_dimensions() -> None:
    fixed = ModelSpec((TensorSpec("x", "float32", (2, 3)),), ())
    engines = profiles.arrange(profiles.plan(fixed, DEFAULT, "auto"), "engine-per-profile")
    assert engines == (Engine("model.engine", (Profile({}),)),)
    assert profiles.route(engines, {}) == profiles.Route(0, 0)
    assert engines[0].profiles[0].shapes(fixed, "x") == ((2, 3),) * 3


@pytest.mark.parametrize("layout", ["multi-profile", "engine-per-profile"])
def test_the_edges_visit_every_profile(layout: profiles.Layout) -> None:
    engines = profiles.arrange(profiles.plan(SPEC, "1,2,4,16", "1:8:64"), layout)
    edges = profiles.edges(engines)
    assert edges == {"batch": (1, 2, 3, 4, 5, 16), "sequence": (1, 64)}
    visited = {profiles.route(engines, {"batch": b, "sequence": 64}) for b in edges["batch"]}
    assert len(visited) == 4


def test_the_record_survives_json() -> None:
    engines = profiles.arrange(profiles.plan(SPEC, DEFAULT, "auto"), "engine-per-profile")
    assert profiles.from_record(json.loads(json.dumps(profiles.record(engines))), SPEC) == engines


@pytest.mark.parametrize(
    "found",
    [None, [], {}, [{}], [{"file": "x", "profiles": []}], [{"file": "x", "profiles": [{}]}], "text",
     [{"file": "x", "profiles": [{"batch": [1, 2], "sequence": [1, 1, 1]}]}],
     [{"file": "x", "profiles": [{"batch": [4, 2, 1], "sequence": [1, 1, 1]}]}]],
)  # fmt: skip
def test_a_record_from_outside_is_checked(found: object) -> None:
    with pytest.raises(UsageError, match="profiles"):
        profiles.from_record(found, SPEC)
