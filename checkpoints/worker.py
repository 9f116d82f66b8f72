"""What is done in a process of its own, so that its memory is gone when it ends.

Run as ``python -m <this module> COMMAND`` with a JSON object on stdin; the caller is
:func:`~.build.run`. Commands: ``random`` draws weights for an architecture, ``convert`` rewrites
weights under the names of the module that transformers builds, ``unpickle`` turns a pickle
checkpoint into safetensors with torch's restricted unpickler.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import INDEX, SINGLE, read_config, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


def draw_random(
    root: str, out: str, class_name: str, seed: int, attention: float | None = None
) -> None:
    """Build a class from ``root/config.json`` with seeded weights and save it to ``out``.

    transformers starts biases at zero and norms at one, which would hide a bias that an exporter
    drops or a norm that it mixes up: one-dimensional parameters and running statistics are moved
    off those values.

    Args:
        attention: see :func:`_widen`; None leaves it as the library draws it.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(
        root, local_files_only=True, trust_remote_code=False)
    config.dtype = torch.float32
    model = getattr(transformers, class_name)._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        if attention is not None:
            _widen(model, attention)
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and parameter.is_floating_point():
                scale = 0.02 if name.endswith("bias") else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer), alpha=0.02)
            elif name.endswith("running_var"):
                buffer.mul_(torch.randn_like(buffer).mul_(0.1).exp_())
            elif buffer.ndim > 1 and buffer.is_floating_point() and not buffer.any():
                buffer.normal_()  # a codebook of zeros makes every code the same
    model.save_pretrained(out, max_shard_size="2GB")


def _widen(model: torch.nn.Module, attention: float) -> None:
    """Let attention's projections return ``attention`` times the size of what they are given.

    Those alone that the config draws with one constant for every width (``initializer_range``,
    ``init_std``), and that come out narrower: an architecture that scales its weights by their
    width, such as T5, means them as they are.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    constants = {getattr(config, name, None) or 0.0
                 for config in configs for name in ("initializer_range", "init_std")}
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("attn" in name or "attention" in name):
            found, wanted = float(weight.std()), attention / min(weight.shape) ** 0.5
            if found < wanted and any(abs(found - c) < 0.1 * c for c in constants):
                weight.mul_(wanted / found)


def convert(
    root: str, out: str, class_name: str, dtype: str, init: Mapping[str, Any], task: str,
    remote_code: bool,
) -> None:
    """Load through transformers and save each tensor under the module's own name for it.

    What the checkpoint lacks, and transformers drew at random, is left out.

    Raises:
        ValueError: a tensor holds NaN or infinity.
    """
    import torch
    import transformers

    from . import tasks

    cls = (tasks.remote_class(Path(root), read_config(Path(root)), task) if remote_code
           else getattr(transformers, class_name))
    model, info = cls.from_pretrained(
        root, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
        trust_remote_code=remote_code, output_loading_info=True, **init)
    state = {name: value for name, value in model.state_dict().items()
             if name not in info["missing_keys"]}
    broken = [name for name, value in state.items()
              if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"the weights hold NaN or infinity: {', '.join(broken[:3])}")
    _save(state, Path(out))


def unpickle(root: str, out: str) -> None:
    """Convert ``pytorch_model.bin`` or its shards with ``torch.load(weights_only=True)``."""
    import torch

    source = Path(root)
    index = source / "pytorch_model.bin.index.json"
    names = (sorted({str(v) for v in read_json(index)["weight_map"].values()})
             if index.is_file() else ["pytorch_model.bin"])
    written: dict[str, str] = {}
    for number, name in enumerate(names):
        if Path(name).name != name:
            raise ValueError(f"the index names {name!r}, a path outside its directory")
        state = torch.load(source / name, map_location="cpu", weights_only=True)
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        shard = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        target = SINGLE if len(names) == 1 else shard
        _save(tensors, Path(out), target)
        written.update(dict.fromkeys(tensors, target))
    if len(names) > 1:
        (Path(out) / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": written}))


def _save(tensors: Mapping[str, torch.Tensor], out: Path, name: str = SINGLE) -> None:
    from safetensors.torch import save_file

    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    kept = {}
    for key, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.numel(), tuple(tensor.stride()))
        # Aliases are written out as well: a reader then needs no knowledge of what is tied.
        kept[key] = tensor.contiguous().clone() if identity in seen else tensor.contiguous()
        seen.setdefault(identity, key)
    save_file(kept, out / name, metadata={"format": "pt"})


COMMANDS: Mapping[str, Callable[..., None]] = {
    "random": draw_random, "convert": convert, "unpickle": unpickle,
}


def main() -> int:
    """Run the command named on the command line with the arguments from stdin."""
    COMMANDS[sys.argv[1]](**json.load(sys.stdin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
