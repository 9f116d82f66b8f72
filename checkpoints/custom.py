"""Modules that are not transformers': one in memory, or one that a Python file makes.

``path/to/file.py:factory`` names a function that returns a :class:`CustomModel`; its file is run,
so the user has to allow it. A module in memory goes under a name that only this process knows.
Either way the weights are written once as safetensors, and from then on it is a checkpoint like any
other.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, RemoteCodeRefused, UsageError
from ..spec import Dim, ModelSpec, TensorSpec
from . import probe, samples, weightless
from .build import cache_root
from .files import CONFIG, SINGLE, read_tensors
from .model import IN_MEMORY, Checkpoint, LoadedModel, Source
from .scan import BackgroundScan

if TYPE_CHECKING:
    import types

    from ..spec import Role
    from .model import Dtype

TASK = "module"
"""What the manifest names as the task of a module of one's own."""

_FILE = re.compile(r"(?P<file>.+\.py):(?P<factory>[A-Za-z_]\w*)")
_held: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
"""What the caller's modules take, for as long as the caller keeps them."""
_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class CustomModel:
    """A module with what its forward takes.

    Attributes:
        module: any ``torch.nn.Module``; returns a tensor, a sequence of tensors, or a mapping or
            ModelOutput of tensors.
        example_inputs: tensors by the names of forward's parameters, or in forward's order. Test
            data is drawn like them: integers up to the largest one seen, floats standard normal.
        dims: names of the dynamic axes of each input, ``{"x": {0: "batch", 1: "length"}}``; one
            name means one size. None: the first axis of every input is ``batch``.
        ranges: of the named dimensions; by default 1 to 64, or to four times the example's size.
    """

    module: torch.nn.Module
    example_inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
    dims: Mapping[str, Mapping[int, str]] | None = None
    ranges: Mapping[str, Dim] = field(default_factory=dict)

    def inputs(self) -> dict[str, torch.Tensor]:
        """The example inputs by name.

        Raises:
            UsageError: there are more of them than forward has parameters, or none.
        """
        given = self.example_inputs
        if isinstance(given, Mapping):
            found = dict(given)
        else:
            names = [n for n, p in inspect.signature(self.module.forward).parameters.items()
                     if p.kind is p.POSITIONAL_OR_KEYWORD]
            if len(given) > len(names):
                raise UsageError(f"there are {len(given)} example inputs",
                                 allowed=f"at most {len(names)}: {', '.join(names) or 'none'}")
            found = dict(zip(names, given, strict=False))
        if not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise UsageError("the example inputs are no tensors", allowed="at least one tensor")
        return found


class _Adapter(torch.nn.Module):
    """Tensors in and out in the spec's order."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model = model
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = _by_name(self.model(**dict(zip(self.inputs, tensors, strict=True))))
        return tuple(result[name] for name in self.outputs)


class _Probed(torch.nn.Module):
    """The module as probing expects it: results by name."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        return _by_name(self.model(**feeds))


def is_custom(model: str) -> bool:
    """Whether a user's words name a module of their own."""
    return model.startswith(IN_MEMORY) or _FILE.fullmatch(model) is not None


def in_memory(model: str) -> bool:
    """Whether no other process could make the module."""
    return model.startswith(IN_MEMORY)


def hold(custom: CustomModel) -> str:
    """Let :func:`resolve` find a module while it lives; returns the name it is known by."""
    _held.pop(custom.module, None)  # the latest of a name comes last
    _held[custom.module] = custom.inputs(), custom.dims, custom.ranges
    return _name(custom.module)


def _name(module: torch.nn.Module) -> str:
    return f"{IN_MEMORY}{type(module).__name__}"


def resolve(model: str, *, allowed: bool) -> Checkpoint:
    """The checkpoint of a module: its weights in the cache, and how to make it again.

    Args:
        model: ``file.py:factory``, or a name from :func:`hold`.
        allowed: whether the user lets the file run.

    Raises:
        RemoteCodeRefused: it would run a file that was not allowed.
        CheckpointError: the file or the function is absent, or returns something else.
    """
    make = _maker(model, allowed)
    custom = make()
    root = _written(custom)
    files = {SINGLE: root / SINGLE}
    tensors = read_tensors(files)
    origin = Source(model=model, task=TASK, weights="pretrained", digest="",
                    remote_code=not in_memory(model))
    return Checkpoint(root, tensors, origin, BackgroundScan(files, tensors.values()), make)


def _maker(model: str, allowed: bool) -> Callable[[], CustomModel]:
    if in_memory(model):
        known = [pair for pair in _held.items() if _name(pair[0]) == model]
        if not known:
            raise CheckpointError(f"{model} was a module in the memory of another process, or is "
                                  "gone from this one's",
                                  allowed="path/to/file.py:factory, which makes it again")
        module, takes = known[-1]
        return lambda: CustomModel(copy.deepcopy(module), *takes)
    found = _FILE.fullmatch(model)
    assert found is not None
    file, factory = Path(found["file"]).expanduser().absolute(), found["factory"]
    if not allowed:
        raise RemoteCodeRefused(f"{model} runs the Python of {file}",
                                allowed="files that were allowed to run",
                                hint="read it, then --trust-remote-code")
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}", hint="check the path")
    return lambda: _made(file, factory)


