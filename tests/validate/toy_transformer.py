"""A three-layer transformer in NumPy behind a Session: every mutant and every correct variant of it
runs in milliseconds, so the judge can be tried on thousands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
from modelport.session import Placement, Session
from modelport.spec import Dim, ModelSpec, TensorSpec

HIDDEN, HEADS, INNER, LAYERS, VOCABULARY, LONGEST = 32, 4, 64, 3, 50, 40
KEY = 7919**3  # an id times this leaves int32


def toy_spec(dtype: str = "float32", longest: int = LONGEST) -> ModelSpec:
    tokens = ("batch", "sequence")
    return ModelSpec(
        (TensorSpec("input_ids", "int64", tokens, "tokens", VOCABULARY, 1),
         TensorSpec("attention_mask", "int64", tokens, "mask", 2),
         TensorSpec("token_type_ids", "int64", tokens, "segments", 2)),
        (TensorSpec("last_hidden_state", dtype, (*tokens, HIDDEN)),
         TensorSpec("pooler_output", dtype, ("batch", HIDDEN)),
         TensorSpec("logits", dtype, ("batch", 2)),
         TensorSpec("key", "int64", ("batch",))),
        {"batch": Dim(1, 2, 16), "sequence": Dim(1, 8, longest)})


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights, so that a float64 run has the same ones."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, scale: float, shift: float = 0.0) -> None:
        found[name] = (rng.standard_normal(shape) * scale + shift).astype(np.float32)

    add("words", VOCABULARY, HIDDEN, scale=1.0)
    add("places", LONGEST + 2, HIDDEN, scale=0.5)
    add("kinds", 2, HIDDEN, scale=0.5)
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            add(f"{layer}.{name}", HIDDEN, HIDDEN, scale=HIDDEN**-0.5)
            add(f"{layer}.{name}.bias", HIDDEN, scale=0.1)
        add(f"{layer}.up", HIDDEN, INNER, scale=HIDDEN**-0.5)
        add(f"{layer}.up.bias", INNER, scale=0.1)
        add(f"{layer}.down", INNER, HIDDEN, scale=INNER**-0.5)
        add(f"{layer}.down.bias", HIDDEN, scale=0.1)
        for name in ("norm1", "norm2"):
            add(f"{layer}.{name}", HIDDEN, scale=0.1, shift=1.0)
            add(f"{layer}.{name}.bias", HIDDEN, scale=0.1)
    add("pool", HIDDEN, HIDDEN, scale=HIDDEN**-0.5)
    add("pool.bias", HIDDEN, scale=0.1)
    add("head", HIDDEN, 2, scale=HIDDEN**-0.5)
    add("head.bias", 2, scale=0.1)
    return found


@dataclass(frozen=True)
class Flaws:
    """What is wrong with it; by default nothing. Flaws of one layer sit in the middle one."""

    gelu: str = "erf"
    eps: float = 1e-12
    scale: float = 1.0
    mask: str = "used"
    softmax_axis: int = -1
    offset: int = 0
    skip_layer: bool = False
    skip_residual: bool = False
    skip_norm: bool = False
    pool_at: int = 0
    clip_places: int = LONGEST
    head_order: tuple[int, ...] = (0, 1, 2, 3)
    kinds: bool = True
    dropout: float = 0.0
    key_dtype: str = "int64"
    causal: bool | None = None


@dataclass(frozen=True)
class Variant:
    """Correct ways to compute the same, in another order."""

    reverse: bool = False
    blocks: int = 1
    fuse: bool = False
    scale_query: bool = False
    base_two: bool = False
    reciprocal: bool = False


@dataclass
class Toy:
    params: dict[str, np.ndarray]
    dtype: str = "float32"
    causal: bool = False
    flaws: Flaws = field(default_factory=Flaws)
    variant: Variant = field(default_factory=Variant)

    def __post_init__(self) -> None:
        self.params = {k: v.astype(self.dtype) for k, v in self.params.items()}

    def matmul(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        if self.variant.reverse:
            return x[..., ::-1] @ np.ascontiguousarray(w[::-1])
        if self.variant.blocks > 1:
            step = x.shape[-1] // self.variant.blocks or 1
            parts = [x[..., i : i + step] @ w[i : i + step] for i in range(0, x.shape[-1], step)]
            return sum(parts[1:], parts[0])
        return x @ w

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.matmul(x, self.params[name]) + self.params[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
        scaled = centred * (1 / spread) if self.variant.reciprocal else centred / spread
        return scaled * self.params[name] + self.params[f"{name}.bias"]

    def gelu(self, x: np.ndarray, kind: str) -> np.ndarray:
        if kind == "relu":
            return np.maximum(x, 0)
        if kind == "tanh":
            return (x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))).astype(x.dtype)
        return (x / 2 * (1 + erf(x * x.dtype.type(0.5**0.5)))).astype(x.dtype)

    def softmax(self, x: np.ndarray, axis: int) -> np.ndarray:
        x = x - x.max(axis=axis, keepdims=True)
        top = np.exp2(x * x.dtype.type(1.4426950408889634)) if self.variant.base_two else np.exp(x)
        total = top.sum(axis=axis, keepdims=True)
        return top * (1 / total) if self.variant.reciprocal else top / total

    def attention(self, x: np.ndarray, mask: np.ndarray, layer: int, flaws: Flaws) -> np.ndarray:
        rows, length, _ = x.shape
        names = [f"{layer}.{n}" for n in "qkv"]
        if self.variant.fuse:
            joined = self.matmul(x, np.concatenate([self.params[n] for n in names], axis=1))
            joined = joined + np.concatenate([self.params[f"{n}.bias"] for n in names])
            parts = np.split(joined, 3, axis=-1)
        else:
            parts = [self.linear(x, n) for n in names]
        split = (rows, length, HEADS, HIDDEN // HEADS)
        q, k, v = (p.reshape(split).transpose(0, 2, 1, 3) for p in parts)
        factor = x.dtype.type(flaws.scale * (HIDDEN // HEADS) ** -0.5)
        k = np.ascontiguousarray(k.transpose(0, 1, 3, 2))
        scores = (q * factor) @ k if self.variant.scale_query else (q @ k) * factor
        low = np.finfo(x.dtype).min / 2
        scores = np.where(mask, scores, low).astype(x.dtype)
        mixed = self.softmax(scores, flaws.softmax_axis) @ v
        mixed = mixed[:, list(flaws.head_order)].transpose(0, 2, 1, 3).reshape(x.shape)
        return self.linear(np.ascontiguousarray(mixed), f"{layer}.o")

    def visible(self, mask: np.ndarray) -> np.ndarray:
        length = mask.shape[1]
        kind = self.flaws.mask
        if kind == "ignored":
            mask = np.ones_like(mask)
        elif kind == "lengths":  # right only for padding at the end
            mask = (np.arange(length) < mask.sum(axis=1, keepdims=True)).astype(mask.dtype)
        seen = mask[:, None, None, :].astype(bool)
        causal = self.causal if self.flaws.causal is None else self.flaws.causal
        return seen & np.tri(length, dtype=bool) if causal else seen

    def forward(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, mask, kinds = (feeds[n] for n in ("input_ids", "attention_mask", "token_type_ids"))
        places = np.minimum(np.arange(ids.shape[1]), self.flaws.clip_places) + self.flaws.offset
        x = self.params["words"][ids] + self.params["places"][places]
        if self.flaws.kinds:
            x = x + self.params["kinds"][kinds]
        seen = self.visible(mask)
        for layer in range(LAYERS):
            flaws = self.flaws if layer == LAYERS // 2 else Flaws()
            if flaws.skip_layer:
                continue
            mixed = self.attention(x, seen, layer, flaws)
            x = self.norm(mixed if flaws.skip_residual else x + mixed, f"{layer}.norm1", flaws.eps)
            inner = self.gelu(self.linear(x, f"{layer}.up"), flaws.gelu)
            x = x + self.linear(inner, f"{layer}.down")
            x = x if flaws.skip_norm else self.norm(x, f"{layer}.norm2", flaws.eps)
        if self.flaws.dropout:
            x = x * (np.random.default_rng().random(x.shape) > self.flaws.dropout)
        x = x.astype(self.dtype)
        pooled = np.tanh(self.linear(x[:, self.flaws.pool_at], "pool"))
        with np.errstate(over="ignore"):
            key = (ids.astype(self.flaws.key_dtype) * np.array(KEY).astype(self.flaws.key_dtype))
        key = key.sum(axis=1, dtype=self.flaws.key_dtype).astype(np.int64)
        pooled = pooled.astype(self.dtype)
        return {"last_hidden_state": x, "pooler_output": pooled,
                "logits": self.linear(pooled, "head"), "key": key}


def erf(x: np.ndarray) -> np.ndarray:
    """Abramowitz and Stegun 7.1.26: in any precision the same function."""
    kind = x.dtype.type
    t = 1 / (1 + kind(0.3275911) * np.abs(x))
    total = kind(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        total = total * t + kind(factor)
    return np.sign(x) * (1 - total * t * np.exp(-x * x))


class ToySession(Session):
    """Runs a toy; ``tamper`` changes outputs, ``before`` sees or changes the feeds."""

    runtime = "toy"

    def __init__(self, toy: Toy, tamper=None, before=None, spec: ModelSpec | None = None) -> None:
        outputs = toy.dtype if toy.dtype != "float64" else "float64"
        super().__init__(spec or toy_spec(outputs))
        self.toy = toy
        self.tamper = tamper
        self.before = before
        self.runs = 0

    def placement(self) -> Placement:
        return Placement("cpu")

    def _run(self, feeds):
        self.runs += 1
        feeds = self.before(dict(feeds)) if self.before else dict(feeds)
        with np.errstate(all="ignore"):
            outputs = self.toy.forward(feeds)
        return self.tamper(outputs) if self.tamper else outputs


def changed(name: str, edit) -> dict[str, np.ndarray]:
    """The weights with one of them replaced by ``edit(value)``."""
    params = weights()
    params[name] = edit(params[name].copy())
    return params


def flawed(causal: bool = False, **flaws) -> ToySession:
    return ToySession(Toy(weights(), causal=causal, flaws=Flaws(**flaws)))


def _put(place, value):
    def edit(array):
        array[place] = value
        return array

    return edit


def _only(count: int, axis: int):
    """A dimension frozen while tracing: what is longer is cut."""

    def tamper(outputs):
        return {k: v.take(range(min(count, v.shape[axis])), axis) if v.ndim > axis else v
                for k, v in outputs.items()}

    return tamper


def _refuse(name: str, size: int):
    def before(feeds):
        if feeds["input_ids"].shape != (2, 8) and name == "any":
            raise ValueError("Reshape: input has 96 elements, allowed 64")
        if feeds["input_ids"].shape[("batch", "sequence").index(name)] == size:
            raise RuntimeError(f"no kernel for {name} {size}")
        return feeds

    return before


def _hang(feeds):
    if feeds["input_ids"].shape == (1, LONGEST):
        time.sleep(5)
    return feeds


def _swap(first: str, second: str):
    def edit(values):
        return values | {first: values[second], second: values[first]}

    return edit


def _each(edit):
    return lambda outputs: {k: edit(v) if v.dtype.kind == "f" else v for k, v in outputs.items()}


def _one(name: str, edit):
    return lambda outputs: outputs | {name: edit(outputs[name])}


def _tampered(tamper) -> ToySession:
    return ToySession(Toy(weights()), tamper=tamper)


def _before(before) -> ToySession:
    return ToySession(Toy(weights()), before=before)


def _weights(name: str, edit) -> ToySession:
    return ToySession(Toy(changed(name, edit)))


def _rounded(dtype: str) -> ToySession:
    return ToySession(Toy({k: v.astype(dtype).astype("float32") for k, v in weights().items()}))


MUTANTS = {
    "swapped inputs": lambda: _before(_swap("attention_mask", "token_type_ids")),
    "swapped output names": lambda: _tampered(_swap("last_hidden_state", "pooler_output")),
    "output order": lambda: _tampered(lambda o: dict(reversed(o.items()))),
    "renamed output": lambda: _tampered(lambda o: {k.replace("key", "KEY"): v
                                                   for k, v in o.items()}),
    "missing output": lambda: _tampered(lambda o: {k: v for k, v in o.items() if k != "key"}),
    "extra output": lambda: _tampered(lambda o: o | {"more": o["key"]}),
    "empty output": lambda: _tampered(_each(lambda v: v[:0])),
    "no outputs": lambda: _tampered(lambda o: {}),
    "all zero": lambda: _tampered(_each(np.zeros_like)),
    "constant output": lambda: _tampered(_each(lambda v: np.full_like(v, 0.1))),
    "all NaN": lambda: _tampered(_each(lambda v: np.full_like(v, np.nan))),
    "float64 output": lambda: _tampered(_each(lambda v: v.astype(np.float64))),
    "float16 output": lambda: _tampered(_each(lambda v: v.astype(np.float16))),
    "squeezed batch of one": lambda: _tampered(_each(lambda v: v[0] if len(v) == 1 else v)),
    "reversed batch": lambda: _tampered(_each(lambda v: v[::-1])),
    "rows past the eighth are zero": lambda: _tampered(
        _each(lambda v: np.concatenate([v[:8], 0 * v[8:]]))),
    "frozen batch, refused": lambda: _before(_refuse("any", 0)),
    "frozen batch, cut": lambda: _tampered(_only(2, 0)),
    "frozen sequence, cut": lambda: _tampered(_only(8, 1)),
    "crash at one length": lambda: _before(_refuse("sequence", 17)),
    "hang at one shape": lambda: _before(_hang),
    "int64 to int32": lambda: flawed(key_dtype="int32"),
    "key off by one": lambda: _tampered(_one("key", lambda v: v + 1)),
    "ignored attention mask": lambda: flawed(mask="ignored"),
    "mask read as lengths": lambda: flawed(mask="lengths"),
    "missing causal mask": lambda: flawed(causal=True) if False else ToySession(
        Toy(weights(), causal=True, flaws=Flaws(causal=False))),
    "added causal mask": lambda: ToySession(Toy(weights(), causal=True)),
    "ignored token types": lambda: flawed(kinds=False),
    "tanh for erf": lambda: flawed(gelu="tanh"),
    "relu for gelu": lambda: flawed(gelu="relu"),
    "layer norm eps 1e-3": lambda: flawed(eps=1e-3),
    "layer norm eps 1e-5": lambda: flawed(eps=1e-5),
    "attention scale 1.01": lambda: flawed(scale=1.01),
    "attention scale 1.0001": lambda: flawed(scale=1.0001),
    "softmax axis": lambda: flawed(softmax_axis=-2),
    "head order": lambda: flawed(head_order=(1, 0, 2, 3)),
    "positions off by one": lambda: flawed(offset=1),
    "positions clipped": lambda: flawed(clip_places=20),
    "dropped layer": lambda: flawed(skip_layer=True),
    "dropped residual": lambda: flawed(skip_residual=True),
    "dropped norm": lambda: flawed(skip_norm=True),
    "pooled at the end": lambda: flawed(pool_at=-1),
    "dropout left on": lambda: flawed(dropout=0.05),
    "dropped bias": lambda: _weights("1.v.bias", np.zeros_like),
    "transposed weight": lambda: _weights("1.o", lambda w: w.T),
    "shared layer": lambda: _weights("2.up", lambda w: weights()["1.up"]),
    "one weight NaN": lambda: _weights("1.up", _put((3, 5), np.nan)),
    "one weight infinite": lambda: _weights("1.up", _put((3, 5), np.inf)),
    "one weight zero": lambda: _weights("1.up", _put((3, 5), 0.0)),
    "one embedding row": lambda: _weights("words", _put(VOCABULARY - 1, 0.0)),
    "weights through float16": lambda: _rounded("float16"),
}

VARIANTS = {
    "plain": Variant(),
    "reversed sums": Variant(reverse=True),
    "blocked sums": Variant(blocks=4),
    "fused qkv": Variant(fuse=True),
    "scaled query": Variant(scale_query=True),
    "base two": Variant(base_two=True),
    "all of them": Variant(reverse=True, fuse=True, scale_query=True, base_two=True,
                           reciprocal=True),
    "blocked and reciprocal": Variant(blocks=8, reciprocal=True),
}


def varied(variant: Variant, seed: int = 0, dtype: str = "float32",
           causal: bool = False) -> ToySession:
    return ToySession(replace(Toy(weights(seed), dtype, causal), variant=variant))
