"""Attention over keys and values kept from token to token, as an operator that appends the new.

MultiHeadAttention of ONNX Runtime where every head has keys of its own. Where heads share them,
GroupQueryAttention, which copies none; but it takes several tokens after a past in one row only, so
beside it, in an If, stands MultiHeadAttention over copies. GroupQueryAttention also sees no later
token whatever the mask says: a model that looks ahead fails parity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._values import HEADS, heads_of, made_by, split

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class States:
    """Queries, keys or values of some tokens.

    Attributes:
        flat: [batch, tokens, heads × size], before positions were put in.
        rotation: the RotaryEmbedding that does, of [batch, heads, tokens, size].
    """

    flat: ir.Value
    heads: int
    rotation: ir.Node | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys or values, those of new tokens behind those of the past.

    Attributes:
        past: [batch, heads, past, size].
        present: with the new tokens, as the graph computes it until now.
        size: of a head.
    """

    past: ir.Value
    new: States
    present: ir.Value
    size: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """int64[1] each: rows, tokens that ask, tokens that are seen; what was seen before, if kept."""

    batch: ir.Value
    queries: ir.Value
    keys: ir.Value
    past: ir.Value | None = None


def states(value: ir.Value | None, heads: int | None = None) -> States | None:
    """What [batch, heads, tokens, size] was made from.

    Args:
        heads: how many there are where the graph does not tell.
    """
    rotation = made_by(value, "RotaryEmbedding")
    cut = split(value if rotation is None else rotation.inputs[0], HEADS)
    if cut is None:
        return None
    heads = heads_of(cut[1], cut[0]) or heads
    return None if heads is None else States(cut[0], heads, rotation)


def cache(value: ir.Value | None) -> Cache | None:
    """The cache that an attention reads its keys or values from, copied for each head or not."""
    copied = made_by(value, "Reshape")
    spread = made_by(copied.inputs[0], "Expand") if copied is not None else None
    apart = made_by(spread.inputs[0], "Unsqueeze") if spread is not None else None
    value = value if apart is None else apart.inputs[0]
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].value not in (2, -2):
        return None
    past, new = joined.inputs[0], states(joined.inputs[1])
    size = past.shape[3] if past is not None and past.shape is not None else None
    if past is None or new is None or value is None or not isinstance(size, int):
        return None
    return Cache(past, new, value, size)


def depends(value: ir.Value | None, on: ir.Value) -> bool:
    """Whether ``value`` is computed from ``on``."""
    waiting, seen = [value], {value}
    while waiting:
        now = waiting.pop()
        if now is on:
            return True
        node = now.producer() if now is not None else None
        more = {v for v in node.inputs if v not in seen} if node is not None else set()
        waiting.extend(more)
        seen |= more
    return False


def turned(before: ir.Node, given: States) -> ir.Value:
    """[batch, tokens, heads × size] with positions put in."""
    from .quantize import insert

    rotation = given.rotation
    if rotation is None:
        return given.flat
    attributes = {name: found.value for name, found in rotation.attributes.items()}
    node = insert(before, "RotaryEmbedding", [given.flat, *rotation.inputs[1:]],
                  {**attributes, "num_heads": given.heads},
                  name=f"{rotation.outputs[0].name}:flat", domain=rotation.domain)
    return node.outputs[0]


def lengths(
    model: ir.Model, before: ir.Node, query: States, key: States | ir.Value | Cache
) -> Lengths:
    """How many rows and tokens there are at run time."""
    import numpy as np

    from .quantize import constant, insert

    def length(value: ir.Value, axis: int) -> ir.Value:
        shape = insert(before, "Shape", [value], name=f"{value.name}.shape")
        place = constant(model, f"attention:axis{axis}", np.array([axis], np.int64))
        return insert(before, "Gather", [shape.outputs[0], place], {"axis": 0},
                      name=f"{value.name}.length{axis}").outputs[0]

    batch, queries = length(query.flat, 0), length(query.flat, 1)
    if isinstance(key, States):
        return Lengths(batch, queries, length(key.flat, 1))
    if not isinstance(key, Cache):
        return Lengths(batch, queries, length(key, 2))
    past, new = length(key.past, 2), length(key.new.flat, 1)
    total = insert(before, "Add", [past, new], name=f"{key.past.name}.total").outputs[0]
    return Lengths(batch, queries, total, past)


