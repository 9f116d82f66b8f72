from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from modelport.errors import UsageError
from modelport.runtimes.benchmark import corpus
from modelport.runtimes.benchmark.records import Cell, CellResult, Corpus

lengths = some.lists(some.integers(1, 512), min_size=1, max_size=200)


@pytest.mark.parametrize("seed", [0, 1, 99])
def test_the_built_in_corpus_has_the_stated_distribution(seed):
    found = np.array(corpus.built_in(seed).lengths)
    assert len(found) == 1000
    assert np.median(found) == 20
    assert np.percentile(found, 95) == pytest.approx(120, abs=1)
    assert found.max() == 512
    assert found.min() == 3
    one_deviation_up = np.percentile(found, 84.13)  # Φ(1)
    assert one_deviation_up == pytest.approx(20 * np.exp(corpus.SIGMA), abs=1)


def test_the_seed_sets_the_order_and_nothing_else():
    one, other = corpus.built_in(0), corpus.built_in(1)
    assert one == corpus.built_in(0)
    assert one.lengths != other.lengths
    assert sorted(one.lengths) == sorted(other.lengths)


@given(lengths, some.sampled_from(["padded", "sorted", "token-budget"]), some.integers(1, 64),
       some.integers(1, 8192))
def test_every_sentence_is_in_exactly_one_batch_that_holds_it(found, batching, batch, budget):
    cut = corpus.batches(found, batching, batch=batch, budget=budget)
    assert sorted(i for b in cut for i in b.rows) == list(range(len(found)))
    for b in cut:
        assert 1 <= len(b.rows) <= batch
        assert b.length == max(found[i] for i in b.rows)
        assert b.tokens == sum(found[i] for i in b.rows)
        if batching == "token-budget" and len(b.rows) > 1:
            assert b.padded <= budget


@given(lengths, some.integers(1, 64))
def test_sorting_whole_batches_never_pads_more(found, batch):
    found = found[: len(found) // batch * batch]

    def padded(batching: corpus.Batching) -> int:
        return sum(b.padded for b in corpus.batches(found, batching, batch=batch))

    assert padded("sorted") <= padded("padded")


def test_a_token_budget_pads_at_most_3_percent_of_the_built_in_corpus():
    found = corpus.built_in().lengths
    cut = corpus.batches(found, "token-budget", batch=256, budget=4096)
    assert 1 - sum(found) / sum(b.padded for b in cut) <= 0.03
    assert len(cut) < 100


@given(some.lists(some.integers(1, 9), min_size=1, max_size=7), some.integers(1, 4),
       some.integers(1, 20))
def test_token_budget_batches_are_the_cheapest_of_all_cuts(found, batch, budget):
    ordered = sorted(found)

    def cheapest(start: int) -> int:
        costs = [
            corpus.CALL_TOKENS + (end - start) * ordered[end - 1] + cheapest(end)
            for end in range(start + 1, min(start + batch, len(ordered)) + 1)
            if end == start + 1 or (end - start) * ordered[end - 1] <= budget
        ]
        return min(costs, default=0)

    cut = corpus.batches(found, "token-budget", batch=batch, budget=budget)
    assert sum(b.padded + corpus.CALL_TOKENS for b in cut) == cheapest(0)


def test_a_token_budget_needs_a_budget():
    with pytest.raises(UsageError, match="without a budget"):
        corpus.batches([1, 2], "token-budget", batch=2)
    with pytest.raises(UsageError, match="no batching"):
        corpus.batches([1, 2], "shuffled", batch=2)


def test_a_text_goes_through_the_tokenizer_and_its_time_is_kept(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("one two\n\n  three  \nfour five six\n", "utf-8")
    ticks = iter(range(100))
    found = corpus.from_text(
        file, lambda texts: [[0, *range(1, len(t.split()) + 1), 2] for t in texts],
        clock=lambda: float(next(ticks)))
    assert found.lengths == (4, 3, 5)
    assert found.ids == ((0, 1, 2, 2), (0, 1, 2), (0, 1, 2, 3, 2))
    assert found.tokenise_seconds == (1.0,) * 5
    corpus.save(found, tmp_path / "corpus.json")
    assert corpus.load(tmp_path / "corpus.json") == found


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00bad"])
def test_a_file_without_sentences_is_refused(tmp_path, content):
    file = tmp_path / "sentences.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"sentences\.txt"):
        corpus.from_text(file, lambda texts: [[1] for _ in texts])


def test_figures_of_a_pass():
    cell = Cell("a", "a", "a", batching="padded", batch=2, sequence=0)
    result = CellResult(cell, "k", "ok", samples=(2.0, 1.0),
                        corpus=Corpus(3, 30, 40, (2, 1), (20, 10)))
    found = corpus.throughput(result, [0.5, 3.0, 1.0])
    assert found.padding == 0.25
    assert found.per_sentence == 1.0
    assert found.sentences_per_second == 1.0
    assert found.tokens_per_second == 10.0
    assert found.sentences_per_second_with_text == 0.75
    assert list(corpus.sentence_latencies(result)) == [2.0, 2.0, 1.0]
    with pytest.raises(UsageError, match="not a pass"):
        corpus.throughput(CellResult(cell, "k", "ok", samples=(1.0,)))
