"""Parity of what a model generates, beyond its parts: every step's logits, and the tokens chosen.

Both sides run the library's own ``generate``: the artifact on its sessions, the source on its
modules with its own cache. A session around it makes either look like any other model: prompts in,
answers out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifacts, validate
from ..checkpoints import precise
from ..checkpoints.parts import DECODER, ENCODER, TOTAL
from ..session import Placement, Session
from ..spec import Dim, ModelSpec, TensorSpec
from . import speaking
from .opening import open_pipeline
from .references import HALVES, whole

if TYPE_CHECKING:
    from pathlib import Path

    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, Dtype
    from ..validate import ParityReport
    from ..validate.inputs import Padding
    from .request import Notify

STEPS = 16
"""Steps whose logits are compared with a given continuation."""

NEW = 20
"""Tokens that each side generates by itself."""

BEAMS = 3

SEEDS = (0, 1)
"""Of sampling. One draw in some ten thousand lies where rounding decides; two do not."""

EQUAL_BEAMS = 1e-4
"""Relative difference of the scores of two beams that are equally good."""

SHAPES: tuple[tuple[int, int, Padding], ...] = (
    (1, 1, "none"), (3, 5, "left"), (4, 5, "none"), (1, 17, "none"), (7, 17, "left"),
    (2, 64, "left"),
)  # fmt: skip
"""Batch, length of the longest prompt, and padding."""

PROMPTS = 8
"""Answers that are held against each other."""

SUSPECT = validate.Rule().suspect
"""Times the reference's error that rounding explains."""

CONTINUATION = "continuation"

FIRST = 2
"""Cases of tokens that no limit leaves out: one prompt alone is not told from another."""

STAGES = 2
"""What is judged beside the parts: the steps of a given continuation, and tokens."""


@dataclass(frozen=True, slots=True)
class _Speaker:
    """What generates: the source, or an artifact put together again.

    Attributes:
        config: its generation config.
        dtype: torch's, of the features of a recording; None takes them as they are drawn.
    """

    generate: Callable[..., Any]
    config: Any
    device: str
    place: Placement
    close: Callable[[], None]
    dtype: Any = None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What goes into ``generate``.

    Attributes:
        spec: its inputs and their dimensions; nothing comes out.
        vocabulary: number of logits.
        steps: tokens that the decoder's context leaves room for, at most :data:`NEW`.
    """

    spec: ModelSpec
    vocabulary: int
    steps: int

    @classmethod
    def of(cls, artifact: Artifact) -> _Prompt:
        """The encoder's inputs where there is one, else the decoder's tokens and their mask."""
        components = artifact.manifest.components
        decoder = components[DECODER].spec
        vocabulary = int(decoder.outputs[0].shape[-1])
        longest = decoder.dims[TOTAL if TOTAL in decoder.dims else "sequence"].max
        steps = min(NEW, max(1, longest // 2))
        if ENCODER in components:
            encoder = components[ENCODER].spec
            return cls(ModelSpec(encoder.inputs, (), encoder.dims), vocabulary, steps)
        ids = next(t for t in decoder.inputs if t.role == "tokens")
        masks = (replace(t, shape=ids.shape) for t in decoder.inputs if t.role == "mask")
        room = longest - steps
        inputs = (ids, *masks)
        dims = {"batch": decoder.dims["batch"], "sequence": Dim(1, min(17, room), room)}
        return cls(ModelSpec(inputs, (), dims), vocabulary, steps)

    def cases(self, spec: ModelSpec) -> tuple[validate.Case, ...]:
        """Prompts of the planned shapes, as far as they fit."""
        found: dict[str, validate.Case] = {}
        for seed, (batch, length, padding) in enumerate(SHAPES):
            wanted = {"batch": batch, "steps": STEPS}
            sizes = {name: min(max(wanted.get(name, length), dim.min), dim.max)
                     for name, dim in spec.free.items()}
            if validate.admits(spec, sizes, padding):
                case = validate.Case(tuple(sorted(sizes.items())), padding, seed)
                found.setdefault(case.shape + padding, case)
        return tuple(found.values())

    def forced(self) -> ModelSpec:
        """The contract of :class:`Forced`."""
        tokens = next((t for t in self.spec.inputs if t.role == "tokens"), None)
        said = TensorSpec(CONTINUATION, "int64", ("batch", "steps"), "tokens",
                          high=self.vocabulary, pad=tokens.pad if tokens else None)
        logits = TensorSpec("logits", "float32", ("batch", "steps", self.vocabulary))
        return ModelSpec((*self.spec.inputs, said), (logits,),
                         {**self.spec.dims, "steps": Dim(1, self.steps, self.steps)})


class _Generating(Session):
    """A model's ``generate`` as a session."""

    runtime = "generate"

    def __init__(self, spec: ModelSpec, speaker: _Speaker) -> None:
        super().__init__(spec)
        self._speaker = speaker
        config = speaker.config
        ends = config.eos_token_id
        self._ends = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
        self._pad = config.pad_token_id if config.pad_token_id is not None else (
            self._ends[0] if self._ends else 0)

    def placement(self) -> Placement:
        return self._speaker.place

    def close(self) -> None:
        super().close()
        self._speaker.close()

    def _call(self, feeds: Mapping[str, np.ndarray], **settings: Any) -> Any:
        import torch

        from ..checkpoints.loader import quiet

        prompt = {t.name: torch.from_numpy(feeds[t.name]).to(self._speaker.device)
                  for t in self.spec.inputs if t.name != CONTINUATION}
        if self._speaker.dtype is not None:
            prompt = {name: value.to(self._speaker.dtype) if value.is_floating_point() else value
                      for name, value in prompt.items()}
        with torch.inference_mode(), quiet():
            return self._speaker.generate(
                **prompt, pad_token_id=self._pad, return_dict_in_generate=True,
                output_logits=True, **settings)


