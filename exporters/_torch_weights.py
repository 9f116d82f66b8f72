"""The checkpoint's own bytes as a module's parameters, mapped from its files, for one export."""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from ..checkpoints import LoadedModel
    from ..checkpoints.model import TensorRef


@contextmanager
def real_weights(
    model: LoadedModel, device: str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[torch.nn.Module]:
    """Put the real weights in place of the placeholders until the block ends.

    A weight that is stored as it is needed is a view of the mapped file: its pages are read when
    something reads them, and there is no copy. A stored dtype that differs from the module's, an
    offset that is no multiple of the element size, and another device need a copy each, made
    tensor by tensor.

    Args:
        model: its module is changed in place, and restored.
        device: ``cpu`` or ``cuda``.
        dtype: of floating-point parameters and buffers; None keeps the module's.
    """
    import torch

    files: dict[Path, mmap.mmap] = {}
    made: dict[Any, torch.nn.Parameter] = {}

    def parameter(name: str, old: torch.nn.Parameter) -> torch.nn.Parameter:
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        ref = model.weights.get(name)
        key = (ref or id(old), kind)
        if key not in made:
            value = old.detach() if ref is None else _tensor(ref, kind, files, name)
            made[key] = torch.nn.Parameter(value.to(device, kind), requires_grad=False)
        return made[key]

    def buffer(old: torch.Tensor) -> torch.Tensor:
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        return old.to(device, kind)

    modules = dict(model.module.named_modules())
    before = {m: (dict(m._parameters), dict(m._buffers)) for m in modules.values()}
    try:
        for prefix, module in modules.items():
            stem = f"{prefix}." if prefix else ""
            for name, old in before[module][0].items():
                if old is not None:
                    module._parameters[name] = parameter(stem + name, old)
            for name, held in before[module][1].items():
                if held is not None:
                    module._buffers[name] = buffer(held)
        yield model.module
    finally:
        for module, (parameters, buffers) in before.items():
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for mapped in files.values():
            mapped.madvise(mmap.MADV_DONTNEED)  # torch's caches may hold the views longer


def _tensor(
    ref: TensorRef, kind: torch.dtype, files: dict[Path, mmap.mmap], name: str
) -> torch.Tensor:
    """One stored tensor; a view of the file where the bytes lie there as they are needed.

    Each view is a storage of its own: whatever saves a tensor saves its whole storage.
    """
    import torch

    stored: torch.dtype = getattr(torch, ref.dtype)
    if not ref.nbytes:
        return torch.empty(ref.shape, dtype=kind)
    if stored != kind or ref.offset % stored.itemsize:
        return _copied(ref, kind, name)
    if ref.file not in files:
        with ref.file.open("rb") as file:
            files[ref.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    count = ref.nbytes // stored.itemsize
    return torch.frombuffer(files[ref.file], dtype=stored, count=count, offset=ref.offset).reshape(
        ref.shape
    )


def _copied(ref: TensorRef, kind: torch.dtype, name: str) -> torch.Tensor:
    import torch

    from ..artifacts import weights

    wanted = str(kind).removeprefix("torch.")
    values = weights.read(ref, None if wanted == ref.dtype else wanted, name=name)
    flat = values.reshape(-1).view("uint8")  # NumPy exports no buffer of bfloat16
    return torch.frombuffer(flat, dtype=kind).reshape(ref.shape)
