"""Bark: two decoders, a model that fills in codebooks, and a codec, each a session."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ...bark import complete
from ...checkpoints import tokenizer
from ...checkpoints.parts.bark import (
    COARSE,
    CODEBOOK,
    CODEC,
    CODES,
    EMBEDDED,
    EMBEDDINGS,
    FINE,
    IDS,
    NAMES,
    SEMANTIC,
)
from ...checkpoints.parts.cache import TOTAL
from ...errors import UsageError
from . import Pipeline, cache, hollow, required

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from ...artifacts import Artifact
    from ...session import Session

IGNORED = ("return_dict", "position_ids", "cache_position", "logits_to_keep")
"""Arguments of a forward that change nothing: positions are counted from the past."""


def build(artifact: Artifact, sessions: Mapping[str, Session], device: str = "cpu") -> Pipeline:
    """The pipeline of a text-to-audio artifact."""
    required(sessions, NAMES, artifact)
    model = hollow(artifact, device)
    model.generation_config = complete(model.generation_config)
    for part in (model.semantic, model.coarse_acoustics, model.fine_acoustics, model.codec_model):
        _place(part, device)
    table = Embeddings(sessions[EMBEDDINGS])
    _replace(model.semantic.input_embeds_layer, "forward", table)
    _replace(model.semantic, "forward", Step(sessions[SEMANTIC], device, table))
    _replace(model.coarse_acoustics, "forward", Step(sessions[COARSE], device))
    _replace(model.fine_acoustics, "forward", Fine(sessions[FINE], model.fine_acoustics.config))
    _replace(model, "codec_decode", Codec(sessions[CODEC]))
    return BarkPipeline(artifact, model, sessions, device)


def _place(module: Any, device: str) -> None:
    """Let a sub-model, which has no weights, believe to be on a device."""
    import torch

    cls, place = type(module), torch.device(device)
    module.__class__ = type(cls.__name__, (cls,), {"device": property(lambda _: place)})


def _replace(module: Any, name: str, call: Callable[..., Any]) -> None:
    """Call something in place of a method; ``generate`` still reads its signature."""
    method = getattr(module, name)

    @functools.wraps(method)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    setattr(module, name, replaced)


class BarkPipeline(Pipeline):
    """Speaks texts."""

    def __init__(
        self, artifact: Artifact, model: Any, sessions: Mapping[str, Session], device: str
    ) -> None:
        super().__init__(artifact, model, sessions, device)
        self.sampling_rate = int(model.generation_config.sample_rate)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``: greedy, sampling, voices (``history_prompt``), uneven lengths.

        ``max_new_tokens`` is of the semantic model, which decides how long it speaks.

        Raises:
            UsageError: an empty prompt, one that the library would cut off, more tokens than a
                sub-model has positions for, or an argument that the graphs do not take.
        """
        if "max_new_tokens" in kwargs:  # the coarse model counts its own
            kwargs["semantic_max_new_tokens"] = kwargs.pop("max_new_tokens")
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            self._require_whole(ids, kwargs.get("attention_mask"))
        self._require_room(kwargs)
        return super().generate(*args, **kwargs)

    def prompt(self, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of :meth:`generate` for texts, padded to the window that Bark reads.

        Raises:
            UsageError: the artifact has no tokenizer, or a text is empty or longer than the window.
        """
        import torch

        window = self._window
        rows = tokenizer(self.artifact.root)(list(texts), add_special_tokens=False)["input_ids"]
        ids = torch.zeros((len(rows), window), dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            if not 0 < len(row) <= window:
                raise UsageError(f"text {index} has {len(row)} tokens",
                                 allowed=f"1 to {window}", hint="speak it in several parts")
            ids[index, : len(row)] = torch.tensor(row, device=self.device)
            mask[index, : len(row)] = 1
        return {IDS: ids, "attention_mask": mask}

    @property
    def _window(self) -> int:
        return int(self.model.generation_config.semantic_config["max_input_semantic_length"])

    def _require_whole(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        window, content = self._window, ids.shape[-1]
        if mask is not None:
            used = mask.bool()
            if empty := (~used.any(-1)).nonzero().flatten().tolist():
                raise UsageError(f"prompt {empty[0]} of the batch is empty",
                                 allowed="one token or more in every row")
            content = int(used.any(0).nonzero().max()) + 1
        if not ids.shape[0] or not content:
            raise UsageError("the prompt is empty", allowed="one token or more")
        if content > window:
            raise UsageError(f"a prompt has {content} tokens, of which Bark would read {window}",
                             allowed=f"at most {window}", hint="speak it in several parts")
        if ids.shape[-1] < window:
            raise UsageError(f"prompts are {ids.shape[-1]} tokens long",
                             allowed=f"padded to {window}, with an attention_mask")

    def _require_room(self, kwargs: Mapping[str, Any]) -> None:
        config = self.model.generation_config.semantic_config
        wanted = kwargs.get("semantic_max_new_tokens", config["max_new_tokens"])
        longest = self.sessions[SEMANTIC].spec.dims[TOTAL].max
        if self._window + wanted > longest:
            raise UsageError(
                f"{wanted} semantic tokens after a prompt of {self._window + 1} are more than the "
                "context holds", allowed=f"{longest - self._window}",
                hint="semantic_max_new_tokens")


class Embeddings:
    """What the semantic model's table does."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        return self._session.run_tensors({IDS: ids.to(torch.int64)})[EMBEDDED]


class Step:
    """One call of a causal sub-model.

    Args:
        session: on its graph.
        device: where it runs.
        table: what turns tokens into embeddings, where the graph takes embeddings.
    """

    def __init__(self, session: Session, device: str, table: Embeddings | None = None) -> None:
        spec = session.spec
        self._session = session
        self._device = device
        self._table = table
        self._past = tuple(t for t in spec.inputs if t.name.startswith("past_"))
        self._present = tuple(t.name for t in spec.outputs if t.name.startswith("present_"))
        self._longest = spec.dims[TOTAL].max

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = True,
        **others: Any,
    ) -> Any:
        """Logits and the cache, as the library's own output class.

        Raises:
            UsageError: more tokens than there are positions, padding, or an argument that the
                graph does not take.
        """
        import torch
        from transformers.modeling_outputs import CausalLMOutputWithPast

        _refuse(others)
        new = inputs_embeds if inputs_embeds is not None else input_ids
        if new is None or (inputs_embeds is not None and self._table is None):
            raise UsageError("this sub-model was not given tokens", allowed="input_ids")
        batch, count = new.shape[:2]
        tensors = cache.past(past_key_values, self._past, batch, self._device)
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UsageError("the attention_mask leaves positions out",
                             allowed="none: Bark's own padding is a token that it reads")
        total = int(tensors[0].shape[2]) + count
        if total > self._longest:
            raise UsageError(f"{total} tokens are more than the context holds",
                             allowed=f"{self._longest} tokens", hint="fewer new tokens")
        if new is input_ids:
            new = new.to(torch.int64) if self._table is None else self._table(new)
        feeds = {self._session.spec.input_names[0]: new}
        feeds |= {t.name: value for t, value in zip(self._past, tensors, strict=True)}
        outputs = self._session.run_tensors(feeds)
        kept = None
        if use_cache is not False:
            kept = cache.keep(past_key_values, [outputs[name] for name in self._present])
        return CausalLMOutputWithPast(logits=outputs["logits"], past_key_values=kept)