class Forced(_Generating):
    """Says a given continuation, and tells what it thought of every token before."""

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        said = feeds[CONTINUATION]
        others = (token for token in range(len(self._ends) + 1) if token not in self._ends)
        said = np.where(np.isin(said, self._ends), next(others), said)  # nothing ends early
        found = self._call(feeds, do_sample=False, num_beams=1, max_new_tokens=said.shape[1],
                           logits_processor=[_Saying(said)])
        return {"logits": _stacked(found.logits)}


class Free(_Generating):
    """Generates by itself: greedily, by sampling with each seed, and by beam search."""

    def __init__(self, spec: ModelSpec, speaker: _Speaker, steps: int, exact: bool) -> None:
        """``exact``: sampling and beams as well, whose choices a change of precision moves."""
        super().__init__(spec, speaker)
        self._steps = steps
        self._exact = exact

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        greedy = self._call(feeds, do_sample=False, num_beams=1, max_new_tokens=self._steps)
        found = {"greedy": _new(greedy), "logits": _stacked(greedy.logits)}
        if not self._exact:
            return found
        for seed in SEEDS:
            torch.manual_seed(seed)
            # Without a temperature, Whisper chooses greedily whatever else is asked for.
            sampled = self._call(feeds, do_sample=True, temperature=1.0, num_beams=1,
                                 max_new_tokens=self._steps)
            found[f"sampled {seed}"] = _new(sampled)
        beams = self._call(feeds, do_sample=False, num_beams=BEAMS, max_new_tokens=self._steps,
                           output_scores=True)
        scores = beams.sequences_scores.numpy(force=True).astype(np.float64)
        return {**found, "beams": _new(beams), "scores": scores}


def _new(found: Any) -> np.ndarray:
    """The tokens that logits were computed for: what a decoder starts with comes before them."""
    tokens: np.ndarray = found.sequences.numpy(force=True)
    return tokens[:, -len(found.logits):]


class _Saying:
    """A logits processor that leaves no choice."""

    def __init__(self, said: np.ndarray) -> None:
        self._said = said
        self._start: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        if self._start is None:
            self._start = input_ids.shape[1]
        step = input_ids.shape[1] - self._start
        only = torch.full_like(scores, -float("inf"))
        wanted = torch.from_numpy(self._said[:, step:step + 1]).to(scores.device)
        return only.scatter_(1, wanted, 0.0)


def _stacked(logits: Sequence[Any]) -> np.ndarray:
    """[batch, steps, vocabulary], in float32 unless it is float64."""
    import torch

    joined = torch.stack(tuple(logits), 1)
    kind = joined.dtype if joined.dtype == torch.float64 else torch.float32
    found: np.ndarray = joined.to(kind).numpy(force=True)
    return found


def share(end: float | None, stages: int) -> float | None:
    """Seconds for the next of so many stages; ``end`` is a value of ``time.monotonic``."""
    return None if end is None else max(0.0, end - time.monotonic()) / stages