def write(model: ir.Model, before: ir.Node, query: States, caches: tuple[Cache, Cache],
          bias: ir.Value | None, scale: float, told: Lengths) -> ir.Value:
    """Insert the attention, let its caches be the graph's; its result, [batch, queries, width]."""
    import onnx_ir as ir

    key, value = caches
    given = [turned(before, states) for states in (query, key.new, value.new)]
    pasts = [one.past for one in caches]
    name = f"{key.present.name}:attention"
    if query.heads == key.new.heads:
        node = ir.node(
            "MultiHeadAttention", [*given, None, None, bias, *pasts],
            {"num_heads": query.heads, "scale": scale}, domain="com.microsoft", num_outputs=3)
    else:
        tokens = _counts(model, before, told, name)
        grouped = ir.node(
            "GroupQueryAttention", [*given, *pasts, *tokens, None, None, None, bias],
            {"num_heads": query.heads, "kv_num_heads": key.new.heads, "scale": scale},
            domain="com.microsoft", num_outputs=3)
        node = ir.node("If", [_fits(model, before, told, name)], {
            "then_branch": _branch([grouped], list(grouped.outputs), f"{name}:grouped"),
            "else_branch": _copied(model, given, query.heads, caches, bias, scale, name),
        }, num_outputs=3)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    made = list(node.outputs)
    made[0].name = f"{name}:result"
    for number, (one, new) in enumerate(zip(caches, made[1:], strict=True)):
        new.name, new.type, new.shape = f"{name}:{number}", one.present.type, one.present.shape
        one.present.replace_all_uses_with(new, replace_graph_outputs=True)
        one.present.name, new.name = new.name, one.present.name
    return made[0]


def _counts(
    model: ir.Model, before: ir.Node, told: Lengths, name: str
) -> tuple[ir.Value, ir.Value]:
    """Index of each row's last key, int32[batch], and the number of keys, int32[]."""
    import numpy as np
    import onnx_ir as ir

    from .quantize import constant, insert

    one = constant(model, "attention:one", np.array([1], np.int64))
    to = {"to": int(ir.DataType.INT32)}
    last = insert(before, "Sub", [told.keys, one], name=f"{name}:last")
    each = insert(before, "Expand", [last.outputs[0], told.batch], name=f"{name}:each")
    ends = insert(before, "Cast", each.outputs, to, name=f"{name}:ends")
    total = insert(before, "Squeeze", [told.keys], name=f"{name}:keys")
    count = insert(before, "Cast", total.outputs, to, name=f"{name}:count")
    return ends.outputs[0], count.outputs[0]


def _fits(model: ir.Model, before: ir.Node, told: Lengths, name: str) -> ir.Value:
    """Whether GroupQueryAttention takes it: one row, or one token, or no past."""
    import numpy as np

    from .quantize import constant, insert

    one = constant(model, "attention:one", np.array([1], np.int64))
    none = constant(model, "attention:none", np.array([0], np.int64))
    rows = insert(before, "Equal", [told.batch, one], name=f"{name}:one row").outputs[0]
    tokens = insert(before, "Equal", [told.queries, one], name=f"{name}:one token").outputs[0]
    fresh = insert(before, "Equal", [told.past, none], name=f"{name}:no past").outputs[0]
    either = insert(before, "Or", [rows, tokens], name=f"{name}:either").outputs[0]
    return insert(before, "Or", [either, fresh], name=f"{name}:fits").outputs[0]


def _copied(model: ir.Model, given: list[ir.Value], heads: int, caches: tuple[Cache, Cache],
            bias: ir.Value | None, scale: float, name: str) -> ir.Graph:
    """MultiHeadAttention over keys and values that are copied for each head."""
    import numpy as np
    import onnx_ir as ir

    from .quantize import constant

    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[Any], label: str, domain: str = "", **attributes: Any
            ) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes, domain=domain))
        nodes[-1].outputs[0].name = f"{name}:{label}"
        return nodes[-1].outputs[0]

    presents, copies = [], []
    for label, one, new in zip(("key", "value"), caches, given[1:], strict=True):
        kept, size = one.new.heads, one.size
        shapes = {"cut": (0, 0, kept, size), "apart": (0, kept, 1, -1, size),
                  "times": (1, 1, heads // kept, 1, 1), "joined": (0, heads, -1, size)}
        to = {part: constant(model, f"attention:{part}:{heads}:{kept}:{size}",
                             np.array(shape, np.int64)) for part, shape in shapes.items()}
        cut = add("Reshape", [new, to["cut"]], f"{label}:cut")
        moved = add("Transpose", [cut], f"{label}:moved", perm=list(HEADS))
        present = add("Concat", [one.past, moved], f"{label}:present", axis=2)
        apart = add("Reshape", [present, to["apart"]], f"{label}:apart")
        spread = add("Expand", [apart, to["times"]], f"{label}:spread")
        presents.append(present)
        copies.append(add("Reshape", [spread, to["joined"]], f"{label}:copied"))
    result = add("MultiHeadAttention", [given[0], *copies, None, None, bias], "copied",
                 domain="com.microsoft", num_heads=heads, scale=scale)
    return _branch(nodes, [result, *presents], f"{name}:copied")


def _branch(nodes: list[ir.Node], outputs: list[ir.Value], name: str) -> ir.Graph:
    import onnx_ir as ir

    for number, value in enumerate(outputs):
        value.name = value.name or f"{name}:{number}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], outputs, nodes=nodes, name=name)
