"""Gate C: what a change of precision does to the answers, against a budget somebody declared.

Rounding of a cast or quantised artifact is real, so the question is not whether outputs differ but
what the difference does: to the signal, to the output distribution, to the chosen class, and to
the ranking of neighbours by embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite, log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..spec import ModelSpec, TensorSpec

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

ROW_ELEMENTS = 1 << 22
"""Elements of one output looked at row by row in one case; more rows are sampled evenly."""

EMBEDDINGS = 512
"""Sentences whose similarities are ranked: 130816 pairs."""


Kind = Literal["logits", "embedding", "values"]


@dataclass(frozen=True, slots=True)
class EffectBudget:
    """What the user accepts; None switches a limit off.

    Attributes:
        sqnr_db: least signal-to-quantisation-noise ratio, in dB.
        agreement, agreement_low: least share of rows whose top class does not change, and least
            lower end of its 95 % Wilson interval (which takes 125 rows without a flip to reach
            0.97).
        kl_p99: largest 99th percentile of the KL divergence, in nats.
        cosine: least mean cosine similarity of embeddings.
        rank_correlation: least Spearman correlation of pairwise embedding similarities.
        set_by: who decided.
    """

    sqnr_db: float | None = 20.0
    agreement: float | None = 0.99
    agreement_low: float | None = 0.97
    kl_p99: float | None = None
    cosine: float | None = None
    rank_correlation: float | None = None
    set_by: Literal["flag", "file", "export", "default"] = "default"


def read_budget(text: str) -> EffectBudget:
    """A budget as a user writes it: ``name=value`` pairs, or the path of a file of such lines.

    Raises:
        UsageError: an unknown name, a value that is no number (``none`` switches a limit off), or
            a file that cannot be read as text.
    """
    path = Path(text)
    from_file = "=" not in text and path.is_file()
    try:
        source = path.read_text(encoding="utf-8").replace("\n", ",") if from_file else text
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}",
                         allowed="NAME=NUMBER or NAME=none, one a line") from error
    known = [f.name for f in fields(EffectBudget) if f.name != "set_by"]
    found: dict[str, float | None] = {}
    for pair in filter(None, (part.strip() for part in source.split(","))):
        name, _, value = (part.strip() for part in pair.partition("="))
        try:
            found[name] = None if value.lower() == "none" else float(value)
        except ValueError:
            name = ""
        if name not in known:
            raise UsageError(f"{pair!r} is no limit of a budget",
                             allowed="NAME=NUMBER or NAME=none, NAME one of " + ", ".join(known))
    return EffectBudget(**found, set_by="file" if from_file else "flag")


@dataclass(frozen=True, slots=True)
class Effect:
    """Measured on one output over all cases; None where the number does not apply.

    Attributes:
        kind: ``logits`` are scores of classes, ``embedding`` vectors, ``values`` neither: one score
            for each member of the batch, or a number. Of those only the noise is measured.
        rows: distributions, vectors or values looked at.
        sqnr_db: 10 log10(sum t^2 / sum (c - t)^2); None where the two are equal.
        kl_mean, kl_p99, kl_max: KL(softmax(t) || softmax(c)) per row, in nats.
        decided: rows where the truth's margin between its first and second class exceeds twice
            that row's root mean square error; closer calls are ties that rounding decides. They
            excuse nothing: a row that is no flip because its error is large is no agreement
            either, so that noise leaves nothing to agree on.
        flips: decided rows with another top class.
        agreement, agreement_low: 1 - flips / decided, and the lower end of its 95 % Wilson
            interval (Wilson, JASA 22, 1927).
        cosine_mean, cosine_min: of each vector with its truth.
        rank_correlation: Spearman's, over the similarities of all pairs of sentences.
        broken: each limit of the budget that is not met, with the number found.
    """

    output: str
    kind: Kind
    rows: int
    sqnr_db: float | None
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    agreement: float | None = None
    agreement_low: float | None = None
    flips: int | None = None
    decided: int | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    rank_correlation: float | None = None
    broken: tuple[str, ...] = ()


class EffectMeter:
    """Accumulates the effects on every floating-point output of a model.

    An output named ``logits`` or ``…_logits`` holds scores along its last axis; every other one
    holds vectors along its last axis, and one vector per member of the batch is kept for ranking
    (the mean over kept positions), where that axis is of one size. An axis of size 1, or no axis
    but the batch, holds values.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._tallies = {t.name: _Tally(t) for t in spec.outputs}

    def add(
        self,
        candidate: Mapping[str, np.ndarray],
        truth: Mapping[str, np.ndarray],
        keep: Mapping[str, np.ndarray | None],
    ) -> None:
        """Add one case; outputs that are missing or of another shape are Gate 0's business."""
        for name, tally in self._tallies.items():
            if name in candidate and name in truth and candidate[name].shape == truth[name].shape:
                tally.add(candidate[name], truth[name], keep.get(name))

    def effects(self, budget: EffectBudget) -> tuple[Effect, ...]:
        """The effects, with the limits of the budget that each one breaks."""
        return tuple(tally.effect(budget) for tally in self._tallies.values() if tally.rows)


