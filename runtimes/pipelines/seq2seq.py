"""Encoder-decoder models: the encoder and its keys and values run once, the decoder every step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ...checkpoints import feature_extractor, tokenizer
from ...checkpoints.parts.cache import TOTAL
from ...checkpoints.parts.seq2seq import CROSS, MASK, POSITIONS
from ...errors import UsageError
from ...recordings import resampled
from ...spec import Dim
from . import Pipeline, cache, hollow, required

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch

    from ...artifacts import Artifact
    from ...session import Session

INPUT_FEATURES = "input_features"
COMPONENTS = ("encoder", "cross", "decoder")
IGNORED = ("use_cache", "return_dict", "cache_position", "token_type_ids")
"""Arguments of a forward that change nothing here."""


def build(artifact: Artifact, sessions: Mapping[str, Session], device: str = "cpu") -> Pipeline:
    """The pipeline of a text2text-generation or automatic-speech-recognition artifact."""
    required(sessions, COMPONENTS, artifact)
    model = hollow(artifact, device)
    encoder = Encoder(sessions["encoder"], device)
    _replace(model.get_encoder(), encoder)
    _replace(model, Step(sessions["cross"], sessions["decoder"], encoder, device))
    return Seq2SeqPipeline(artifact, model, sessions, device)


def _replace(module: Any, call: Callable[..., Any]) -> None:
    """Call something in place of a module's forward; ``generate`` still reads its signature."""

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    module.forward = forward


