"""Weights alone in 8 or 4 bits, with a step for each block of inputs: MatMulNBits of ONNX Runtime.

A block's step is its value of largest magnitude over -128 or -8, so that every level is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _graph

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from ._layers import Layer

BLOCK = {8: 128, 4: 32}
"""Inputs that share a step, by bits: measured on a CPU with VNNI at one row, the fastest of 32, 128
and 256 in 8 bits; in 4 bits the finest of what is fast."""

ACCURACY = 4
"""``accuracy_level`` of the operator: the runtime rounds activations to int8, block by block. In 8
bits nothing else gains anything: its kernel for float32 was ten times slower than a float product.
"""

PIECE = 1 << 20
"""Elements of a weight looked at together."""


def blob(layer: Layer, bits: int) -> tuple[int, int, int]:
    """Shape of the packed weight: outputs, blocks, bytes of a block."""
    block = BLOCK[bits]
    return layer.outputs, -(-layer.inputs // block), block * bits // 8


def packed(layer: Layer, bits: int) -> np.ndarray:
    """The weight as MatMulNBits stores it, in unsigned levels around ``2 ** (bits - 1)``."""
    import numpy as np

    out = np.empty(blob(layer, bits), np.uint8)
    for rows, columns, piece in _pieces(layer, bits):
        levels = _levels(piece, _steps(piece, bits), bits) + 2 ** (bits - 1)
        stored = levels.astype(np.uint8)
        out[rows, columns] = stored if bits == 8 else stored[..., ::2] | stored[..., 1::2] << 4
    return out


def steps(layer: Layer, bits: int) -> np.ndarray:
    """Step of each block, [outputs, blocks]; 1 for a block of zeros."""
    import numpy as np

    out = np.empty(blob(layer, bits)[:2], np.float32)
    for rows, columns, piece in _pieces(layer, bits):
        out[rows, columns] = _steps(piece, bits)
    return out


def rounded(layer: Layer, bits: int) -> np.ndarray:
    """The weight [inputs, outputs] in float32 as the operator reads it back."""
    import numpy as np

    out = np.empty((*blob(layer, bits)[:2], BLOCK[bits]), np.float32)
    for rows, columns, piece in _pieces(layer, bits):
        step = _steps(piece, bits)
        out[rows, columns] = _levels(piece, step, bits) * step[..., None]
    return np.asarray(out.reshape(len(out), -1)[:, : layer.inputs].T)


def inputs(flat: np.ndarray, bits: int) -> np.ndarray:
    """Rows of activations as the runtime rounds them: int8 around 0, a step for each block."""
    import numpy as np

    block, width = BLOCK[bits], flat.shape[1]
    padded = np.pad(flat, ((0, 0), (0, -width % block))).reshape(len(flat), -1, block)
    step = np.abs(padded).max(axis=-1, keepdims=True) / np.float32(127)
    step = np.where(step > 0, step, 1)
    return np.asarray((np.rint(padded / step) * step).reshape(len(flat), -1)[:, :width])


def _pieces(layer: Layer, bits: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Parts of the weight as [outputs, blocks, block], and where each belongs; padded with 0."""
    import numpy as np

    block = BLOCK[bits]
    done = 0
    if layer.transposed:
        for flat in _graph.blocks(layer.tensor, PIECE):
            rows = flat.reshape(-1, layer.inputs)
            padded = np.pad(rows, ((0, 0), (0, -layer.inputs % block)))
            yield slice(done, done + len(rows)), slice(None), padded.reshape(len(rows), -1, block)
            done += len(rows)
        return
    whole = block * layer.outputs
    for flat in _graph.blocks(layer.tensor, max(1, PIECE // whole) * whole):
        columns = flat.reshape(-1, layer.outputs)
        padded = np.pad(columns, ((0, -len(columns) % block), (0, 0)))
        piece = padded.reshape(-1, block, layer.outputs).transpose(2, 0, 1)
        yield slice(None), slice(done, done + piece.shape[1]), piece
        done += piece.shape[1]


def _steps(piece: np.ndarray, bits: int) -> np.ndarray:
    import numpy as np

    largest = np.abs(piece).argmax(axis=-1)[..., None]
    step = np.take_along_axis(piece, largest, axis=-1)[..., 0] / np.float32(-(2 ** (bits - 1)))
    return np.where(step != 0, step, 1).astype(np.float32)


def _levels(piece: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    import numpy as np

    half = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(piece / step[..., None]), -half, half - 1))
