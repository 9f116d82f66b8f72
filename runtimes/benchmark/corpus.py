"""Sentences of mixed lengths: where they come from, how they are batched, what a pass costs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UsageError
from .records import Batching, CellResult, digest, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SENTENCES = 1000
MEDIAN = 20
P95 = 120
LONGEST = 512
SHORTEST = 3
"""Start token, one token, end token."""
SIGMA = math.log(P95 / MEDIAN) / NormalDist().inv_cdf(0.95)
"""Of the logarithm of the length: about 1.089."""

CALL_TOKENS = 24
"""What one more call is taken to cost, in tokens, when token-budget batching weighs a cut: a few
milliseconds of a base-size encoder on two cores. At this price 2 % of the built-in corpus is
padding."""

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """Sentences as the measured process needs them.

    Attributes:
        name: what is shown: ``built-in`` or the file's name.
        lengths: tokens of each sentence, special tokens included, in file order.
        ids: token ids, or None where they are drawn at random.
        tokenise_seconds: one figure per repetition, for all sentences; empty without a text.
    """

    name: str
    lengths: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...] | None = None
    tokenise_seconds: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        return digest([self.lengths, self.ids])


def built_in(seed: int = 0, sentences: int = SENTENCES) -> CorpusSource:
    """Lengths: log-normal, median 20, 95th percentile 120, cut to 3 … 512; 1,000 of them.

    The lengths are the distribution's quantiles at (i + 1/2) / ``sentences``, so that the realised
    figures are the stated ones for every seed; the seed sets their order.
    """
    normal = NormalDist(math.log(MEDIAN), SIGMA)
    quantiles = [normal.inv_cdf((i + 0.5) / sentences) for i in range(sentences)]
    lengths = np.clip(np.rint(np.exp(quantiles)), SHORTEST, LONGEST).astype(int)
    order = np.random.default_rng(seed).permutation(sentences)
    name = f"built-in, {sentences:,} sentences"
    return CorpusSource(name, tuple(int(n) for n in lengths[order]))


def from_text(
    path: Path, encode: Encode, *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> CorpusSource:
    """One sentence a line, through the model's tokenizer; its time is measured ``repeats`` times.

    Args:
        encode: sentences to token ids, special tokens included, already cut to the model's length.

    Raises:
        UsageError: the file has no sentence, or is not UTF-8.
    """
    try:
        texts = [t for line in path.read_text("utf-8").splitlines() if (t := line.strip())]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as text: {e}") from e
    if not texts:
        raise UsageError(f"{path} has no sentence in it", allowed="one sentence a line")
    encode(texts[:8])  # the first call of a tokenizer loads its tables
    seconds, ids = [], encode(texts)
    for _ in range(repeats):
        start = clock()
        ids = encode(texts)
        seconds.append(clock() - start)
    if any(not row for row in ids):
        raise UsageError(f"the tokenizer made no token of a sentence of {path}")
    return CorpusSource(path.name, tuple(len(row) for row in ids),
                        tuple(tuple(int(i) for i in row) for row in ids), tuple(seconds))


def save(source: CorpusSource, path: Path) -> None:
    write_json(path, asdict(source))


def load(path: Path) -> CorpusSource:
    """A corpus that :func:`save` wrote."""
    data: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    ids = data["ids"]
    return CorpusSource(data["name"], tuple(data["lengths"]),
                        None if ids is None else tuple(map(tuple, ids)),
                        tuple(data["tokenise_seconds"]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are run together, by their place in the corpus, padded to ``length``."""

    rows: tuple[int, ...]
    length: int
    tokens: int

    @property
    def padded(self) -> int:
        return len(self.rows) * self.length


def batches(
    lengths: Sequence[int], batching: Batching, *, batch: int, budget: int = 0
) -> tuple[Batch, ...]:
    """Cut a corpus into batches, each padded to its own longest row.

    Args:
        batching: ``padded``: ``batch`` rows in file order. ``sorted``: by length, then ``batch``
            rows. ``token-budget``: by length, at most ``budget`` padded tokens and ``batch`` rows,
            cut where little is padded; a row longer than the budget goes alone.
    """
    order = list(range(len(lengths)))
    if batching == "padded":
        groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    else:
        order.sort(key=lambda i: (lengths[i], i))
        if batching == "sorted":
            groups = [order[i : i + batch] for i in range(0, len(order), batch)]
        elif batching == "token-budget":
            if budget < 1:
                raise UsageError("token-budget batching without a budget", allowed="budget >= 1")
            groups = _packed(order, lengths, batch, budget)
        else:
            raise UsageError(f"there is no batching {batching!r}",
                             allowed="padded, sorted, token-budget")
    return tuple(_batch(group, lengths) for group in groups)


def _packed(
    order: Sequence[int], lengths: Sequence[int], batch: int, budget: int
) -> list[list[int]]:
    """Cut rows in ascending length where padded tokens plus :data:`CALL_TOKENS` per batch is least.

    Dynamic programming over the cut points; filling each batch to the budget instead pads the
    many short sentences to the longest of their batch.
    """
    ordered = [lengths[row] for row in order]
    best = np.zeros(len(order) + 1)
    cut = np.zeros(len(order) + 1, np.int64)
    for end, longest in enumerate(ordered, 1):
        start = max(end - min(batch, max(budget // longest, 1)), 0)
        starts = np.arange(start, end)
        cost = best[start:end] + CALL_TOKENS + (end - starts) * longest
        cut[end] = starts[int(np.argmin(cost))]
        best[end] = cost.min()
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(list(order[cut[end] : end]))
        end = int(cut[end])
    return groups[::-1]


def _batch(rows: Sequence[int], lengths: Sequence[int]) -> Batch:
    return Batch(tuple(rows), max(lengths[i] for i in rows), sum(lengths[i] for i in rows))


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one pass over the corpus gives; times in seconds.

    Attributes:
        seconds: for all sentences, without tokenisation.
        tokenise: seconds of tokenisation, 0 without a text.
        padding: share of the computed token slots that hold no token.
    """

    sentences: int
    tokens: int
    seconds: float
    tokenise: float
    padding: float

    @property
    def per_sentence(self) -> float:
        return self.seconds / self.sentences

    @property
    def sentences_per_second(self) -> float:
        return self.sentences / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def sentences_per_second_with_text(self) -> float:
        return self.sentences / (self.seconds + self.tokenise)


def throughput(result: CellResult, tokenise_seconds: Sequence[float] = ()) -> Throughput:
    """The figures of one process's pass; tokenisation counts with its median."""
    if result.corpus is None or not result.samples:
        raise UsageError("this result is not a pass over a corpus")
    tokenise = float(np.median(tokenise_seconds)) if tokenise_seconds else 0.0
    return Throughput(result.corpus.sentences, result.corpus.tokens, math.fsum(result.samples),
                      tokenise, result.corpus.padding)


def sentence_latencies(result: CellResult) -> NDArray[np.float64]:
    """Seconds each sentence waited: the time of the batch it was in."""
    if result.corpus is None:
        raise UsageError("this result is not a pass over a corpus")
    return np.repeat(np.asarray(result.samples), result.corpus.batches)