def is_scores(tensor: TensorSpec) -> bool:
    """Whether an output's last axis holds the scores of classes, by its name."""
    return tensor.name.split("_")[-1] == "logits"


def measurable(spec: ModelSpec) -> bool:
    """Whether an output has a floating-point dtype, which is what effects are measured on."""
    return any(not t.dtype.startswith(("int", "uint", "bool")) for t in spec.outputs)


def _kind(tensor: TensorSpec) -> Kind:
    if len(tensor.shape) < 2 or tensor.shape[-1] == 1:
        return "values"
    return "logits" if is_scores(tensor) else "embedding"


class _Tally:
    def __init__(self, tensor: TensorSpec) -> None:
        self.name = tensor.name
        self.kind = _kind(tensor)
        self.rows = self.flips = self.decided = 0
        # A waveform's length is no width: members of two batches cannot be held beside each other.
        self._ranked = (bool(tensor.shape) and tensor.shape[0] == "batch"
                        and isinstance(tensor.shape[-1], int))
        self._signal = self._noise = 0.0
        self._divergences: list[np.ndarray] = []
        self._cosines: list[np.ndarray] = []
        self._vectors: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, candidate: np.ndarray, truth: np.ndarray, keep: np.ndarray | None) -> None:
        if truth.dtype.kind in "iub":
            return
        mask = np.ones((1,) * truth.ndim, bool) if keep is None else keep
        mask = np.broadcast_to(mask, truth.shape)
        if self.kind == "values":
            candidate, truth, mask = (side.reshape(-1, 1) for side in (candidate, truth, mask))
        elif truth.shape[-1] < 2:
            return
        chosen = np.flatnonzero(mask.any(axis=-1).reshape(-1))
        step = max(1, -(-chosen.size * truth.shape[-1] // ROW_ELEMENTS))
        chosen = chosen[::step]
        if not chosen.size:
            return
        width = truth.shape[-1]
        c = candidate.reshape(-1, width)[chosen].astype(np.float64)
        t = truth.reshape(-1, width)[chosen].astype(np.float64)
        kept = mask.reshape(-1, width)[chosen]
        difference = np.where(kept, c - t, 0.0)
        self.rows += len(chosen)
        self._noise += float(np.sum(difference * difference))
        self._signal += float(np.sum(np.where(kept, t * t, 0.0)))
        if self.kind == "logits":
            self._add_logits(np.where(kept, c, -np.inf), np.where(kept, t, -np.inf), difference)
        elif self.kind == "embedding":
            self._cosines.append(_cosine(c, t))
            self._add_vectors(candidate, truth, mask)

    def _add_logits(self, c: np.ndarray, t: np.ndarray, difference: np.ndarray) -> None:
        counted = np.isfinite(t).sum(axis=-1)
        error = np.sqrt(np.sum(difference**2, axis=-1) / np.maximum(counted, 1))
        top = np.partition(t, -2, axis=-1)
        clear = (counted > 1) & (top[:, -1] - top[:, -2] > 2 * error)
        # A NaN error is no tie: argmax of a row with NaN is a place where it stands.
        clear |= ~np.isfinite(error)
        self.decided += int(np.count_nonzero(clear))
        self.flips += int(np.count_nonzero(clear & (c.argmax(axis=-1) != t.argmax(axis=-1))))
        self._divergences.append(_divergence(t, c))

    def _add_vectors(self, candidate: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        if not self._ranked:
            return
        for row in range(len(truth)):
            if len(self._vectors) < EMBEDDINGS and mask[row].any():
                width = truth.shape[-1]
                kept = mask[row].reshape(-1, width).any(axis=-1)
                c, t = (side[row].reshape(-1, width)[kept].astype(np.float64).mean(axis=0)
                        for side in (candidate, truth))
                self._vectors.append((c, t))

    def effect(self, budget: EffectBudget) -> Effect:
        numbers: dict[str, float | None] = {"sqnr_db": self._sqnr()}
        if self.kind == "logits":
            divergence = np.concatenate(self._divergences)
            numbers |= {
                "kl_mean": _number(divergence.mean()),
                "kl_p99": _number(np.percentile(divergence, 99)),
                "kl_max": _number(divergence.max()),
                "agreement": 1 - self.flips / self.decided if self.decided else None,
                "agreement_low": wilson_low(self.decided - self.flips, self.decided),
            }
        elif self.kind == "embedding":
            cosine = np.concatenate(self._cosines)
            numbers |= {"cosine_mean": _number(cosine.mean()), "cosine_min": _number(cosine.min()),
                        "rank_correlation": _ranking(self._vectors)}
        return Effect(self.name, self.kind, self.rows, **numbers,
                      flips=self.flips if self.kind == "logits" else None,
                      decided=self.decided if self.kind == "logits" else None,
                      broken=tuple(_broken(numbers, budget, exact=self._noise == 0)))

    def _sqnr(self) -> float | None:
        if self._signal > 0 and self._noise > 0 and isfinite(self._noise):
            return 10 * log10(self._signal / self._noise)
        return None


def wilson_low(successes: int, trials: int, z: float = Z95) -> float:
    """Lower end of the Wilson score interval for a proportion (Wilson, JASA 22, 1927)."""
    if successes == 0:
        return 0.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (centre - spread) / (1 + z * z / trials))


def _broken(
    numbers: Mapping[str, float | None], budget: EffectBudget, *, exact: bool
) -> list[str]:
    """Limits not met. Phrased as what must hold, so that a missing or NaN number breaks them."""
    broken = []
    checks = (("sqnr_db", budget.sqnr_db), ("agreement", budget.agreement),
              ("agreement_low", budget.agreement_low), ("cosine_mean", budget.cosine),
              ("rank_correlation", budget.rank_correlation))
    for name, least in checks:
        if least is None or name not in numbers or (name == "sqnr_db" and exact):
            continue
        found = numbers[name]
        if found is None or not found >= least:
            broken.append(f"{name} is {_text(found)}; at least {least:g} is allowed")
    if budget.kl_p99 is not None and "kl_p99" in numbers:
        found = numbers["kl_p99"]
        if found is None or not found <= budget.kl_p99:
            broken.append(f"kl_p99 is {_text(found)}; at most {budget.kl_p99:g} is allowed")
    return broken


def _divergence(t: np.ndarray, c: np.ndarray) -> np.ndarray:
    log_t, log_c = _log_softmax(t), _log_softmax(c)
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_t) * (log_t - log_c)
    # Masked positions have probability 0 on both sides, hence 0 * (inf - inf).
    total = np.where(np.isneginf(log_t), 0.0, terms).sum(axis=-1)
    return np.asarray(np.maximum(total, 0.0))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a row with +inf or NaN becomes NaN, and breaks a limit
        shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _cosine(c: np.ndarray, t: np.ndarray) -> np.ndarray:
    """1 for two vectors of zeros, 0 for one."""
    lengths = np.linalg.norm(c, axis=-1) * np.linalg.norm(t, axis=-1)
    equal = np.where((c == t).all(axis=-1), 1.0, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(lengths > 0, np.sum(c * t, axis=-1) / lengths,
                         np.where(np.isnan(lengths), np.nan, equal))
    return np.asarray(found)


def _ranking(vectors: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    if len(vectors) < 3:
        return None
    upper = np.triu_indices(len(vectors), 1)
    ranks = []
    for side in (0, 1):
        stack = np.stack([pair[side] for pair in vectors])
        if not np.isfinite(stack).all():
            return None
        lengths = np.linalg.norm(stack, axis=-1, keepdims=True)
        stack = stack / np.where(lengths > 0, lengths, 1.0)
        ranks.append(_ranks((stack @ stack.T)[upper]))
    if ranks[0].std() == 0 or ranks[1].std() == 0:
        return None
    return _number(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks; equal values share theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def _number(value: float | np.floating) -> float | None:
    return float(value) if isfinite(float(value)) else None


def _text(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"
