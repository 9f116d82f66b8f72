"""A checkpoint becomes a module: without its weights for capture, with them for reference."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable, CheckpointError, UsageError
from ..spec import ModelSpec
from . import build, inputs, lean, standins, tasks, weightless
from .files import CONFIG, read_config, read_tensors, sidecars, weight_files
from .model import Attention, Checkpoint, Dtype, LoadedModel, TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

    from ..spec import Dim


@dataclass(frozen=True, slots=True)
class _Target:
    """What transformers is asked to build."""

    root: Path
    cls: Any
    config: Any
    init: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        return str(self.cls.__name__)


@standins.completed
def load(
    checkpoint: Checkpoint,
    *,
    attention: Attention = "sdpa",
    dtype: Dtype = "float32",
    dims: Mapping[str, Dim] | None = None,
) -> LoadedModel:
    """Build the module for graph capture, with placeholders for its parameters.

    A placeholder is one number expanded to the parameter's shape: it takes no memory, and capture
    never reads it. Buffers have their real values. Where transformers would compute a parameter
    from stored tensors instead of only renaming them, that is done once in a process of its own
    and kept in the cache.

    Args:
        checkpoint: from :func:`~.resolver.resolve`.
        attention: implementation to trace; ``eager`` where the model lacks ``sdpa``.
        dtype: of parameters and floating-point inputs.
        dims: ranges to use in place of the derived ones, by dimension name.

    Raises:
        CheckpointError: stored shapes differ from the config's, or weights are missing.
        UsageError: the checkpoint lacks the task's head, or the model needs inputs that can't be
            derived.
    """
    if checkpoint.make is not None:
        from . import custom

        return custom.load(checkpoint, dtype)
    with quiet():
        target = _target(checkpoint)
        tensors: Mapping[str, TensorRef] = checkpoint.tensors
        try:
            found = _weightless(checkpoint, target, tensors, attention)
        except weightless.NeedsConversion:
            root = build.converted(checkpoint.root, checkpoint.source, target.class_name,
                                   _stored_dtype(tensors), dict(target.init))
            tensors = read_tensors(weight_files(root))
            try:
                found = _weightless(checkpoint, target, tensors, attention, saved=True)
            except weightless.NeedsConversion as error:
                raise CheckpointError(
                    f"{error} of {target.class_name} can't be traced to stored tensors",
                    hint="another --task, or a checkpoint saved by transformers 5") from error
        if tasks.TASKS[checkpoint.task].composed:
            from . import sentences

            found = sentences.wrapped(found, checkpoint)
        model = weightless.with_placeholders(found, dtype)
    return _loaded(checkpoint, target, model, found.weights, dtype, dims)


@standins.completed
def load_reference(
    checkpoint: Checkpoint,
    *,
    dtype: Dtype = "float32",
    attention: Attention = "eager",
) -> LoadedModel:
    """Build the unpatched module with its real weights, the way transformers does it.

    This is what artifacts are compared with, so it shares nothing with :func:`load` but the choice
    of class. Weights are read as float32 and then cast.

    Raises:
        CheckpointError: transformers can't load it.
        UsageError: the checkpoint lacks the task's head.
    """
    if checkpoint.make is not None:
        from . import custom

        return custom.load_reference(checkpoint, dtype)
    import torch

    if tasks.TASKS[checkpoint.task].composed:
        from . import sentences

        with quiet():
            original = sentences.original(checkpoint, attention).eval()
            original = original.to(getattr(torch, dtype))
        return _loaded(checkpoint, _target(checkpoint), original, None, dtype, None)
    with quiet():
        target = _target(checkpoint)
        model, info = _from_pretrained(checkpoint, target, attention, target.init)
        if _only_pooler(info["missing_keys"], target.cls):
            model, info = _from_pretrained(checkpoint, target, attention,
                                           {**target.init, "add_pooling_layer": False})
        if info["missing_keys"]:
            raise missing_head(checkpoint, info["missing_keys"])
        _check_shapes(info["mismatched_keys"])
        model = model.eval().to(getattr(torch, dtype))
    return _loaded(checkpoint, target, model, None, dtype, None)


def _target(checkpoint: Checkpoint) -> _Target:
    import transformers

    raw = read_config(checkpoint.root)
    if raw.get("quantization_config"):
        raise UsageError("this checkpoint is quantized already",
                         allowed="float32, float16, bfloat16 or float64 weights",
                         hint="export the original, then --quantize")
    remote = checkpoint.origin.remote_code
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.root, local_files_only=True, trust_remote_code=remote)
    except ImportError as error:
        raise _absent(error) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        first = (str(error).splitlines() or ["no message"])[0]
        raise CheckpointError(f"transformers can't read {checkpoint.root / 'config.json'}: {first}",
                              hint="a model type that the installed transformers knows") from error
    architectures = tuple(raw.get("architectures") or ())
    if remote:
        cls = tasks.remote_class(checkpoint.root, raw, checkpoint.task)
    else:
        name = tasks.class_name(config.model_type, checkpoint.task, architectures)
        cls = getattr(transformers, name, None)
        if cls is None:
            raise UsageError(f"the installed transformers has no {name}",
                             hint="a transformers version that has it")
    return _Target(checkpoint.root, cls, config, {})


def _absent(error: ImportError) -> BackendUnavailable:
    """The error for a model that is built by another library, which is not installed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    hint = 'pip install "modelport[timm]"' if "timm" in str(error) else "install that library"
    return BackendUnavailable(lines[0] if lines else "a library is missing", hint=hint)