def judged(
    reports: Mapping[str, ParityReport],
    artifact: Artifact,
    checkpoint: Checkpoint,
    settings: validate.Settings,
    *,
    end: float | None,
    tight: bool,
    runtime: str | None,
    device: str,
    notify: Notify,
) -> ParityReport:
    """The reports on the parts of an artifact, joined, with what the parts generate together.

    Not at int8, where both references are made layer by layer: there the parts decide.

    Args:
        settings: how the parts were judged; those of reduced precision name its parent.
        end: value of ``time.monotonic`` after which no case is begun but the first of the steps
            and the first :data:`FIRST` of the tokens; None for no limit. What Bark says is not cut
            short.
        tight: the limit is below the default, so that what it leaves out narrows the proof.
    """
    precision = artifact.manifest.facts.get("precision")
    if precision not in (None, *HALVES):
        joined = validate.joined(reports)
        note = f"at {precision} the parts were compared, and not what they generate together"
        return replace(joined, notes=(*joined.notes, note))
    if speaking.speaks(artifact):
        return speaking.judged(reports, artifact, checkpoint, precision=precision,
                               runtime=runtime, device=device, notify=notify)
    prompt = _Prompt.of(artifact)
    forced = prompt.forced()
    candidate = partial(_candidate, artifact.root, runtime, device)
    reference = partial(_source, checkpoint, precision or "float32", None, device)
    truth = partial(_source, checkpoint, "float64", precision, device)
    notify("what is generated: every step of a given continuation")
    steps = validate.judge(
        partial(candidate, Forced, forced), partial(reference, Forced, forced),
        partial(truth, Forced, forced),
        validate.Plan(prompt.cases(forced), max_seconds=share(end, STAGES)), spec=forced,
        settings=settings,
    )  # fmt: skip
    notify("what is generated: tokens")
    free = (prompt.spec, prompt.steps, precision is None)
    with ExitStack() as opened:
        tokens = _Tokens(
            opened.enter_context(_run_as(settings, prompt.spec, partial(candidate, Free, *free))),
            opened.enter_context(reference(Free, *free)),
            lambda: opened.enter_context(truth(Forced, forced)),
        )  # fmt: skip
        for number, case in enumerate(prompt.cases(prompt.spec)):
            if number >= FIRST and share(end, 1) == 0:
                tokens.leave_out(case)
            else:
                tokens.compare(case)
    report = tokens.added_to(validate.joined({**reports, "steps": steps}))
    return report.cut_short(len(steps.left_out) + len(tokens.left)) if tight else report


def _candidate(
    root: Path, runtime: str | None, device: str, kind: Callable[..., Session], *given: Any
) -> Session:
    """The artifact put together again; importable, for a process of its own."""
    pipeline = open_pipeline(artifacts.read(root), runtime=runtime, device=device)
    place = next(iter(pipeline.sessions.values())).placement()
    speaker = _Speaker(pipeline.generate, pipeline.model.generation_config, device, place,
                       pipeline.close)
    return kind(given[0], speaker, *given[1:])


def _source(
    checkpoint: Checkpoint, dtype: Dtype, rounded_to: str | None, device: str,
    kind: Callable[..., Session], *given: Any,
) -> Session:
    """The unpatched source."""
    model: Any = whole(checkpoint, dtype, rounded_to).module.to(device)
    place = Placement(device, ("torch",))

    def generate(**given: Any) -> Any:
        with precise.kept(model.dtype):
            return model.generate(**given)

    speaker = _Speaker(generate, model.generation_config, device, place, lambda: None,
                       model.dtype)
    return kind(given[0], speaker, *given[1:])


def _run_as(
    settings: validate.Settings, spec: ModelSpec, opener: Callable[[], Session]
) -> Session:
    """The artifact, in a process of its own if so asked."""
    if settings.isolated:
        return validate.IsolatedSession(spec, opener, settings.case_seconds)
    return opener()


def _contents(spec: ModelSpec, feeds: Mapping[str, np.ndarray]) -> list[bytes]:
    """What each row of a batch says, its padding left out: two rows may say the same."""
    (main, *_), masks = ([t.name for t in spec.inputs if (t.role == "mask") is wanted]
                         for wanted in (False, True))
    rows = feeds[main]
    if not masks:
        return [row.tobytes() for row in rows]
    return [row[kept == 1].tobytes() for row, kept in zip(rows, feeds[masks[0]], strict=True)]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


