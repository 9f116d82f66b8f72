"""What an artifact is compared with: the gate, the reference and the truth of its precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import checkpoints, runtimes, validate
from ..checkpoints.tasks import TASKS
from ..errors import UsageError
from ..session import Placement, Session
from . import quantised
from .deriving import translated

if TYPE_CHECKING:
    import numpy as np

    from ..artifacts import Artifact
    from ..checkpoints import Checkpoint, Dtype, LoadedModel
    from ..spec import ModelSpec

Opener = Callable[[], Session]
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class References:
    """Sides of one comparison, opened on first need, and how to judge."""

    reference: Opener
    truth: Opener
    settings: validate.Settings


def identity(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What tells a source from any other: weights, task, and what equal weights may differ in.

    That is a window, a scale, or the modules behind an encoder. Python of the checkpoint's own is
    not covered: see :attr:`~..checkpoints.Checkpoint.own_code`.
    """
    root, task = checkpoint.root, TASKS.get(checkpoint.task)  # a module of the user's own has none
    found = [checkpoint.scan.digest, checkpoint.task, (root / "config.json").read_text("utf-8")]
    if task and task.composed:
        from ..checkpoints import sentences

        encoder = sorted(root.glob("sentence_*_config.json"))
        found += [repr(sentences.steps(root)), *(file.read_text("utf-8") for file in encoder)]
    return tuple(found)


def original(
    checkpoint: Checkpoint,
    dtype: Dtype,
    spec: ModelSpec,
    device: str = "cpu",
    rounded_to: str | None = None,
    part: str | None = None,
) -> Opener:
    """Opens the unpatched source in eager mode, fed in the dtypes of ``spec``.

    Args:
        dtype: that it computes in.
        rounded_to: round its parameters to this dtype first.
        part: the one that is meant, of a model of several graphs.
    """

    def opens() -> Session:
        model = whole(checkpoint, dtype, rounded_to)
        return opened(model.parts[part] if part else model, spec, device)

    return opens


def opened(model: LoadedModel, spec: ModelSpec, device: str = "cpu") -> Session:
    """The model in eager mode, fed in the dtypes of ``spec``, whatever it computes in."""
    if model.spec.input_names == spec.input_names:
        model = replace(model, spec=replace(model.spec, inputs=spec.inputs))
    return runtimes.get("torch_eager").open(model, device)


def whole(checkpoint: Checkpoint, dtype: Dtype, rounded_to: str | None = None) -> LoadedModel:
    """The unpatched source; see :func:`original`."""
    model = checkpoints.load_reference(checkpoint, dtype=dtype, attention="sdpa")
    if rounded_to is not None:
        _round_parameters(model.module, rounded_to)
    return model


def references(
    artifact: Artifact | None,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    device: str,
    part: str | None = None,
) -> References:
    """The sides of a comparison, by the precision that the artifact's manifest states.

    float32: the original in eager mode in float32 (reference) and float64 (truth). float16 and
    bfloat16: the original in eager mode in that dtype; the truth in float64 from weights rounded
    to it. int8: the original with its weights rounded as the artifact's are, and the inputs of
    those layers too in the reference (float32) but not in the truth (float64).

    Args:
        artifact: None for a bare file, which is taken for float32.
        part: the component that ``artifact`` is a view of.

    Raises:
        UsageError: the manifest states a precision there is no rule for.
    """

    def side(dtype: Dtype, rounded_to: str | None = None) -> Opener:
        return original(checkpoint, dtype, spec, device, rounded_to, part)

    precision = artifact.manifest.facts.get("precision") if artifact else None
    if artifact is None or precision is None:
        return References(side("float32"), side("float64"), validate.Settings())
    settings = validate.Settings(gate="precision", parent=translated(artifact))
    if precision in HALVES:
        half = side(precision)

        def widened() -> Session:
            return _Widened(half(), spec)

        return References(widened, side("float64", precision), settings)
    if precision in quantised.PRECISIONS:
        facts = artifact.manifest.facts["quantize"]
        return References(
            quantised.fake(side("float32"), facts, rounded_inputs=True),
            quantised.fake(side("float64"), facts, rounded_inputs=False),
            settings,
        )
    raise UsageError(f"the manifest states the precision {precision!r}",
                     allowed=", ".join((*HALVES, *quantised.PRECISIONS)))


class _Widened(Session):
    """A session whose outputs have an artifact's dtypes: there, inputs and outputs stay float32."""

    runtime = "torch_eager"

    def __init__(self, inner: Session, spec: ModelSpec) -> None:
        super().__init__(inner.spec)
        self._inner = inner
        self._dtypes = {t.name: t.dtype for t in spec.outputs}

    def placement(self) -> Placement:
        return self._inner.placement()

    def close(self) -> None:
        super().close()
        self._inner.close()

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._inner.run(feeds)
        return {name: value.astype(self._dtypes[name]) if str(value.dtype) in HALVES else value
                for name, value in outputs.items()}


def _round_parameters(module: Any, dtype: str) -> None:
    """Round parameters to ``dtype`` in place, each keeping the dtype it is stored in."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dtype.is_floating_point:
                parameter.copy_(parameter.to(getattr(torch, dtype)))