class Seq2SeqPipeline(Pipeline):
    """Turns a text, or the features of a recording, into another text."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``: greedy, sampling, beams, streaming, batches of uneven inputs.

        Raises:
            UsageError: an empty input, more tokens than the decoder's context holds, or a cache or
                an argument that the graphs do not take.
        """
        self._require_room(kwargs)
        return super().generate(*args, **kwargs)

    def prompt(self, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of :meth:`generate` for texts, padded as the tokenizer does by itself.

        Raises:
            UsageError: the artifact has no tokenizer, or its model hears instead of reading.
        """
        if "input_ids" not in self.sessions["encoder"].spec.input_names:
            raise UsageError("this model takes the features of a recording",
                             allowed="listen(samples, rate), or generate(input_features=…)")
        made = tokenizer(self.artifact.root)(
            list(texts), padding=len(texts) > 1, return_tensors="pt")
        return {name: made[name].to(self.device) for name in ("input_ids", MASK)}

    def listen(self, samples: np.ndarray, rate: int) -> dict[str, Any]:
        """Arguments of :meth:`generate` for a recording.

        One longer than the encoder's window is read piece by piece, by the library's own
        ``generate``, which finds the cuts by timestamps.

        Args:
            samples: float32 [count] within −1 to 1.
            rate: samples a second; other rates than the model's own are resampled.

        Raises:
            UsageError: the artifact has no feature extractor, its model reads text, or the
                recording is longer than the window and the model has no timestamps.
        """
        if INPUT_FEATURES not in self.sessions["encoder"].spec.input_names:
            raise UsageError("this model reads a text", allowed="--text, prompt(texts) in Python")
        extractor = feature_extractor(self.artifact.root)
        own = int(extractor.sampling_rate)
        samples = resampled(samples, rate, own)
        window = int(getattr(extractor, "n_samples", 0)) or len(samples)
        if len(samples) <= window:
            made = extractor(samples, sampling_rate=own, return_tensors="pt")
            return {INPUT_FEATURES: made[INPUT_FEATURES].to(self.device)}
        if getattr(self.model.generation_config, "no_timestamps_token_id", None) is None:
            raise UsageError(
                f"the recording lasts {len(samples) / own:.1f} s, and the model hears "
                f"{window / own:g} s and knows no timestamps to go on by",
                allowed=f"{window / own:g} s", hint="cut it into pieces")
        made = extractor(samples, sampling_rate=own, return_tensors="pt", truncation=False,
                         padding="longest", return_attention_mask=True)
        return {INPUT_FEATURES: made[INPUT_FEATURES].to(self.device),
                MASK: made[MASK].to(self.device), "return_timestamps": True}

    def _require_room(self, kwargs: Mapping[str, Any]) -> None:
        longest = self.sessions["decoder"].spec.dims[TOTAL].max
        given = kwargs.get("decoder_input_ids")
        prompt = 1 if given is None else int(given.shape[-1])
        config = kwargs.get("generation_config") or self.model.generation_config
        wanted = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        total = kwargs.get("max_length", getattr(config, "max_length", None))
        if wanted is None:
            wanted = (total or 1) - prompt
        if wanted + prompt - 1 > longest:
            raise UsageError(
                f"{wanted} new tokens after {prompt} are more than the decoder's context holds",
                allowed=f"{longest} tokens, all but the last new one", hint="max_new_tokens")


class Encoder:
    """What the encoder's forward does."""

    def __init__(self, session: Session, device: str) -> None:
        self._session = session
        self._device = device
        self._main = next(n for n in session.spec.input_names if n != MASK)

    def __call__(
        self, *args: Any, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> Any:
        """The last hidden state, as the library's own output class.

        Raises:
            UsageError: a row without content, a length that the encoder does not take, or an
                argument that would change the result.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        given = args[0] if args else others.pop(self._main, None)
        refuse(others)
        if given is None:
            raise UsageError("the encoder was given nothing", allowed=self._main)
        self._require_fitting(given)
        feeds = {self._main: given}
        if MASK in self._session.spec.input_names:
            if attention_mask is None:
                attention_mask = torch.ones_like(given)
            _require_content(attention_mask, given)
            feeds[MASK] = attention_mask.to(torch.int64)
        outputs = self._session.run_tensors(feeds)
        return BaseModelOutput(last_hidden_state=outputs["last_hidden_state"])

    def _require_fitting(self, given: torch.Tensor) -> None:
        spec = self._session.spec
        wanted = next(t.shape for t in spec.inputs if t.name == self._main)
        for dim, size in zip(wanted[1:], given.shape[1:], strict=True):
            limit = spec.dims[dim] if isinstance(dim, str) else Dim(dim, dim, dim)
            if not limit.min <= size <= limit.max:
                raise UsageError(
                    f"{self._main} has shape {list(given.shape)}",
                    allowed=f"{dim if isinstance(dim, str) else 'exactly'} {limit.min}"
                    + (f" to {limit.max}" if limit.max > limit.min else ""))


class Step:
    """What the model's forward does: the decoder, after the encoder where that has not run."""

    def __init__(
        self, cross: Session, decoder: Session, encoder: Encoder, device: str
    ) -> None:
        spec = decoder.spec
        self._cross, self._decoder, self._encoder = cross, decoder, encoder
        self._device = device
        self._names = frozenset(spec.input_names)
        self._states = tuple(n for n in spec.input_names if n.startswith(CROSS))
        self._past = tuple(t for t in spec.inputs if t.name.startswith("past_"))
        self._present = tuple(n for n in spec.output_names if n.startswith("present_"))
        self._longest = spec.dims[TOTAL].max

    def __call__(
        self,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **others: Any,
    ) -> Any:
        """Logits and the cache, as the library's own output class.

        Raises:
            UsageError: see :meth:`Seq2SeqPipeline.generate`.
        """
        import torch
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import Seq2SeqLMOutput

        if encoder_outputs is None:
            main = {n: others.pop(n) for n in ("input_ids", "input_features") if n in others}
            encoder_outputs = self._encoder(*args, attention_mask=attention_mask, **main)
        refuse({k: v for k, v in others.items() if k not in ("input_ids", "input_features")})
        if decoder_input_ids is None:
            raise UsageError("the decoder takes token ids", allowed="decoder_input_ids")
        encoded = encoder_outputs[0]
        both = past_key_values
        if both is None:
            both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        elif not isinstance(both, EncoderDecoderCache):
            raise UsageError(f"the cache is a {type(both).__name__}",
                             allowed="past_key_values from this model, or none")
        batch, count = decoder_input_ids.shape
        past = cache.past(both.self_attention_cache, self._past, batch, self._device)
        states = self._attended(both, encoded)
        before = past[0].shape[2]
        total = before + count
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones(
                batch, total, dtype=torch.int64, device=self._device)
        if decoder_position_ids is None:
            decoder_position_ids = torch.arange(
                before, total, device=self._device).expand(batch, -1)
        if attention_mask is None:
            attention_mask = torch.ones(
                encoded.shape[:2], dtype=torch.int64, device=self._device)
        self._check(decoder_attention_mask, batch, total)
        named = {"decoder_input_ids": decoder_input_ids, MASK: attention_mask.to(torch.int64),
                 "decoder_attention_mask": decoder_attention_mask.to(torch.int64),
                 POSITIONS: decoder_position_ids}
        outputs = self._decoder.run_tensors({
            **{name: value for name, value in named.items() if name in self._names},
            **dict(zip(self._states, states, strict=True)),
            **{t.name: value for t, value in zip(self._past, past, strict=True)},
        })  # fmt: skip
        if use_cache is not False:
            cache.keep(both.self_attention_cache, [outputs[name] for name in self._present])
        return Seq2SeqLMOutput(
            logits=outputs["logits"], past_key_values=both if use_cache is not False else None,
            encoder_last_hidden_state=encoded)

    def _attended(self, both: Any, encoded: torch.Tensor) -> Sequence[torch.Tensor]:
        """Keys and values of the encoder's output, computed when they are first needed."""
        kept = both.cross_attention_cache
        if not kept.layers or not both.is_updated.get(0):
            found = self._cross.run_tensors({"encoder_hidden_states": encoded})
            cache.keep(kept, [found[name] for name in self._cross.spec.output_names])
            both.is_updated = dict.fromkeys(range(len(kept.layers)), True)
        return [tensor for layer in kept.layers for tensor in (layer.keys, layer.values)]

    def _check(self, mask: torch.Tensor, batch: int, total: int) -> None:
        if total > self._longest:
            raise UsageError(f"{total} tokens are more than the decoder's context holds",
                             allowed=f"{self._longest} tokens", hint="max_new_tokens")
        if tuple(mask.shape) != (batch, total):
            raise UsageError(f"decoder_attention_mask has shape {list(mask.shape)}",
                             allowed=f"{[batch, total]}: the past and the new tokens")


def _require_content(mask: torch.Tensor, ids: torch.Tensor) -> None:
    if tuple(mask.shape) != tuple(ids.shape):
        raise UsageError(f"{MASK} has shape {list(mask.shape)}", allowed=f"{list(ids.shape)}")
    if empty := (mask.sum(-1) == 0).nonzero().flatten().tolist():
        raise UsageError(f"row {empty[0]} of the batch is empty",
                         allowed="one token or more in every row")


def refuse(others: Mapping[str, Any]) -> None:
    """Refuse arguments that would change the result and that the graphs do not take.

    Raises:
        UsageError: names them.
    """
    asked = [name for name, value in others.items()
             if name not in IGNORED and value is not None and value is not False]
    if asked:
        raise UsageError(f"the exported model does not take {', '.join(sorted(asked))}",
                         allowed="ids or features, their masks and the cache of earlier calls",
                         hint="leave it out, or run the original model")