def _stored_dtype(tensors: Mapping[str, TensorRef]) -> str:
    """The one floating-point type of the stored weights; float32, which holds all, for several."""
    floating = {r.dtype for r in tensors.values()} & {"float32", "float16", "bfloat16"}
    return floating.pop() if len(floating) == 1 else "float32"


def _weightless(
    checkpoint: Checkpoint,
    target: _Target,
    tensors: Mapping[str, TensorRef],
    attention: Attention,
    *,
    saved: bool = False,
) -> weightless.Found:
    def built(init: Mapping[str, Any]) -> weightless.Found:
        try:
            return weightless.build(target.cls, target.config, tensors, attention, init,
                                    saved=saved)
        except ImportError as error:
            raise _absent(error) from error
        except TypeError as error:
            raise CheckpointError(
                f"transformers can't build {target.class_name} from {target.root / CONFIG}: "
                f"{error}", hint="a config that the installed transformers writes") from error

    found = built(target.init)
    if _only_pooler(found.missing, target.cls):
        found = built({**target.init, "add_pooling_layer": False})
    if found.missing:
        raise missing_head(checkpoint, found.missing)
    _check_shapes(found.mismatched)
    return found


def _from_pretrained(
    checkpoint: Checkpoint, target: _Target, attention: Attention, init: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    import torch

    # The default for experts is a fused kernel that has no float64, and truth is computed in it.
    experts = {"experts_implementation": "eager"} if hasattr(
        target.config, "_experts_implementation") else {}

    def attempt(implementation: str) -> tuple[Any, dict[str, Any]]:
        model, info = target.cls.from_pretrained(
            target.root, dtype=torch.float32, attn_implementation=implementation,
            local_files_only=True, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=checkpoint.origin.remote_code,
            **experts, **init)
        return model, info

    try:
        return attempt(attention)
    except ValueError:
        if attention == "eager":
            raise
        return attempt("eager")


def _only_pooler(missing: Any, cls: Any) -> bool:
    if not missing or not all("pooler" in name.split(".") for name in missing):
        return False
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def _check_shapes(mismatched: Any) -> None:
    if mismatched:
        name, stored, built = sorted(mismatched, key=str)[0]
        raise CheckpointError(
            f"{name} is stored as {list(stored)}, but the config makes it {list(built)}",
            allowed="weights and config of the same model", hint="fetch the checkpoint again")


def missing_head(checkpoint: Checkpoint, missing: Any) -> UsageError:
    """The error for a checkpoint whose weights don't cover the task's class."""
    names = sorted(missing)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    supported = _supported(checkpoint)
    return UsageError(
        f"the checkpoint has no weights for {checkpoint.task}: {shown} would be random",
        allowed=", ".join(supported) or "none of the known tasks",
        hint=f"--task {supported[0]}" if supported else "another checkpoint")


def _supported(checkpoint: Checkpoint) -> tuple[str, ...]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        checkpoint.root, local_files_only=True, trust_remote_code=checkpoint.origin.remote_code)
    result = []
    for task in tasks.for_model_type(config.model_type):
        name = tasks.class_name(config.model_type, task)
        cls = getattr(transformers, name, None)
        try:
            found = weightless.build(cls, config, checkpoint.tensors, "eager", {})
        except weightless.NeedsConversion:  # only its own head is known to be stored
            if name in (config.architectures or ()):
                result.append(task)
            continue
        except Exception:  # noqa: BLE001 - one candidate of a list in an error message
            continue
        if not found.missing or _only_pooler(found.missing, cls):
            result.append(task)
    return tuple(result)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr; problems become errors here."""
    lean.preload()
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _loaded(
    checkpoint: Checkpoint, target: _Target, model: torch.nn.Module,
    weights: Mapping[str, TensorRef] | None, dtype: Dtype, dims: Mapping[str, Dim] | None,
) -> LoadedModel:
    if weights is None:
        weights = {}
    if tasks.TASKS[checkpoint.task].parts:
        return _in_parts(checkpoint, model, weights, dtype)
    derived = inputs.derive(model, checkpoint.root, checkpoint.task, dtype, dims)
    return LoadedModel(
        spec=derived.spec,
        module=derived.module,
        checkpoint=checkpoint,
        weights={f"model.{name}": ref for name, ref in weights.items()},
        samples=derived.samples,
        sidecars=sidecars(checkpoint.root),
    )


def _in_parts(
    checkpoint: Checkpoint, model: torch.nn.Module, weights: Mapping[str, TensorRef], dtype: Dtype
) -> LoadedModel:
    """A model of several graphs. A part holds the model's own tensors, under whatever names."""
    from . import parts

    stored = {id(tensor): weights[name] for name, tensor in _tensors(model) if name in weights}
    found = {
        part.name: LoadedModel(
            spec=part.spec,
            module=part.module,
            checkpoint=checkpoint,
            weights={name: stored[id(tensor)] for name, tensor in _tensors(part.module)
                     if id(tensor) in stored},
            samples=part.samples,
        )
        for part in parts.parts(model, checkpoint.root, checkpoint.task, dtype)
    }
    return LoadedModel(
        spec=ModelSpec((), ()),
        module=model,
        checkpoint=checkpoint,
        weights={f"model.{name}": ref for name, ref in weights.items()},
        samples={},
        sidecars=sidecars(checkpoint.root),
        parts=found,
    )


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, under every name they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