class Fine:
    """What the fine model's forward does."""

    def __init__(self, session: Session, config: Any) -> None:
        self._session = session
        self._first = int(config.n_codes_given)
        self._count = int(config.n_codes_total)

    def __call__(self, codebook_idx: int, input_ids: torch.Tensor, **others: Any) -> Any:
        """Logits of one codebook.

        Raises:
            UsageError: no codebook of that number, a window that is too long, or an argument that
                the graph does not take.
        """
        import torch
        from transformers.modeling_outputs import MaskedLMOutput

        _refuse(others)
        if not self._first <= codebook_idx < self._count:
            raise UsageError(f"codebook {codebook_idx} is not predicted",
                             allowed=f"{self._first} to {self._count - 1}")
        longest = self._session.spec.dims["sequence"].max
        if input_ids.shape[1] > longest:
            raise UsageError(f"a window of {input_ids.shape[1]} frames", allowed=f"{longest}")
        outputs = self._session.run_tensors({
            CODES: input_ids.to(torch.int64),
            CODEBOOK: torch.tensor(codebook_idx - self._first, device=input_ids.device),
        })  # fmt: skip
        return MaskedLMOutput(logits=outputs["logits"])


class Codec:
    """What ``codec_decode`` does."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, fine_output: torch.Tensor, output_lengths: Any = None) -> Any:
        """Samples of every row, or of each alone where lengths are given.

        Raises:
            UsageError: a row of no frames, or of more than the graph was made for.
        """
        if output_lengths is None:
            return self._decoded(fine_output)
        return [self._decoded(row[None, :, : int(length)]).squeeze()
                for row, length in zip(fine_output, output_lengths, strict=True)]

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        dims = self._session.spec.dims
        frames, most = dims["frames"], dims["batch"].max
        if not frames.min <= codes.shape[-1] <= frames.max:
            raise UsageError(f"{codes.shape[-1]} frames came out for one prompt",
                             allowed=f"{frames.min} to {frames.max}")
        made = [self._session.run_tensors({CODES: codes[start: start + most].to(torch.int64)})
                for start in range(0, len(codes), most)]
        return torch.cat([outputs["audio"] for outputs in made])


def _refuse(others: Mapping[str, Any]) -> None:
    """Arguments that would change the result and that the graphs do not take."""
    asked = [name for name, value in others.items()
             if name not in IGNORED and value is not None and value is not False]
    if asked:
        raise UsageError(f"Bark's graphs do not take {', '.join(sorted(asked))}",
                         allowed="prompts, a voice, and settings of generate",
                         hint="leave it out, or run the original model")
