"""Proof of precision: what the layers of a built engine compute in, as the engine itself says.

A builder that ignores a flag makes a float32 engine without a word. So the request is compared
with the engine inspector's report, layer by layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import ClaimError

_DTYPES = (
    ("bfloat16", r"\bbf16\b|\bbfloat16\b"),
    ("float16", r"\bhalf\b|\bfp16\b|\bfloat16\b"),
    ("float8", r"\bfp8\b|\bfloat8\w*"),
    ("int8", r"\bint8\b"),
    ("int4", r"\bint4\b"),
    ("float32", r"\bfloat\b|\bfp32\b|\bfloat32\b"),
)
"""The inspector's words for a type. It wrote ``Row major linear FP16 format`` up to 10.8, ``Half``
since; integers other than quantised ones say nothing about precision."""

_FIELDS = ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format")
"""Where a tensor's type stands: 10 has one field for layout and type, 11 has two."""

_BOOKKEEPING = re.compile(
    r"^(reformat|constant|shuffle|noop|shape|identity|cast|signal|wait|slice|concat\w*)$", re.I
)
_COMPUTE_TYPE = re.compile(
    r"gemm|mat(rix)?_?mul|conv(?!ert)|attention|mha|einsum|myelin|fully_?connected", re.I)
_COMPUTE_NAME = re.compile(r"gemm|matmul|conv(?!ert)|einsum|foreignnode", re.I)

REDUCED = ("float16", "bfloat16", "float8", "int8", "int4")
LISTED = 40
"""Layers named in an error."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an engine.

    Attributes:
        kind: the inspector's type (``gemm``, ``kgen``, ``CaskConvolution``, …).
        reads: floating-point and quantised types of its inputs and weights.
        writes: those of its outputs.
        multiplies: whether it is a matrix product, convolution or attention, which a lower
            precision is asked for; normalisations and softmax may stay in float32.
    """

    name: str
    kind: str
    reads: frozenset[str]
    writes: frozenset[str]
    multiplies: bool


def parse(text: str) -> tuple[Layer, ...]:
    """Layers from an engine inspector's JSON, of TensorRT 10 or 11.

    Raises:
        ClaimError: it gives names only, as without ``ProfilingVerbosity.DETAILED``.
    """
    try:
        found = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ClaimError("the engine's layer report cannot be read") from error
    if any(isinstance(layer, str) for layer in found):
        raise ClaimError("the engine reports the names of its layers and not their types")
    return tuple(_layer(entry) for entry in found)


def _layer(entry: dict[str, Any]) -> Layer:
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    weights = entry.get("Weights")
    held = {_dtype(str(weights.get("Type", "")))} if isinstance(weights, dict) else set()
    reads = {_tensor_dtype(t) for t in entry.get("Inputs", ())} | held
    writes = {_tensor_dtype(t) for t in entry.get("Outputs", ())}
    tactic = str(entry.get("TacticName", ""))
    multiplies = not _BOOKKEEPING.match(kind) and bool(
        _COMPUTE_TYPE.search(f"{kind} {tactic}") or _COMPUTE_NAME.search(name)
    )
    return Layer(name, kind, frozenset(reads - {""}), frozenset(writes - {""}), multiplies)


def _tensor_dtype(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return _dtype(str(tensor))
    for field in _FIELDS:
        if found := _dtype(str(tensor.get(field, ""))):
            return found
    return ""


def _dtype(text: str) -> str:
    return next((name for name, pattern in _DTYPES if re.search(pattern, text, re.I)), "")


def require(layers: tuple[Layer, ...], wanted: str, where: str) -> dict[str, int]:
    """Compare an engine's layers with the precision asked for.

    float32: no matrix product reads anything less. Otherwise: at least half of the matrix
    products, convolutions and attentions read the type asked for.

    Args:
        wanted: NumPy name of the type, or ``int8``.
        where: engine and profile, for the message.

    Returns:
        The number of those layers by the type they compute in.

    Raises:
        ClaimError: not so, with the layers; or the engine does not say.
    """
    telling = [layer for layer in layers if layer.reads or layer.writes]
    heavy = [layer for layer in telling if layer.multiplies]
    judged = heavy or [layer for layer in telling if not _BOOKKEEPING.match(layer.kind)]
    if not judged:
        raise ClaimError(f"{where} does not say in which types its layers compute",
                         allowed=f"{wanted} for most of them")
    if wanted == "float32":
        wrong = [layer for layer in judged if layer.reads & set(REDUCED)]
        failed = bool(wrong)
    else:
        wrong = [layer for layer in judged if wanted not in layer.reads]
        failed = 2 * len(wrong) > len(judged)
    if failed:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        named = ", ".join(f"{x.name} ({computes(x)})" for x in wrong[:LISTED])
        raise ClaimError(
            f"{len(wrong)} of {len(judged)} layers of {where} do not compute in {wanted}: "
            f"{named}{more}",
            allowed="none" if wanted == "float32" else f"{wanted} in at least half of them",
            hint="modelport doctor, and --dtype fp32 if that is what is wanted",
        )
    return dict(sorted(Counter(computes(layer) for layer in judged).items()))


def computes(layer: Layer) -> str:
    """The least precise type a layer reads, in which it therefore computes."""
    order = ("int4", "int8", "float8", "float16", "bfloat16", "float32")
    found = layer.reads or layer.writes
    return next((name for name in order if name in found), "unknown")
