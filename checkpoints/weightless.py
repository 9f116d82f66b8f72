"""transformers' own loading, run on placeholders, to learn where each parameter is stored.

Every stored tensor is stood in for by a *tag*: its number, as one float32 expanded to the tensor's
shape (stride 0, four bytes whatever the shape). ``from_pretrained`` renames, ties and places these
as it would the real ones, and afterwards each parameter holds the number of the tensor it came
from. So there is no table of renamings here, and a parameter that transformers computes from
several tensors, instead of renaming one, is noticed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..artifacts.weights import read_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from .model import Attention, Dtype, TensorRef

_PLACEHOLDER = 0.01
_FIRST_TAG = 1 << 20
"""Far from any number that transformers initialises with; float32 holds 15 million more exactly."""
_HEAD = 256


class NeedsConversion(Exception):
    """A parameter is not one stored tensor under another name."""


@dataclass(frozen=True, slots=True)
class Found:
    """A module whose parameters hold tags, and what the tags said.

    Attributes:
        weights: for each name of its state dict that is stored, where.
        missing: names that are not stored, and that transformers drew at random.
        mismatched: (name, stored shape, built shape).
    """

    model: torch.nn.Module
    weights: Mapping[str, TensorRef]
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, Any, Any], ...]


def build(
    cls: Any,
    config: Any,
    tensors: Mapping[str, TensorRef],
    attention: Attention,
    init: Mapping[str, Any],
    *,
    saved: bool = False,
) -> Found:
    """Build ``cls`` on tags.

    Args:
        saved: the tensors are those of this very class, as it saved them. A tag that it overwrote
            with zeros (a row of padding does, for all rows are one) is then known by its name.

    Raises:
        NeedsConversion: a parameter has to be computed from stored tensors.
    """
    import torch

    tags, refs = _tags(tensors)
    # Experts one after the other would make a graph of the ones that the example happened to use.
    experts = {"experts_implementation": "batched_mm"} if hasattr(
        config, "_experts_implementation") else {}

    def attempt(implementation: str) -> tuple[Any, dict[str, Any]]:
        with _no_converters():
            result: tuple[Any, dict[str, Any]] = cls.from_pretrained(
                None, config=config, state_dict=dict(tags), dtype=torch.float32,
                attn_implementation=implementation, output_loading_info=True,
                ignore_mismatched_sizes=True, **experts, **init)
        return result

    try:
        model, info = attempt(attention)
    except ValueError:
        if attention == "eager":
            raise
        model, info = attempt("eager")
    skip = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in skip or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.numel():
            own = tensors.get(name)
            lost = not tensor.is_floating_point() or (saved and not tensor.any())
            if lost and own and own.shape == tuple(tensor.shape):
                weights[name] = own  # a tag does not survive in a bool
            else:
                weights[name] = _untagged(name, tensor, refs)
    return Found(model, weights, tuple(sorted(info["missing_keys"])),
                 tuple(info["mismatched_keys"]))


def with_placeholders(found: Found, dtype: Dtype) -> torch.nn.Module:
    """Put harmless numbers in place of the tags, and real values into stored buffers."""
    import torch

    kind = getattr(torch, dtype)
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in found.model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                target = kind if parameter.is_floating_point() else parameter.dtype
                one = torch.full((1,) * parameter.ndim, _PLACEHOLDER, dtype=target)
                made[id(parameter)] = torch.nn.Parameter(one.expand(parameter.shape),
                                                         requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            stored = found.weights.get(f"{prefix}.{name}" if prefix else name)
            if stored is not None:
                buffer = _read(stored).to(buffer.dtype)
            module._buffers[name] = buffer.to(kind) if buffer.is_floating_point() else buffer
    return found.model.eval()


def _untagged(name: str, tensor: torch.Tensor, refs: Mapping[int, TensorRef]) -> TensorRef:
    tag = int(tensor[(0,) * tensor.ndim].item())
    # Tying pads a bias to its matrix, which copies it: a constant is a tag whatever its strides.
    constant = (tensor.untyped_storage().nbytes() == tensor.element_size()
                or bool((tensor == tensor[(0,) * tensor.ndim]).all()))
    if not constant or tag not in refs or refs[tag].shape != tuple(tensor.shape):
        raise NeedsConversion(name)
    return refs[tag]


def _read(ref: TensorRef) -> torch.Tensor:
    import torch

    data = bytearray().join(bytes(chunk) for chunk in read_chunks(ref))
    return torch.frombuffer(data, dtype=getattr(torch, ref.dtype)).reshape(ref.shape)


def _tags(
    tensors: Mapping[str, TensorRef],
) -> tuple[dict[str, torch.Tensor], dict[int, TensorRef]]:
    """A tag for each tensor. Tensors of the same content share one.

    transformers ties two stored parameters only where their values are equal, and pickles hold
    both of a tied pair.
    """
    import torch

    refs: dict[int, TensorRef] = {}
    alike: dict[object, list[int]] = {}
    tags = {}
    for name, ref in tensors.items():
        group = alike.setdefault((ref.dtype, ref.shape, _head(ref)), [])
        number = next((n for n in group if _same(refs[n], ref)), None)
        if number is None:
            number = _FIRST_TAG + len(refs)
            refs[number] = ref
            group.append(number)
        tags[name] = torch.full((1,) * len(ref.shape), float(number)).expand(ref.shape)
    return tags, refs


def _head(ref: TensorRef) -> bytes:
    return bytes(next(iter(read_chunks(ref, _HEAD)), b""))


def _same(one: TensorRef, other: TensorRef) -> bool:
    pairs = zip(read_chunks(one), read_chunks(other), strict=True)
    return all(a == b for a, b in pairs)


@contextlib.contextmanager
def _no_converters() -> Iterator[None]:
    """Stop at the first parameter that transformers computes: on tags it would cost memory."""
    from transformers import core_model_loading

    original = core_model_loading.WeightConverter.convert

    def convert(self: Any, name: str, *_: Any, **__: Any) -> Any:
        raise NeedsConversion(name)

    core_model_loading.WeightConverter.convert = convert
    try:
        yield
    finally:
        core_model_loading.WeightConverter.convert = original