def _executed(file: Path) -> types.ModuleType:
    """The file as a module, run anew: what it seeds or loads is as it was the first time."""
    name = f"modelport_custom_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and forgotten() look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _made(file: Path, factory: str) -> CustomModel:
    module = _executed(file)
    function = getattr(module, factory, None)
    if not callable(function):
        raise CheckpointError(f"{file} has no function {factory}",
                              allowed=", ".join(n for n, v in vars(module).items()
                                                if inspect.isfunction(v)) or "none there")
    made = function()
    if isinstance(made, tuple) and made and isinstance(made[0], torch.nn.Module):
        made = CustomModel(*made)
    if not isinstance(made, CustomModel):
        raise CheckpointError(f"{factory} returned {type(made).__name__}",
                              allowed="modelport.CustomModel, or (module, example_inputs, dims)")
    return made


def _written(custom: CustomModel) -> Path:
    """The directory in the cache with the module's weights; its name is their digest."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous().clone()
             for name, value in custom.module.state_dict().items()
             if isinstance(value, torch.Tensor)}
    about = {"module": type(custom.module).__qualname__, "inputs": sorted(custom.inputs())}
    key = hashlib.sha256(json.dumps(about).encode())
    for name, value in sorted(state.items()):
        key.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        key.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    target = cache_root() / "custom" / key.hexdigest()[:32]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            save_file(state, work / SINGLE, metadata={"format": "pt"})
            (work / CONFIG).write_text(json.dumps(about) + "\n")
            work.chmod(0o755)
            if not target.is_dir():
                work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def load(checkpoint: Checkpoint, dtype: Dtype) -> LoadedModel:
    """The module for capture, with placeholders; see :func:`~.loader.load`."""
    custom = _of(checkpoint)
    refs = {name: checkpoint.tensors[name] for name in custom.module.state_dict()
            if name in checkpoint.tensors}
    spec = _spec(custom, dtype)
    found = weightless.Found(custom.module, refs, (), ())
    module = weightless.with_placeholders(found, dtype)
    return LoadedModel(spec, _Adapter(module, spec.input_names, spec.output_names), checkpoint,
                       {f"model.{name}": ref for name, ref in refs.items()},
                       samples.example(spec))


def load_reference(checkpoint: Checkpoint, dtype: Dtype) -> LoadedModel:
    """The module with its own weights; see :func:`~.loader.load_reference`."""
    custom = _of(checkpoint)
    spec = _spec(custom, dtype)
    module = custom.module.eval().to(getattr(torch, dtype))
    return LoadedModel(spec, _Adapter(module, spec.input_names, spec.output_names), checkpoint, {},
                       samples.example(spec))


def _of(checkpoint: Checkpoint) -> CustomModel:
    assert checkpoint.make is not None
    custom = checkpoint.make()
    assert isinstance(custom, CustomModel)
    custom.module.eval()
    return custom


def _spec(custom: CustomModel, dtype: Dtype) -> ModelSpec:
    examples = custom.inputs()
    dims = custom.dims
    if dims is None:
        dims = {name: {0: "batch"} for name, value in examples.items() if value.ndim}
    unknown = [n for n in dims if n not in examples]
    if unknown:
        raise UsageError(f"dims names {unknown[0]}, which is no input",
                         allowed=", ".join(examples))
    inputs, sizes = [], dict[str, int]()
    for name, value in examples.items():
        axes = dims.get(name, {})
        wrong = [a for a in axes if not 0 <= a < value.ndim]
        if wrong:
            raise UsageError(f"dims names axis {wrong[0]} of {name}",
                             allowed=f"0 to {value.ndim - 1}")
        shape: tuple[int | str, ...] = tuple(axes.get(a, size)
                                             for a, size in enumerate(value.shape))
        sizes |= {axes[a]: size for a, size in enumerate(value.shape) if a in axes}
        inputs.append(_tensor(name, value, shape, dtype))
    ranges = {name: custom.ranges.get(name) or Dim(1, size, max(64, 4 * size))
              for name, size in sizes.items()}
    module = custom.module.to(getattr(torch, dtype))
    try:
        plain = probe.outputs(_Probed(module), tuple(inputs), ranges, {})
    except probe.ForwardFailed as error:
        raise UsageError(f"{type(module).__name__} can't be run on inputs like its examples: "
                         f"{error}", allowed="inputs of any size within ranges",
                         hint="dims and ranges that say which sizes it takes") from error
    return ModelSpec(tuple(inputs), plain[0], {**ranges, **plain[1]})


def _tensor(
    name: str, value: torch.Tensor, shape: tuple[int | str, ...], dtype: Dtype
) -> TensorSpec:
    if value.is_floating_point():
        return TensorSpec(name, dtype, shape, "features")
    kind = str(value.dtype).removeprefix("torch.")
    if value.dtype not in _INTEGERS:
        raise UsageError(f"{name} is {kind}", allowed="floating point, int64 or int32")
    largest = int(value.max()) if value.numel() else 1
    role: Role = "mask" if name.endswith("mask") and largest <= 1 else "segments"
    return TensorSpec(name, kind, shape, role, high=None if role == "mask" else largest + 1)


def _by_name(result: Any) -> dict[str, torch.Tensor]:
    """What a module returned, by name."""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else (
        (f"output_{i}", value) for i, value in enumerate(result))
    found = {str(name): value for name, value in items if isinstance(value, torch.Tensor)}
    if not found:
        raise UsageError(f"the module returns {type(result).__name__} without a tensor",
                         allowed="tensors, alone, in a sequence or in a mapping")
    return found
