"""Checkpoints of sentence-transformers: an encoder, then pooling, dense layers, normalisation.

``modules.json`` lists them, and what follows the encoder becomes part of the graph. It is written
here anew, for capture; what it is compared with is the library's own model.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendUnavailable, CheckpointError, UsageError
from .files import MODULES, SINGLE, read_json, read_tensors, require_inside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .model import Attention, Checkpoint, TensorRef
    from .weightless import Found

TASK = "sentence-similarity"
OUTPUT = "sentence_embedding"

_FIRST, _KNOWN = "Transformer", ("Pooling", "Dense", "Normalize")
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Names of the switches for ways of pooling, in the order their results are joined."""

_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


@dataclass(frozen=True, slots=True)
class Step:
    """One module after the encoder.

    Attributes:
        kind: ``Pooling``, ``Dense`` or ``Normalize``.
        path: its folder in the checkpoint.
        config: of its folder; empty where there is none.
    """

    kind: str
    path: str
    config: Mapping[str, Any]

    def weights(self, root: Path) -> dict[str, Path]:
        """Its safetensors file, by its path in the checkpoint.

        Raises:
            CheckpointError: it has weights, but not as safetensors.
        """
        if self.kind != "Dense":
            return {}
        name = f"{self.path}/{SINGLE}"
        if not (root / name).is_file():
            raise CheckpointError(f"{root / self.path} has no {SINGLE}", allowed="safetensors",
                                  hint="a revision with safetensors")
        return {name: root / name}


def listed(root: Path) -> bool:
    """Whether a checkpoint says that pooling belongs to it."""
    return (root / MODULES).is_file() and any(
        str(entry.get("type", "")).endswith(".Pooling") for entry in _entries(root))


