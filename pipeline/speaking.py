"""Parity of what Bark says, beyond its parts: every decision, the audio, voices and sampling.

The source speaks some prompts; the artifact is led along the same path and asked at every step
what it would have chosen (:mod:`..bark.parity`).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import bark, validate
from ..bark import Recording, Setting, Speaker
from ..checkpoints.tasks import TASKS
from .opening import open_pipeline
from .references import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, Dtype
    from ..validate import ParityReport
    from .request import Notify

TOKENS = 16
"""Of meaning, each a step whose logits are compared; the coarse model takes three steps for each,
and the fine one six for all."""

TEXT_WINDOW, FINE_WINDOW = 64, 128
"""Most that is generated and read at once: windows are settings, which no graph depends on."""

SEEDS = (0, 1)
"""Of sampling. A draw may lie where rounding decides; two do not."""

AUDIO = 1e-4


@dataclass(frozen=True, slots=True)
class _Case:
    """Prompts of a batch, and whose voice speaks them."""

    prompts: tuple[int, ...]
    voice: str | None = None

    @property
    def label(self) -> str:
        return f"part=generated batch={len(self.prompts)} voice={self.voice or 'none'}"


CASES = (_Case((0,)), _Case((1, 2, 3)), _Case((3, 4), "seeded"))


def speaks(artifact: Artifact) -> bool:
    """Whether an artifact is one that this module compares."""
    return TASKS[artifact.manifest.source.task].parts == "bark"


def judged(
    reports: Mapping[str, ParityReport], artifact: Artifact, checkpoint: Checkpoint, *,
    precision: Dtype | None, runtime: str | None, device: str, notify: Notify,
) -> ParityReport:
    """The reports on the parts, joined, with what they say together.

    Nothing is said where a part does not pass Gate 0: what fails its cases would fail these, too.
    """
    broken = [name for name, report in reports.items() if report.gates["hygiene"] != "pass"]
    if broken:
        joined = validate.joined(reports)
        note = f"nothing was said, since Gate 0 does not pass: {', '.join(broken)}"
        return replace(joined, notes=(*joined.notes, note))
    sides = _Sides(artifact, checkpoint, precision, runtime, device)
    cases, results, notes = [], [], []
    spoken: list[np.ndarray] = []
    began = time.perf_counter()
    for case in CASES:
        notify(f"what is said: {case.label.removeprefix('part=generated ')}")
        started = time.perf_counter()
        try:
            found, plain = sides.along(case)
        except Exception as error:  # noqa: BLE001 - recorded as this case's outcome
            results.append(_failed(case.label, error))
        else:
            results.append(_result(case, found, precision))
            notes.append(f"{case.label}: {found.flips} of {found.decisions} decisions differ, "
                         f"audio within {found.audio:.1e}")
            if case.voice is None:
                assert plain.audio is not None
                spoken += list(plain.audio)
        cases.append(validate.CaseRecord(
            case.label, case.label, "right", 0, "matrix", time.perf_counter() - started))
    if precision is None:
        try:
            results.append(sides.sampled(CASES[1]))
        except Exception as error:  # noqa: BLE001 - likewise
            results.append(_failed(f"{CASES[1].label} sampled", error))
    if spoken:
        results.append(validate.diversity("*", "audio", np.stack(spoken)))
    return validate.joined(reports).with_results(
        "generation", tuple(cases), tuple(results), tuple(notes), time.perf_counter() - began)


def _failed(label: str, error: Exception) -> validate.Result:
    what = "; ".join(str(error).splitlines()) or type(error).__name__
    return validate.Result(label, "*", "generation", "fail", f"speaking fails: {what}")


def _result(
    case: _Case, found: bark.Agreement, precision: Dtype | None
) -> validate.Result:
    word = found.verdict(precision or "float32")
    reason = "" if word == "pass" else (
        "prompts sound the same, which proves nothing" if word == "suspect" else
        f"{found.flips} of {found.decisions} decisions differ, {found.unexplained} by more than "
        f"rounding; ρ {found.rho:.3g}, {found.quality:.3g} dB, audio differs by {found.audio:.3g}")
    return validate.Result(case.label, "audio", "generation", word, reason,
                           samples=len(case.prompts), elements=found.decisions)


@dataclass(frozen=True, slots=True)
class _Sides:
    """Opens the artifact, the source in its precision, in float32, and the truth."""

    artifact: Artifact
    checkpoint: Checkpoint
    precision: Dtype | None
    runtime: str | None
    device: str

    def along(self, case: _Case) -> tuple[bark.Agreement, Recording]:
        """The artifact on the source's path, and what the source said."""
        setting = self._setting(voice=case.voice)
        with self._source("float32", setting) as speaker:
            plain = bark.record(speaker, case.prompts)
            codebook = int(speaker.model.generation_config.codebook_size)
        with self._source("float64", setting) as speaker:
            truth = bark.record(speaker, case.prompts, along=plain)
        floor = plain
        if self.precision is not None:
            with self._source(self.precision, setting) as speaker:
                floor = bark.record(speaker, case.prompts, along=plain)
        with self._candidate(setting) as opened:
            own = bark.record(opened, case.prompts, along=plain)
        return bark.compare(own, plain, floor, truth, codebook=codebook), plain

    def sampled(self, case: _Case) -> validate.Result:
        """Whether the same draws say the same, at least with one seed."""
        apart = []
        for seed in SEEDS:
            setting = self._setting(sample=True, seed=seed)
            with self._source("float32", setting) as speaker:
                expected = speaker.speak(case.prompts).cpu().numpy()
            with self._candidate(setting) as opened:
                actual = opened.speak(case.prompts).cpu().numpy()
            same = actual.shape == expected.shape
            apart.append(float(np.abs(actual - expected).max()) if same else float("inf"))
        held = min(apart) <= AUDIO
        reason = "" if held else f"audio differs by {min(apart):.3g} with every seed"
        return validate.Result(f"{case.label} sampled", "audio", "generation",
                               "pass" if held else "fail", reason, samples=len(SEEDS),
                               elements=expected.size)

    def _setting(self, **changes: Any) -> Setting:
        return replace(Setting(new_tokens=TOKENS), **changes)

    def _source(self, dtype: Dtype, setting: Setting) -> Speaker:
        model: Any = whole(self.checkpoint, dtype, None).module.to(self.device)
        model.generation_config = bark.complete(model.generation_config)
        return self._speaker(model, setting)

    def _candidate(self, setting: Setting) -> _Opened:
        pipeline = open_pipeline(self.artifact, runtime=self.runtime, device=self.device)
        return _Opened(self._speaker(pipeline.model, setting), pipeline.close)

    def _speaker(self, model: Any, setting: Setting) -> Speaker:
        semantic, _, fine = (getattr(model.generation_config, name)
                             for name in bark.SUB_CONFIGS)
        room = int(model.semantic.config.block_size) - 1 - setting.new_tokens
        return Speaker(model, self.artifact.root, replace(
            setting,
            text_window=min(int(semantic["max_input_semantic_length"]), TEXT_WINDOW, room),
            fine_window=min(int(fine["max_fine_input_length"]), FINE_WINDOW)), self.device)


class _Opened:
    """A speaker on sessions, which are closed after it."""

    def __init__(self, speaker: Speaker, close: Callable[[], None]) -> None:
        self._speaker = speaker
        self._close = close

    def __enter__(self) -> Speaker:
        return self._speaker

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._close)
            self._speaker.close()
