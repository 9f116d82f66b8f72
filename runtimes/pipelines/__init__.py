"""Models of several graphs put together again: the library's own ``generate``, on sessions.

One file for each kind of model, named as in ``checkpoints/parts/``, with
``build(artifact, sessions, device) -> Pipeline``. The transformers model is built without weights,
and what it calls at each step is replaced by a session; decoding strategies, processors and
stopping rules stay the library's.
"""

from __future__ import annotations

import copy
import importlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ...checkpoints import standins, tokenizer
from ...checkpoints.files import read_config
from ...checkpoints.tasks import TASKS, class_name
from ...errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...artifacts import Artifact
    from ...session import Session


_CACHE = "cache_implementation"


class Pipeline:
    """A model that generates.

    Attributes:
        artifact: what it was opened from.
        model: the transformers model; it has no weights, and its forwards are sessions.
        sessions: by component.
        device: where they run.
        sampling_rate: samples a second of what is generated; None where that is tokens.
    """

    sampling_rate: int | None = None

    def __init__(
        self, artifact: Artifact, model: Any, sessions: Mapping[str, Session], device: str
    ) -> None:
        self.artifact = artifact
        self.model = model
        self.sessions = dict(sessions)
        self.device = device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, with its own arguments.

        Raises:
            UsageError: the prompt or what is asked for does not fit the model, or the generation
                config asks for a way of choosing or a cache that is not to be had.
        """
        _require_honoured(self.model.generation_config, kwargs)
        return self.model.generate(*args, **kwargs)

    def prompt(self, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of :meth:`generate` for texts, padded as the model continues them.

        Raises:
            UsageError: the artifact has no tokenizer, or a text has no tokens.
        """
        words = tokenizer(self.artifact.root)
        words.padding_side = "left"
        if words.pad_token is None:
            words.pad_token = words.eos_token
        if empty := [text for text in texts if not words(text)["input_ids"]]:
            raise UsageError(f"{empty[0]!r} has no tokens", allowed="texts that are not empty")
        made = words(list(texts), padding=len(texts) > 1, return_tensors="pt")
        return {name: made[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def text(self, sequences: Any) -> list[str]:
        """Generated sequences as text."""
        found: list[str] = tokenizer(self.artifact.root).batch_decode(
            sequences, skip_special_tokens=True)
        return found

    def close(self) -> None:
        """Close every session. Closing twice is allowed."""
        for session in self.sessions.values():
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _require_honoured(own: Any, given: Mapping[str, Any]) -> None:
    """Refuse what a generation config or an argument asks for and the library would fail at."""
    from transformers.generation import GenerationMode

    config = copy.deepcopy(given.get("generation_config") or own)
    settings = {**vars(config), **given}
    nested = {f"{name}: {key}": value for name, of in settings.items() if isinstance(of, dict)
              for key, value in of.items()}
    for name, value in {**settings, **nested}.items():
        if name.endswith(_CACHE) and value not in (None, "dynamic"):
            raise UsageError(f"{name} is {value!r}, a cache that the graphs do not take",
                             allowed="unset or 'dynamic'", hint=f"{_CACHE}=None")
    config.update(**{name: value for name, value in given.items() if hasattr(config, name)})
    mode = config.get_generation_mode(given.get("assistant_model"))
    apart = {GenerationMode.CONTRASTIVE_SEARCH, GenerationMode.DOLA_GENERATION,
             GenerationMode.CONSTRAINED_BEAM_SEARCH, GenerationMode.GROUP_BEAM_SEARCH}
    if mode in apart and not given.get("trust_remote_code"):
        raise UsageError(
            f"the generation config asks for {mode.value.replace('_', ' ')}, which transformers "
            "no longer has itself and would fetch as code from the hub",
            allowed="greedy search, sampling, beams, prompt lookup",
            hint="leave the settings of it out of generation_config.json and export again")


def build(artifact: Artifact, sessions: Mapping[str, Session], device: str = "cpu") -> Pipeline:
    """A pipeline over open sessions, one for each component of a verified artifact.

    Raises:
        UsageError: the artifact is one graph, or lacks a component its kind needs.
    """
    kind = TASKS[artifact.manifest.source.task].parts if sessions else None
    if kind is None:
        raise UsageError(
            f"{artifact.root} is one graph, which does not generate",
            allowed="an artifact of a task such as text-generation",
            hint=f"modelport run {artifact.root} --text …",
        )
    made: Pipeline = importlib.import_module(f".{kind}", __name__).build(
        artifact, sessions, device)
    return made


def required(sessions: Mapping[str, Session], names: Sequence[str], artifact: Artifact) -> None:
    """Refuse an artifact that lacks a component.

    Raises:
        UsageError: names it.
    """
    if missing := [name for name in names if name not in sessions]:
        raise UsageError(f"{artifact.root} has no component {', '.join(missing)}",
                         allowed=", ".join(names), hint="export it again")


@standins.completed
def hollow(artifact: Artifact, device: str = "cpu") -> Any:
    """The transformers model of an artifact without weights, that believes to be on ``device``.

    Its parameters are on torch's meta device: what computes with one raises.
    """
    import torch
    import transformers

    raw = read_config(artifact.root)
    config = transformers.AutoConfig.from_pretrained(
        artifact.root, local_files_only=True, trust_remote_code=False)
    name = class_name(config.model_type, artifact.manifest.source.task,
                      tuple(raw.get("architectures") or ()))
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls._from_config(config, attn_implementation="eager").eval()
    if (artifact.root / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(artifact.root)
    place = torch.device(device)
    model.__class__ = type(cls.__name__, (cls,), {"device": property(lambda _: place)})
    return model