class _Tokens:
    """Compares what two sides generate, and remembers."""

    def __init__(
        self, candidate: Session, reference: Session, truth: Callable[[], Session]
    ) -> None:
        self._candidate = candidate
        self._reference = reference
        self._truth = truth
        self._opened: Session | None = None
        self._cases: list[validate.CaseRecord] = []
        self._results: list[validate.Result] = []
        self._first: dict[bytes, np.ndarray] = {}
        self._notes: list[str] = []
        self.left: list[validate.LeftOut] = []
        self._seconds = 0.0

    def leave_out(self, case: validate.Case) -> None:
        """Note that there is no time for a case."""
        self.left.append(validate.LeftOut(f"part=generated {case.label}", "the time was over"))

    def compare(self, case: validate.Case) -> None:
        """Run one case on both sides and compare every way of choosing tokens."""
        started = time.perf_counter()
        feeds = validate.draw(self._reference.spec, case)
        label = f"part=generated {case.label}"
        sides = []
        for side, session in (("source", self._reference), ("artifact", self._candidate)):
            try:
                sides.append(session.run(feeds))
            except Exception as error:  # noqa: BLE001 - recorded as this case's outcome
                what = "; ".join(str(error).splitlines()) or type(error).__name__
                self._results.append(validate.Result(
                    label, "*", "generation", "fail", f"the {side}'s generate fails: {what}"))
                break
        if sides:
            answers = zip(_contents(self._reference.spec, feeds), sides[0]["logits"][:, 0],
                          strict=True)
            self._first = {**dict(answers), **self._first}
        if len(sides) == 2:
            self._results += self._compared(label, feeds, sides[1], sides[0])
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._cases.append(validate.CaseRecord(
            label, f"part=generated {case.shape}", case.padding, case.seed, case.origin, seconds))

    def added_to(self, report: ParityReport) -> ParityReport:
        """A report with these results; and whether the answers told the prompts apart."""
        results = tuple(self._results)
        if self._first:
            rows = np.stack(list(self._first.values())[:PROMPTS])
            results += (validate.diversity("*", "first logits", rows),)
        found = report.with_results("generation", tuple(self._cases), results,
                                    tuple(self._notes), self._seconds)
        return replace(found, left_out=(*found.left_out, *self.left))

    def _compared(
        self, label: str, feeds: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
    ) -> list[validate.Result]:
        def decide(row: int, step: int) -> tuple[float, float]:
            return self._margin(feeds, actual, expected, row, step)

        def tokens(output: str, judge: Any = None) -> validate.Result:
            return validate.compare_tokens(label, output, actual[output], expected[output], judge)

        results = [tokens("greedy", decide)]
        sampled = [tokens(name) for name in expected if name.startswith("sampled")]
        if sampled:
            # A draw may lie where rounding decides; not with every seed.
            differ = [r for r in sampled if r.verdict != "pass"]
            results += sampled if len(differ) == len(sampled) else [
                r for r in sampled if r.verdict == "pass"]
            if 0 < len(differ) < len(sampled):
                self._notes.append(f"{label}: {differ[0].output}: {differ[0].reason}")
        if "beams" in expected:
            results.append(self._beams(tokens("beams"), actual["scores"], expected["scores"]))
        return results

    def _beams(
        self, found: validate.Result, actual: np.ndarray, expected: np.ndarray
    ) -> validate.Result:
        """Other beams of the same score are as good."""
        alike = np.abs(actual - expected) <= EQUAL_BEAMS * np.abs(expected)
        if found.verdict == "pass" or not alike.all():
            return found
        self._notes.append(f"{found.case}: other beams of the same scores: {found.reason}")
        return replace(found, verdict="pass", reason="")

    def _margin(
        self, feeds: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray], row: int, step: int,
    ) -> tuple[float, float]:
        """By how much the truth prefers the reference's token, and the sides' errors there."""
        if min(actual["logits"].shape[1], expected["logits"].shape[1]) <= step:
            return float("inf"), 0.0
        self._opened = self._opened or self._truth()
        said = expected["greedy"][:, :step + 1]
        truth = self._opened.run({**feeds, CONTINUATION: said})["logits"][row, step]
        ours, theirs = actual["logits"][row, step], expected["logits"][row, step]
        noise = max(_rms(theirs - truth), float(np.finfo(np.float32).eps) * _rms(truth))
        # An error beyond rounding excuses nothing.
        error = max(noise, min(_rms(ours - truth), SUSPECT * noise))
        return float(truth[theirs.argmax()] - truth[ours.argmax()]), error
