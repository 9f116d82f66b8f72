"""Padding with zeros that stays zeros where ONNX Runtime would take it for the pool's own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def keep_zeros(graph: ir.Model) -> None:
    """Pad with -0.0 before a MaxPool.

    ONNX Runtime merges the two where every byte of the padding is zero, and the pool's own padding
    is minus infinity: a border of negative numbers comes out negative instead of zero.
    """
    for pool in graph.graph.all_nodes():
        pad = pool.inputs[0].producer() if pool.op_type == "MaxPool" and pool.inputs[0] else None
        if pad is None or pad.op_type != "Pad" or len(pad.inputs) < 3 or pad.inputs[2] is None:
            continue
        filled = ir.convenience.get_const_tensor(pad.inputs[2])
        if filled is None or filled.numpy().any() or not filled.dtype.is_floating_point():
            continue
        negative = np.copysign(filled.numpy(), -1)
        held = ir.node("Constant", [], {"value": ir.tensor(negative)})
        assert pad.graph is not None
        pad.graph.insert_before(pad, held)
        pad.replace_input_with(2, held.outputs[0])