def _entries(root: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((root / MODULES).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{root / MODULES} is not readable JSON: {error}",
                              hint="fetch the checkpoint again") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise CheckpointError(f"{root / MODULES} holds no list of modules",
                              hint="fetch the checkpoint again")
    return sorted(found, key=lambda entry: int(entry.get("idx", 0)))


def steps(root: Path) -> tuple[Step, ...]:
    """What follows the encoder, in order.

    Raises:
        UsageError: there is no list of modules, or one that is not known here.
        CheckpointError: damaged, or a module's folder lies outside the checkpoint.
    """
    if not (root / MODULES).is_file():
        raise UsageError(f"{root} has no {MODULES}, so how it pools is not known",
                         allowed="a checkpoint of sentence-transformers",
                         hint="--task feature-extraction")
    kinds, found = [], []
    for entry in _entries(root):
        kind, path = str(entry.get("type", "")).rpartition(".")[2], str(entry.get("path", ""))
        kinds.append(kind)
        require_inside(root, path)
        file = root / path / "config.json"
        found.append(Step(kind, path, read_json(file) if path and file.is_file() else {}))
    unknown = [kind for kind in kinds[1:] if kind not in _KNOWN]
    if kinds[:2] != [_FIRST, "Pooling"] or found[0].path or unknown:
        raise UsageError(f"its modules are {', '.join(kinds)}",
                         allowed=f"{_FIRST}, in the checkpoint's own folder, then Pooling, then any"
                                 f" of {', '.join(_KNOWN[1:])}",
                         hint="--task feature-extraction")
    return tuple(found[1:])


def weight_files(root: Path) -> dict[str, Path]:
    """The files of weights that the modules after the encoder have, by path in the checkpoint."""
    return {name: file for step in steps(root) for name, file in step.weights(root).items()}


def read_weights(root: Path) -> dict[str, TensorRef]:
    """The tensors of :func:`weight_files`, each under its folder's name."""
    return {f"{Path(name).parent.as_posix()}/{key}": ref
            for name, file in weight_files(root).items()
            for key, ref in read_tensors({name: file}).items()}


class Pooling(torch.nn.Module):
    """One vector a text, out of one a token.

    Args:
        modes: ways to pool, whose results are joined; see :data:`_LEGACY`.
    """

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Pooling:
        """By its config, of any version.

        Raises:
            UsageError: a way of pooling that is not known here.
        """
        given = config.get("pooling_mode")
        if given is None:
            given = [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean"
        modes = [given] if isinstance(given, str) else list(given)
        unknown = [mode for mode in modes if mode not in _LEGACY.values()]
        if unknown:
            raise UsageError(f"it pools by {unknown[0]}", allowed=", ".join(_LEGACY.values()),
                             hint="--task feature-extraction")
        return cls(modes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool ``tokens`` [batch, sequence, width] where ``mask`` [batch, sequence] is 1."""
        return torch.cat([self._pooled(mode, tokens, mask) for mode in self.modes], dim=-1)

    def _pooled(self, mode: str, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        if mode == "max":
            return tokens.masked_fill(weights == 0, -torch.inf).amax(1)
        if mode in ("mean", "mean_sqrt_len_tokens"):
            count = weights.sum(1).clamp(min=1e-9)
            return (tokens * weights).sum(1) / (count.sqrt() if "sqrt" in mode else count)
        # Positions from 1, in int32: ONNX Runtime has no ArgMax of int64.
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        first = mask.to(torch.int32).argmax(1, keepdim=True)
        if mode == "weightedmean":
            weights = weights * (positions.unsqueeze(0) - first).unsqueeze(-1).to(tokens.dtype)
            return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        if mode == "cls":
            return _row(tokens, first)
        last = (positions * mask).amax(1, keepdim=True) - 1
        return _row(tokens * weights, last.clamp(min=0))


def _row(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The token at ``index`` [batch, 1] of each row."""
    wide = index.unsqueeze(-1).expand(-1, 1, tokens.shape[-1])
    return torch.gather(tokens, 1, wide).squeeze(1)


class _Dense(torch.nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
        other = {key: value for key, value in config.items()
                 if key in ("use_residual", "module_input_name", "module_output_name")
                 and value not in (False, None, OUTPUT)}
        if name not in _ACTIVATIONS or other:
            raise UsageError(f"a dense layer has {other or name}",
                             allowed=f"a layer of the embedding, then {', '.join(_ACTIVATIONS)}",
                             hint="--task feature-extraction")
        self.linear = torch.nn.Linear(config["in_features"], config["out_features"],
                                      bias=bool(config.get("bias", True)), device="meta")
        self.activation = getattr(torch.nn, name)()

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.linear(vector))
        return result


class Sentences(torch.nn.Module):
    """An encoder with what its checkpoint puts behind it.

    Attributes:
        encoder: a transformers model; its config is this module's.
    """

    main_input_name = "input_ids"

    def __init__(self, encoder: Any, modules: Sequence[Step]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.pooling = Pooling.of(modules[0].config)
        self.steps = torch.nn.ModuleDict({
            str(i): _Dense(step.config) for i, step in enumerate(modules) if step.kind == "Dense"})
        self._kinds = tuple(step.kind for step in modules)
        taken = inspect.signature(encoder.forward).parameters
        self._constants = {"use_cache": False} if "use_cache" in taken else {}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments,
                              **self._constants)["last_hidden_state"]
        vector = self.pooling(states, attention_mask)
        for i, kind in enumerate(self._kinds[1:], 1):
            vector = (self.steps[str(i)](vector) if kind == "Dense"
                      else torch.nn.functional.normalize(vector, p=2.0, dim=-1))
        return {OUTPUT: vector}


def wrapped(found: Found, checkpoint: Checkpoint) -> Found:
    """The encoder's module, and where its weights lie, with what follows the encoder.

    Raises:
        UsageError, CheckpointError: as :func:`steps`.
    """
    modules = steps(checkpoint.root)
    model = Sentences(found.model, modules)
    weights = {f"encoder.{name}": ref for name, ref in found.weights.items()}
    for index, dense in model.steps.items():
        for name, parameter in dense.named_parameters():
            ref = checkpoint.tensors.get(f"{modules[int(index)].path}/{name}")
            if ref is None or ref.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{modules[int(index)].path} holds {name} as {ref and list(ref.shape)}",
                    allowed=f"{list(parameter.shape)}, by its config",
                    hint="fetch the checkpoint again")
            weights[f"steps.{index}.{name}"] = ref
    return replace(found, model=model, weights=weights)


class _Library(torch.nn.Module):
    """sentence-transformers' own model, called with tensors."""

    main_input_name = "input_ids"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model[0].auto_model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        return {OUTPUT: self.model(features)[OUTPUT]}


def original(checkpoint: Checkpoint, attention: Attention) -> torch.nn.Module:
    """The library's own model in float32, which artifacts are compared with.

    Raises:
        BackendUnavailable: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise BackendUnavailable(
            "sentence-transformers is not installed, and its own model is what the export is "
            "compared with", hint='pip install "modelport[sentence-transformers]"') from error
    loading = {"dtype": torch.float32, "attn_implementation": attention, "use_safetensors": True}
    model: Any = SentenceTransformer(
        str(checkpoint.root), device="cpu", local_files_only=True, model_kwargs=loading,
        trust_remote_code=False)
    return _Library(model)
