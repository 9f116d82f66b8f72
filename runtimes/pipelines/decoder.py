"""Decoders: one graph is called at every step, with the cache that its last call returned."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...checkpoints.parts import DECODER, KEEP, TOTAL
from ...checkpoints.parts.remembering import MEMORY
from ...errors import UsageError
from . import Pipeline, cache, hollow, required

if TYPE_CHECKING:
    import torch

    from ...artifacts import Artifact
    from ...session import Session

_IGNORED = ("use_cache", "return_dict", "position_ids", "token_type_ids", "cache_position")
"""Arguments of a forward that change nothing: the graph counts positions from the mask."""


def build(artifact: Artifact, sessions: Mapping[str, Session], device: str = "cpu") -> Pipeline:
    """The pipeline of a text-generation artifact."""
    required(sessions, (DECODER,), artifact)
    model = hollow(artifact, device)
    session = sessions[DECODER]
    step: Step | Reread | Remember
    if any(name.startswith(MEMORY) for name in session.spec.input_names):
        step = Remember(session, device)  # what it fills in is the library's to add
    elif TOTAL in session.spec.dims:
        step = Step(session, device)
    else:
        step = Reread(session)
        model.prepare_inputs_for_generation = _text
    forward = model.forward

    @functools.wraps(forward)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    model.forward = stepped
    return DecoderPipeline(artifact, model, sessions, device)


def _text(input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
    """What the graph reads; generate takes any argument of a function with ``kwargs``."""
    return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


class DecoderPipeline(Pipeline):
    """Continues token ids."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``: greedy, sampling, beams, streaming, batches of uneven prompts.

        Raises:
            UsageError: an empty prompt, one that with the tokens asked for is longer than the
                context, or a cache or an argument that the graph does not take.
        """
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is not None:
            self._require_room(ids, kwargs)
        return super().generate(*args, **kwargs)

    def _require_room(self, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        dims = self.sessions[DECODER].spec.dims
        longest = dims[TOTAL if TOTAL in dims else "sequence"].max
        prompt = int(ids.shape[-1])
        if prompt == 0:
            raise UsageError("the prompt is empty", allowed="one token or more")
        config = kwargs.get("generation_config") or self.model.generation_config
        wanted = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        total = kwargs.get("max_length", getattr(config, "max_length", None))
        if wanted is None and total is not None:
            wanted = total - prompt
        if prompt > longest or (wanted or 0) + prompt - 1 > longest:
            asked = f" and {wanted} new ones" if wanted and prompt <= longest else ""
            raise UsageError(
                f"{prompt} tokens{asked} are more than the context holds",
                allowed=f"{longest} tokens, prompt and all but the last new one together",
                hint="a shorter prompt, or max_new_tokens",
            )


class Step:
    """One call of the decoder: what a model's forward does.

    Args:
        session: on the decoder's graph.
        device: where it runs.
    """

    def __init__(self, session: Session, device: str) -> None:
        spec = session.spec
        self._session = session
        self._device = device
        self._past = tuple(t for t in spec.inputs if t.name.startswith("past_"))
        self._present = tuple(t.name for t in spec.outputs if t.name.startswith("present_"))
        self._longest = spec.dims[TOTAL].max

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = True,
        **others: Any,
    ) -> Any:
        """Logits and the cache, as the library's own output class.

        Raises:
            UsageError: see :meth:`DecoderPipeline.generate`.
        """
        import torch
        from transformers.modeling_outputs import CausalLMOutputWithPast

        _refuse(others)
        if input_ids is None:
            raise UsageError("the decoder takes token ids", allowed="input_ids")
        batch, count = input_ids.shape
        tensors = cache.past(past_key_values, self._past, batch, self._device)
        total = tensors[0].shape[2] + count
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.int64, device=self._device)
        self._check(attention_mask, batch, total, first=total == count)
        outputs = self._session.run_tensors({
            "input_ids": input_ids,
            "attention_mask": attention_mask.to(torch.int64),
            KEEP: torch.tensor(int(logits_to_keep), device=self._device),
            **{t.name: value for t, value in zip(self._past, tensors, strict=True)},
        })  # fmt: skip
        kept = None
        if use_cache is not False:
            kept = cache.keep(past_key_values, [outputs[name] for name in self._present])
        return CausalLMOutputWithPast(logits=outputs["logits"], past_key_values=kept)

    def _check(self, mask: torch.Tensor, batch: int, total: int, *, first: bool) -> None:
        if total > self._longest:
            raise UsageError(f"{total} tokens are more than the context holds",
                             allowed=f"{self._longest} tokens",
                             hint="a shorter prompt, or max_new_tokens")
        if tuple(mask.shape) != (batch, total):
            raise UsageError(f"attention_mask has shape {list(mask.shape)}",
                             allowed=f"{[batch, total]}: the past and the new tokens")
        if first and (empty := (mask.sum(-1) == 0).nonzero().flatten().tolist()):
            raise UsageError(f"prompt {empty[0]} of the batch is empty",
                             allowed="one token or more in every row")


class Reread:
    """One call of a decoder that keeps nothing: the whole text each time.

    Args:
        session: on the decoder's graph.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> Any:
        """Logits of the next token, as the library's own output class."""
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        given = {"input_ids": input_ids}
        if "attention_mask" in self._session.spec.input_names:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given["attention_mask"] = mask.to(torch.int64)
        return CausalLMOutput(logits=self._session.run_tensors(given)["logits"][:, None])


class Remember:
    """One call of a decoder that keeps hidden states; the last of its tokens is filled in.

    Args:
        session: on the decoder's graph.
        device: where it runs.
    """

    def __init__(self, session: Session, device: str) -> None:
        self._session = session
        self._device = device
        self._past = tuple(t for t in session.spec.inputs if t.name.startswith(MEMORY))

    def __call__(self, input_ids: torch.Tensor, mems: Any = None, **_: Any) -> Any:
        """Logits and states of shape [positions, batch, width], as the library has them."""
        import torch
        from transformers.models.xlnet.modeling_xlnet import XLNetLMHeadModelOutput

        batch = input_ids.shape[0]
        given = {"input_ids": input_ids}
        for index, tensor in enumerate(self._past):
            given[tensor.name] = torch.zeros(
                batch, 0, int(tensor.shape[2]), dtype=getattr(torch, tensor.dtype),
                device=self._device) if mems is None else mems[index].transpose(0, 1).contiguous()
        found = self._session.run_tensors(given)
        kept = tuple(found[t.name.replace("past", "present")].transpose(0, 1) for t in self._past)
        return XLNetLMHeadModelOutput(logits=found["logits"][:, None], mems=kept)


def _refuse(others: Mapping[str, Any]) -> None:
    """Arguments that would change the result and that the graph does not take."""
    asked = [name for name, value in others.items()
             if name not in _IGNORED and value is not None and value is not False
             and not (isinstance(value, Mapping) and not value)]  # no images, say
    if asked:
        raise UsageError(f"this decoder does not take {', '.join(sorted(asked))}",
                         allowed="token ids, their mask and the cache of earlier calls",
                         hint="leave it out, or run the original model")
