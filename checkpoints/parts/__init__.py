"""The graphs that a generating model is made of, one file for each kind of model.

A kind is what :attr:`~..tasks.Task.parts` of a task names. Its ``parts(model, root, dtype)`` wraps
the model's own submodules; it is applied to the module that is captured and to the reference.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import torch

    from ...spec import ModelSpec
    from ..model import Dtype


ENCODER, DECODER = "encoder", "decoder"
"""Components with the same part to play in several kinds of model."""

PAST, TOTAL = "past", "past+sequence"
"""Lengths of a cache before and after a step."""

KEEP = "logits_to_keep"
"""Input of a decoder: for how many of the last positions there are to be logits; 0 for all."""


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of a model.

    Attributes:
        name: of its component in an artifact; its file is ``NAME.onnx``.
        spec: inputs, outputs and dynamic dimensions.
        module: ``forward(*tensors)`` takes ``spec.inputs`` in order and returns a tuple of
            ``spec.outputs`` in order. It holds the model's own parameters, not copies.
        samples: example feeds, as :attr:`~..model.LoadedModel.samples`.
    """

    name: str
    spec: ModelSpec
    module: torch.nn.Module
    samples: Mapping[str, np.ndarray]


def parts(model: Any, root: Path, task: str, dtype: Dtype) -> tuple[Part, ...]:
    """The parts of a transformers model; none where one forward pass performs the task.

    Args:
        root: directory of its config.
        dtype: of floating-point inputs.

    Raises:
        UsageError: the model is not of the kind that the task needs.
    """
    kind = TASKS[task].parts
    if kind is None:
        return ()
    made = importlib.import_module(f".{kind}", __name__).parts(model, root, dtype)
    return tuple(made)
