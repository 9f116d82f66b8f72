"""The plan covers what it promises, keeps to its limits, and lists whatever it leaves out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelport.errors import UsageError
from modelport.spec import Dim, ModelSpec, TensorSpec
from modelport.validate import Case, plan
from modelport.validate.matrix import (
    PADDINGS,
    admits,
    fitted,
    memory,
    output_elements,
    positions,
    sizes_of,
)

TOKENS = ("batch", "sequence")


def encoder(batch: Dim, sequence: Dim, *, mask: bool = True, width: int = 8) -> ModelSpec:
    inputs = (TensorSpec("ids", "int64", TOKENS, "tokens", 100, 1),
              *((TensorSpec("mask", "int64", TOKENS, "mask", 2),) if mask else ()))
    return ModelSpec(inputs, (TensorSpec("x", "float32", (*TOKENS, width)),),
                     {"batch": batch, "sequence": sequence})


DIMS = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(0, 500)).map(
    lambda t: Dim(t[0], t[0] + t[1], t[0] + t[1] + t[2]))
SPECS = st.builds(encoder, DIMS, DIMS, mask=st.booleans())
CAMEMBERT = encoder(Dim(1, 8, 64), Dim(1, 128, 512), width=32005)


@settings(max_examples=50, deadline=None)
@given(SPECS)
def test_every_size_is_planned_under_every_padding_it_admits(spec):
    chosen = plan(spec, max_memory=1 << 60)
    assert not chosen.left_out
    essential = [c for c in chosen.cases if c.essential]
    for name, dim in spec.dims.items():
        for size in sizes_of(name, dim):
            for padding in PADDINGS:
                possible = any((name, size) in c.sizes and c.padding == padding
                               for c in chosen.cases)
                covered = any((name, size) in c.sizes and c.padding == padding for c in essential)
                assert possible == covered
                assert covered or padding != "none"
    if any(t.role == "mask" for t in spec.inputs) and all(d.max > 1 for d in spec.dims.values()):
        assert {c.padding for c in essential} == set(PADDINGS)
    assert len({c.label for c in chosen.cases}) == len(chosen.cases)
    assert all(admits(spec, dict(c.sizes), c.padding) for c in chosen.cases)
    first_extra = next((i for i, c in enumerate(chosen.cases) if not c.essential), len(essential))
    assert first_extra == len(essential)


@given(DIMS, st.sets(st.integers(1, 40), max_size=6))
def test_ends_and_two_untraced_odd_sizes_are_among_the_sizes(dim, traced):
    for name in ("batch", "sequence", "choices"):
        sizes = sizes_of(name, dim, traced)
        assert sizes[0] == dim.min
        assert sizes[-1] == dim.max
        assert list(sizes) == sorted(set(sizes))
        inside = [v for v in range(dim.min + 1, dim.max) if v % 2 and v not in traced]
        found = [v for v in sizes if v % 2 and v not in traced and dim.min < v < dim.max]
        assert len(found) >= min(2, len(inside)), (dim, traced, sizes)


@settings(max_examples=50, deadline=None)
@given(SPECS, st.floats(0, 60), st.integers(1 << 16, 1 << 28))
def test_limits_are_kept_and_what_they_exclude_is_listed(spec, seconds, limit):
    def cost(case: Case) -> float:
        return positions(spec, case) / 1000

    everything = plan(spec, max_memory=1 << 60)
    chosen = plan(spec, max_seconds=seconds, max_memory=limit, cost=cost)
    assert sum(map(cost, chosen.cases)) <= seconds + 1e-9
    assert all(memory(spec, case) <= limit for case in chosen.cases)
    labels = {c.label for c in chosen.cases} | {left.case for left in chosen.left_out}
    assert labels == {c.label for c in everything.cases}
    assert len(chosen.cases) + len(chosen.left_out) == len(everything.cases)
    assert all(left.reason for left in chosen.left_out)


def test_a_large_model_meets_its_extremes_one_at_a_time():
    chosen = plan(CAMEMBERT)
    essential = {c.sizes for c in chosen.cases if c.essential}
    assert (("batch", 1), ("sequence", 512)) in essential
    assert any(dict(sizes)["batch"] == 64 for sizes in essential)
    assert sum(positions(CAMEMBERT, c) for c in chosen.cases if c.essential) < 8000
    both = "batch=64 sequence=512"
    assert any(left.case.startswith(both) for left in chosen.left_out)
    assert not any(c.shape == both for c in chosen.cases)


def test_three_seeds_are_used_even_without_dynamic_sizes():
    fixed = ModelSpec((TensorSpec("ids", "int64", (2, 8), "tokens", 50),), (), {})
    assert sorted(c.seed for c in plan(fixed).cases) == [0, 1, 2]
    masked = ModelSpec((*fixed.inputs, TensorSpec("mask", "int64", (2, 8), "mask")), (), {})
    cases = plan(masked).cases
    assert {c.padding for c in cases} == set(PADDINGS)
    assert {c.seed for c in cases} == {0, 1, 2}
    assert {c.seed for c in plan(CAMEMBERT).cases if c.essential} == {0, 1, 2}


def test_other_dimensions_vary_without_the_full_product():
    names = ("batch", "choices", "sequence")
    spec = ModelSpec((TensorSpec("ids", "int64", names, "tokens", 50, 1),
                      TensorSpec("mask", "int64", names, "mask")), (),
                     {"batch": Dim(1, 2, 64), "choices": Dim(1, 2, 31), "sequence": Dim(1, 8, 512)})
    chosen = plan(spec, max_memory=1 << 60)
    for size in sizes_of("choices", spec.dims["choices"]):
        assert any(c.essential and dict(c.sizes)["choices"] == size for c in chosen.cases)
    assert len(chosen.cases) < 200


def test_a_model_without_masks_has_no_padding():
    assert {c.padding for c in plan(encoder(Dim(1, 2, 8), Dim(1, 2, 8), mask=False)).cases} \
        == {"none"}


def test_chosen_sizes_replace_the_default_and_are_checked():
    chosen = plan(CAMEMBERT, sizes={"batch": (5, 2), "sequence": ()})
    assert {dict(c.sizes)["batch"] for c in chosen.cases} == {2, 5}
    assert max(dict(c.sizes)["sequence"] for c in chosen.cases) == 512
    with pytest.raises(UsageError, match="batch 65"):
        plan(CAMEMBERT, sizes={"batch": (65,)})
    with pytest.raises(UsageError, match="no dimension length"):
        plan(CAMEMBERT, sizes={"length": (1,)})


def test_given_cases_run_first():
    given_ones = [Case((("batch", 1), ("sequence", 1)), origin="file")]
    assert (plan(CAMEMBERT) + given_ones).cases[0] is given_ones[0]


CACHED = ModelSpec(
    (TensorSpec("ids", "int64", TOKENS, "tokens", 100, 1),
     TensorSpec("mask", "int64", ("batch", "past+sequence"), "mask"),
     TensorSpec("tail", "int64", (), "tail", high=3),
     TensorSpec("past", "float32", ("batch", 2, "past", 4), "features")),
    (TensorSpec("x", "float32", ("batch", "tail", 8)),
     TensorSpec("present", "float32", ("batch", 2, "past+sequence", 4))),
    {"batch": Dim(1, 8, 64), "sequence": Dim(1, 40, 40), "past": Dim(0, 39, 39),
     "past+sequence": Dim(1, 40, 40)})


def test_sums_keep_their_limit_and_every_term_reaches_its_ends():
    cases = plan(CACHED).cases
    for case in cases:
        sizes = dict(case.sizes)
        assert set(sizes) == {"batch", "sequence", "past"}
        assert sizes["past"] + sizes["sequence"] <= 40
    for name in ("sequence", "past"):
        for padding in ("none", "right", "left"):
            found = {dict(c.sizes)[name] for c in cases if c.padding == padding and c.essential}
            assert {CACHED.dims[name].min, CACHED.dims[name].max} <= found
    prefill = {dict(c.sizes)["sequence"] for c in cases if dict(c.sizes)["past"] == 0}
    assert len(prefill) > 3
    assert {dict(c.sizes)["past"] for c in cases if dict(c.sizes)["sequence"] == 1} >= {0, 3, 39}


def test_what_is_not_wanted_gives_way():
    sizes = {"batch": 1, "sequence": 30, "past": 30}
    assert fitted(CACHED, sizes, ("past",)) == {"batch": 1, "sequence": 10, "past": 30}
    assert fitted(CACHED, sizes, ("sequence",)) == {"batch": 1, "sequence": 30, "past": 10}
    full = {"batch": 1, "sequence": 40, "past": 39}
    assert fitted(CACHED, full, ("past",)) == {"batch": 1, "sequence": 1, "past": 39}


def test_a_cache_counts_as_memory():
    small, large = (Case((("batch", 8), ("past", past), ("sequence", 1))) for past in (1, 39))
    assert memory(CACHED, large) > memory(CACHED, small)
    assert positions(CACHED, large) == 8 * 40


def heard(*outputs: int) -> ModelSpec:
    """The contract of wav2vec 2.0: one frame every 320 samples, of at least 400."""
    names = ("batch", "samples")
    return ModelSpec(
        (TensorSpec("input_values", "float32", names, "waveform"),
         TensorSpec("attention_mask", "int64", names, "mask")),
        tuple(TensorSpec(f"x{width}", "float32", ("batch", "frames", width)) for width in outputs),
        {"batch": Dim(1, 8, 64), "samples": Dim(720, 16_000, 160_000), "frames": Dim(2, 49, 499)})


def test_a_waveform_is_heard_at_its_usual_length_and_its_longest():
    chosen = plan(heard(768, 512))
    essential = [dict(c.sizes) for c in chosen.cases if c.essential]
    assert {sizes["samples"] for sizes in essential} == {720, 721, 15_999, 16_000, 160_000}
    assert {1, 3, 7, 64} <= {sizes["batch"] for sizes in essential}
    assert {frozenset(sizes) for sizes in essential} == {frozenset({"batch", "samples"})}
    left = {left.case.split(" ")[1] for left in chosen.left_out}
    assert left <= {"samples=160000"}


def test_a_size_that_only_outputs_have_grows_with_the_inputs():
    short, long = (Case((("batch", 2), ("samples", samples))) for samples in (16_000, 160_000))
    assert output_elements(heard(768), short) == 2 * 50 * 768
    assert output_elements(heard(768), long) == 2 * 499 * 768
