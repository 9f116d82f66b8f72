"""Whether an optimised Bark still says the same, decision by decision.

Free-running comparisons stop at the first token that rounding tips over. So every recording after
the first is *forced* along the first one's path: the sub-models are called with the tokens that the
plain model chose, and answer with what they would have chosen. Where no answer differs, the free
run is the same run, and its audio the same audio.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from .speaker import Speaker

LANGUAGE = ("semantic", "coarse_acoustics")
FINE = "fine_acoustics"
_SET = ("forward", "generate", "codec_decode")
SUSPECT = 10.0
"""Times the rounding of the plain model in the same precision that may excuse another token."""

QUALITY = 20.0
"""dB of signal to noise that half precision must keep (Gate C of the parity rule)."""


@dataclass(slots=True)
class Recording:
    """Everything that was computed on the way to the audio.

    Attributes:
        inputs, logits: of each call, by sub-model; language models' logits of the last position.
        chosen: the token that followed each call of a language model, [calls, batch].
        codes: what the codec was given.
        audio: [batch, samples].
    """

    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    logits: dict[str, list[np.ndarray]] = field(default_factory=dict)
    chosen: dict[str, np.ndarray] = field(default_factory=dict)
    codes: torch.Tensor | None = None
    audio: np.ndarray | None = None

    def row(self, index: int) -> Recording:
        """The same of one prompt of the batch."""
        at = slice(index, index + 1)
        assert self.codes is not None
        assert self.audio is not None
        return Recording(
            {name: [value[at] for value in values] for name, values in self.inputs.items()},
            {name: [value[at] for value in values] for name, values in self.logits.items()},
            {name: value[:, at] for name, value in self.chosen.items()},
            self.codes[at], self.audio[at])


@dataclass(frozen=True, slots=True)
class Agreement:
    """A combination against the plain model on the plain model's path.

    Attributes:
        decisions: tokens that were chosen on the way.
        flips: of these, how many came out as another token.
        unexplained: flips where the plain model's margin exceeds twice the logits' difference; a
            difference beyond :data:`SUSPECT` times rounding explains no more than that.
        rho: RMSE of the logits over that of the plain model in the same precision, both against
            the plain model in float64; the largest of any sub-model and prompt, over its steps.
        quality: signal to noise of the logits against float64, in dB.
        audio: largest difference of the codec's output on the same codes, and of the whole
            model's where ``flips`` is 0.
        diverse: whether the plain model said something else for each prompt; where it did not,
            equal audio proves nothing.
    """

    decisions: int
    flips: int
    unexplained: int
    rho: float
    quality: float
    audio: float
    diverse: bool

    def verdict(self, precision: str) -> Literal["pass", "suspect", "fail"]:
        """``fail`` unless every condition holds, so that NaN fails; ``suspect`` without diversity.

        float32 must choose the same tokens but for ties; half precision may tip others, and is
        held to :data:`QUALITY` instead. The allowance for rounding is the parity rule's.
        """
        full = precision == "float32"
        held = (self.decisions > 0 and self.unexplained == 0
                and self.rho <= (2.0 if full else 3.0)
                and (self.audio <= 1e-4 if full else self.quality >= QUALITY))
        return "fail" if not held else "pass" if self.diverse else "suspect"


def record(
    speaker: Speaker, numbers: Sequence[int], *, along: Recording | None = None
) -> Recording:
    """Speak some prompts greedily and keep what each sub-model answered.

    Args:
        along: force the path of this recording.
    """
    made, model = Recording(), speaker.model
    undo = [_watch(model, name, made, along) for name in (*LANGUAGE, FINE)]
    undo.append(_watch_codec(model, made, along))
    try:
        made.audio = _host(speaker.speak(numbers))
    finally:
        for restore in undo:
            restore()
    return made


def _watch(
    model: Any, name: str, made: Recording, along: Recording | None
) -> Callable[[], None]:
    part = getattr(model, name)
    restore, forward, generate = _own(part), part.forward, part.generate
    inputs, logits = made.inputs.setdefault(name, []), made.logits.setdefault(name, [])

    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("codebook_idx", "input_ids"), args, strict=False)) if args else {}
        named.update(kwargs)
        key = "inputs_embeds" if named.get("inputs_embeds") is not None else "input_ids"
        if along is not None and key == "input_ids":
            named[key] = along.inputs[name][len(inputs)].to(named[key].device)
        inputs.append(named[key].detach().clone())
        result = forward(**named)
        logits.append(_host(result.logits if name == FINE else result.logits[:, -1]))
        return result

    @functools.wraps(generate)
    def generated(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        made.chosen[name] = np.asarray(result.cpu()).T.copy()
        return result

    part.forward = recorded
    if name in LANGUAGE:
        part.generate = generated
    return restore


def _own(module: Any) -> Callable[[], None]:
    """What undoes the attributes set from here on: a hook or a session may have set some before."""
    before = {name: module.__dict__[name] for name in _SET if name in module.__dict__}

    def restore() -> None:
        for name in _SET:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)

    return restore


def _watch_codec(model: Any, made: Recording, along: Recording | None) -> Callable[[], None]:
    restore, decode = _own(model), model.codec_decode

    @functools.wraps(decode)
    def decoded(codes: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if along is not None and along.codes is not None:
            codes = along.codes.to(codes.device)
        made.codes = codes.clone()
        return decode(codes, *args, **kwargs)

    model.codec_decode = decoded
    return restore


def compare(
    candidate: Recording, plain: Recording, floor: Recording, truth: Recording, *, codebook: int
) -> Agreement:
    """Weigh a recording against others of the same path.

    Args:
        plain: the plain model in float32.
        floor: the plain model in the candidate's precision.
        truth: the plain model in float64.
        codebook: codes of the codec, which the fine model's logits go beyond.
    """
    decisions = flips = unexplained = 0
    for own, other, explained, reference in _choices(
            candidate, plain, floor, truth, codebook):
        decisions += own.size
        rows = np.nonzero(own != other)[0]
        flips += len(rows)
        for row in rows:
            margin = reference[row, other[row]] - reference[row, own[row]]
            unexplained += not margin <= 2 * explained[row]
    errors, noise, signal = _errors(candidate, truth)
    floors, _, _ = _errors(floor, truth)
    least = np.maximum(floors, float(np.finfo(np.float32).eps) ** 2)  # one that is nearly exact
    assert candidate.audio is not None
    assert plain.audio is not None
    same = candidate.audio.shape == plain.audio.shape
    audio = float(np.abs(candidate.audio - plain.audio).max()) if same else float("inf")
    return Agreement(
        decisions, flips, unexplained, float(np.sqrt((errors / least).max())),
        float(10 * np.log10(signal / noise)) if noise else float("inf"), audio,
        len({row.tobytes() for row in plain.audio}) == len(plain.audio))


def _choices(
    candidate: Recording, plain: Recording, floor: Recording, truth: Recording, codebook: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens of both, what rounding explains, and plain logits, for rows of decisions."""
    for name in (*LANGUAGE, FINE):
        calls = zip(*(side.logits[name] for side in (candidate, plain, floor, truth)), strict=True)
        for index, logits in enumerate(calls):
            own, reference, least, true = (
                side.reshape(-1, side.shape[-1])[:, : codebook if name == FINE else None]
                for side in logits)
            difference = np.abs(own - reference).max(axis=-1)
            rounding = (np.abs(least - true).max(axis=-1)
                        + np.finfo(np.float32).eps * np.abs(true).max(axis=-1))
            chosen = ((own.argmax(-1), reference.argmax(-1)) if name == FINE else
                      (candidate.chosen[name][index], plain.chosen[name][index]))
            yield *chosen, np.minimum(difference, SUSPECT * rounding), reference


def _errors(one: Recording, truth: Recording) -> tuple[np.ndarray, float, float]:
    """Mean squares of the logits' errors, each call relative to its own size.

    Returns:
        Of each sub-model and prompt, [3, batch]; the sum over all calls; and their number, which is
        the sum of the true logits' squares in the same units.
    """
    rows = []
    for name in (*LANGUAGE, FINE):
        calls = [_by_prompt((own - true) ** 2) / float(np.mean(true**2))
                 for own, true in zip(one.logits[name], truth.logits[name], strict=True)]
        rows.append(np.stack(calls))
    every = np.concatenate(rows)
    return np.stack([row.mean(axis=0) for row in rows]), float(every.mean(axis=1).sum()), len(every)


def _by_prompt(squares: np.ndarray) -> np.ndarray:
    found: np.ndarray = squares.reshape(len(squares), -1).mean(axis=1)
    return found


def _host(value: torch.Tensor) -> np.ndarray:
    import torch

    return np.asarray(value.detach().to("cpu", torch.float64))
