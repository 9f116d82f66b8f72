"""Faults to put into real models, one at a time: what a wrong export looks like.

Three kinds. Weight faults change arrays and fit a graph's initializers and a module's parameters
alike, since both go by the same names; graph faults rewire an ONNX graph; module faults change a
torch module, as a faulty patch or a forgotten mode would. Each returns where the fault sits, as
the torch name of a module, or an empty string where it sits in no single place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from modelport.artifacts import Artifact
    from modelport.spec import ModelSpec

LAYER = 1
"""Index of the layer that is spoilt: the middle one of three."""

Arrays = dict[str, np.ndarray]


class AbsentError(Exception):
    """The architecture has nothing that this fault could be put into."""


def layer_names(names: Any, index: int = LAYER) -> list[str]:
    """Names that belong to one layer, in their order."""
    found = [n for n in names if re.search(rf"\.(layer|layers|h)\.{index}\.", n)]
    if not found:
        raise AbsentError(f"there is no layer {index}")
    return found


def _first(found: list[Any]) -> Any:
    if not found:
        raise AbsentError
    return found[0]


def _norm(name: str) -> bool:
    return bool(re.search(r"(norm|ln_\d|ln_f|LayerNorm)", name))


# --- weights ------------------------------------------------------------------------------------


def _bias(arrays: Arrays) -> str:
    names = [n for n in layer_names(arrays) if n.endswith(".bias") and not _norm(n)]
    value = [n for n in names if re.search(r"value|v_lin|v_proj|c_attn", n)]
    return str(_first(value or names))


def _square(arrays: Arrays) -> str:
    return str(_first([n for n in layer_names(arrays) if arrays[n].ndim == 2
                       and arrays[n].shape[0] == arrays[n].shape[1]]))


def _matrix(arrays: Arrays) -> str:
    return str(_first([n for n in layer_names(arrays) if arrays[n].ndim == 2
                       and re.search(r"intermediate|lin1|fc1|c_fc", n)]))


def _words(arrays: Arrays) -> str:
    tables = r"word_embeddings|wte|lm_head\.decoder\.weight|patch_embeddings\.projection\.weight"
    return str(_first([n for n in arrays if re.search(tables, n)]))


def _one(name: str, value: np.ndarray, edit: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    return {name: np.ascontiguousarray(edit(value.copy()))}


def _put(index: int, edit: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(value: np.ndarray) -> np.ndarray:
        value.reshape(-1)[index] = edit(value.reshape(-1)[index])
        return value

    return changed


def _other_layer(arrays: Arrays) -> Arrays:
    name = _matrix(arrays)
    return {name: arrays[name.replace(f".{LAYER}.", f".{LAYER - 1}.", 1)].copy()}


def _positions(arrays: Arrays) -> Arrays:
    name = _first([n for n in arrays if re.search(r"position_embeddings|wpe|rel_embeddings", n)])
    return _one(name, arrays[name], lambda v: np.roll(v, 1, axis=v.ndim - 2))


def _keys_and_values(arrays: Arrays) -> Arrays:
    found = {}
    for first, second in (("key", "value"), ("k_lin", "v_lin"), ("k_proj", "v_proj")):
        for name in layer_names(arrays):
            if re.search(rf"\b{first}(_proj)?\.(weight|bias)$", name):
                other = re.sub(rf"\b{first}", second, name)
                found |= {name: arrays[other].copy(), other: arrays[name].copy()}
    if not found:
        raise AbsentError
    return found


def _heads(arrays: Arrays) -> Arrays:
    name = _square(arrays)
    width = arrays[name].shape[0] // 4
    order = np.r_[width : 2 * width, :width, 2 * width : 4 * width]
    return _one(name, arrays[name], lambda v: v[order])


WEIGHTS: Mapping[str, Callable[[Arrays], Arrays]] = {
    "dropped bias": lambda a: _one(_bias(a), a[_bias(a)], np.zeros_like),
    "sign flip in one bias": lambda a: _one(_bias(a), a[_bias(a)], _put(3, lambda x: -x)),
    "transposed weight": lambda a: _one(_square(a), a[_square(a)], lambda v: v.T),
    "head order": _heads,
    "keys and values swapped": _keys_and_values,
    "one weight NaN": lambda a: _one(_matrix(a), a[_matrix(a)], _put(5, lambda x: np.nan)),
    "one weight infinite": lambda a: _one(_matrix(a), a[_matrix(a)], _put(5, lambda x: np.inf)),
    "one weight zero": lambda a: _one(_matrix(a), a[_matrix(a)], _put(5, lambda x: 0.0)),
    "one weight through float16": lambda a: _one(
        _matrix(a), a[_matrix(a)], lambda v: v.astype(np.float16).astype(np.float32)),
    "weight of another layer": _other_layer,
    "embedding channel x 1.01": lambda a: _one(
        _words(a), a[_words(a)], _put_row(lambda v: v * np.float32(1.01), axis=1)),
    "last embedding row zero": lambda a: _one(
        _words(a), a[_words(a)], _put_row(lambda v: 0 * v, axis=0)),
    "positions off by one": _positions,
}  # fmt: skip


def _put_row(
    edit: Callable[[np.ndarray], np.ndarray], axis: int
) -> Callable[[np.ndarray], np.ndarray]:
    def changed(value: np.ndarray) -> np.ndarray:
        at = (slice(None),) * axis + (-1,)
        value[at] = edit(value[at])
        return value

    return changed


# --- graphs -------------------------------------------------------------------------------------


class Graph:
    """An ONNX graph and what is known of the model it came from."""

    def __init__(self, model: ir.Model, spec: ModelSpec, traced: Mapping[str, int]) -> None:
        self.graph = model.graph
        self.spec = spec
        self.traced = traced

    def nodes(self, op_type: str, *, layer: int | None = None, after: str = "") -> list[ir.Node]:
        found = [n for n in self.graph if n.op_type == op_type and after in (n.name or "")]
        if layer is None:
            return found
        return [n for n in found if re.search(rf"/(layer|layers|h)\.{layer}/", n.name or "")]

    def node(self, op_type: str, **where: Any) -> ir.Node:
        return _first(self.nodes(op_type, **where))

    def add(self, op_type: str, inputs: list[Any], scope: str = "", **attributes: Any) -> ir.Value:
        """A new node whose inputs are values or arrays; returns its output."""
        values = [self.constant(v) if isinstance(v, np.ndarray) else v for v in inputs]
        node = ir.node(op_type, values, attributes)
        self.graph.append(node)
        node.name = f"{scope}/wrong_{len(self.graph)}"
        node.outputs[0].name = f"{node.name}_output"
        return node.outputs[0]

    def constant(self, value: np.ndarray) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(value)})
        self.graph.append(node)
        node.name = f"constant_{len(self.graph)}"
        node.outputs[0].name = f"{node.name}_output"
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new``."""
        self.reroute(old, new, list(old.uses()))

    def wrap(self, value: ir.Value, build: Callable[[ir.Value], ir.Value]) -> None:
        """Put something computed from ``value`` in its place."""
        users = list(value.uses())
        self.reroute(value, build(value), users)

    def reroute(self, old: ir.Value, new: ir.Value, users: list[Any]) -> None:
        """Let these users, and the graph's output if it is one, read ``new``."""
        for user, index in users:
            user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                name, old.name = old.name, f"{old.name}_before"
                new.name, new.dtype, new.shape = name, old.dtype, old.shape
                self.graph.outputs[index] = new

    def mask(self) -> ir.Value:
        names = [t.name for t in self.spec.inputs if t.role == "mask"]
        return _first([v for v in self.graph.inputs if v.name in names])

    def ids(self) -> ir.Value:
        names = [t.name for t in self.spec.inputs if t.role == "tokens"]
        return _first([v for v in self.graph.inputs if v.name in names])

    def norms(self, layer: int = LAYER) -> list[ir.Node]:
        return self.nodes("LayerNormalization", layer=layer)


def scope_of(node: ir.Node) -> str:
    """The torch name of the module a node was traced in."""
    return (node.name or "").rpartition("/")[0].replace("/", ".").removeprefix(".")


def _scope(node: ir.Node) -> str:
    return (node.name or "").rpartition("/")[0]


def _swapped_inputs(g: Graph) -> str:
    if len(g.graph.inputs) > 1:
        first, second = g.graph.inputs[-2:]
        uses = list(first.uses()), list(second.uses())
        for found, new in zip(uses, (second, first), strict=True):
            for user, index in found:
                user.replace_input_with(index, new)
        return ""
    (pixels,) = g.graph.inputs  # red and blue
    g.wrap(pixels, lambda v: g.add("Gather", [v, np.array([2, 1, 0])], axis=1))
    return ""


def _frozen(axis: int, dim: str) -> Callable[[Graph], str]:
    """A size read from a shape while running becomes the size that tracing saw."""

    def edit(g: Graph) -> str:
        if dim not in g.traced:
            raise AbsentError
        found = ""
        for node in g.nodes("Gather", layer=LAYER):
            source, index = node.inputs[0], node.inputs[1]
            if source is None or index is None or source.producer() is None:
                continue
            constant = index.producer()
            if source.producer().op_type != "Shape" or constant is None:
                continue
            value = constant.attributes["value"].as_tensor().numpy()
            if value.size == 1 and int(value.reshape(-1)[0]) == axis:
                g.replace(node.outputs[0], g.constant(np.array(g.traced[dim])))
                found = scope_of(node)
        if not found:
            raise AbsentError
        return found

    return edit


def _mask_cut(g: Graph) -> str:
    """What lies beyond the traced length is taken for padding; no shape gives it away."""

    def build(mask: ir.Value) -> ir.Value:
        ones = g.add("Add", [g.add("Mul", [mask, np.array(0)]), np.array(1)])
        places = g.add("CumSum", [ones, np.array(1)])
        inside = g.add("LessOrEqual", [places, np.array(g.traced["sequence"])])
        return g.add("Mul", [mask, g.add("Cast", [inside], to=7)])

    g.wrap(g.mask(), build)
    return ""


def _gelu(g: Graph) -> tuple[ir.Value, ir.Value, str]:
    """Argument and result of the activation in the spoilt layer, and which kind it is."""
    erf = g.nodes("Erf", layer=LAYER)
    if erf:
        x = erf[0].inputs[0].producer().inputs[0]
        last = erf[0]
        for _ in range(3):
            last = last.outputs[0].consumers()[0]
        return x, last.outputs[0], "erf"
    tanh = g.node("Tanh", layer=LAYER)
    x = g.node("Pow", layer=LAYER).inputs[0]
    return x, tanh.outputs[0].consumers()[0].outputs[0].consumers()[0].outputs[0], "tanh"


def _other_gelu(g: Graph) -> str:
    x, result, kind = _gelu(g)
    node = result.producer()
    scope = _scope(node)

    def number(value: float) -> np.ndarray:
        return np.array(value, np.float32)

    if kind == "erf":
        cube = g.add("Mul", [g.add("Mul", [x, x], scope), x], scope)
        inner = g.add("Add", [x, g.add("Mul", [cube, number(0.044715)], scope)], scope)
        bent = g.add("Tanh", [g.add("Mul", [inner, number((2 / np.pi) ** 0.5)], scope)], scope)
    else:
        bent = g.add("Erf", [g.add("Mul", [x, number(0.5**0.5)], scope)], scope)
    half = g.add("Mul", [x, number(0.5)], scope)
    g.replace(result, g.add("Mul", [half, g.add("Add", [bent, number(1.0)], scope)], scope))
    return scope_of(node)


def _relu(g: Graph) -> str:
    x, result, _ = _gelu(g)
    node = result.producer()
    g.replace(result, g.add("Relu", [x], _scope(node)))
    return scope_of(node)


def _epsilon(value: float) -> Callable[[Graph], str]:
    def edit(g: Graph) -> str:
        node = _first(g.norms())
        if node.attributes["epsilon"].value >= value / 2:
            raise AbsentError
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", value)
        return scope_of(node)

    return edit


def _attention_scale(factor: float) -> Callable[[Graph], str]:
    def edit(g: Graph) -> str:
        softmax = g.node("Softmax", layer=LAYER)
        scale = np.array(factor, np.float32)
        queue = [softmax.inputs[0]]
        while queue:
            value = queue.pop(0)
            node = value.producer() if value is not None else None
            if node is None:
                continue
            if node.op_type == "MatMul":
                g.wrap(node.outputs[0], lambda v: g.add("Mul", [v, scale], _scope(softmax)))
                return scope_of(softmax)
            queue.extend(node.inputs)
        raise AbsentError

    return edit


def _causal(g: Graph) -> str:
    node = g.node("LessOrEqual")
    g.wrap(node.outputs[0], lambda v: g.add("Or", [v, g.add("Not", [v])]))
    return ""


def _ignored_mask(g: Graph) -> str:
    g.wrap(g.mask(), lambda v: g.add("Add", [g.add("Mul", [v, np.array(0)]), np.array(1)]))
    return ""


def _ignored_types(g: Graph) -> str:
    value = _first([v for v in g.graph.inputs if v.name == "token_type_ids"])
    g.wrap(value, lambda v: g.add("Mul", [v, np.array(0)]))
    return ""


def _weak_mask(g: Graph) -> str:
    """Padding is made unlikely instead of impossible."""
    softmax = g.node("Softmax", layer=LAYER)
    low = np.array(-4.0, np.float32)
    add = softmax.inputs[0].producer()
    if add is None or add.op_type != "Add":
        raise AbsentError
    bias = add.inputs[1]
    add.replace_input_with(1, g.add("Max", [bias, low], _scope(softmax)))
    return scope_of(softmax)


def _swapped_outputs(g: Graph) -> str:
    if len(g.graph.outputs) < 2:
        raise AbsentError
    first, second = g.graph.outputs[:2]
    one, other = first.name, second.name
    first.name = "between"
    first.name, second.name = other, one
    g.graph.outputs[0], g.graph.outputs[1] = second, first
    return ""


def _output_order(g: Graph) -> str:
    if len(g.graph.outputs) < 2:
        raise AbsentError
    first, second = g.graph.outputs[:2]
    g.graph.outputs[0], g.graph.outputs[1] = second, first
    return ""


def _missing_output(g: Graph) -> str:
    if len(g.graph.outputs) < 2:
        raise AbsentError
    del g.graph.outputs[1]
    return ""


def _int32(g: Graph) -> str:
    """Ids go through a product that fits 64 bits and not 32."""
    by = np.array(1 << 25)

    def build(ids: ir.Value) -> ir.Value:
        narrow = g.add("Cast", [g.add("Mul", [ids, by])], to=6)
        wide = g.add("Div", [g.add("Cast", [narrow], to=7), by])
        # Wrapped ids stay inside the table, as an index computed in 32 bits would.
        return g.add("Abs", [wide])

    g.wrap(g.ids(), build)
    return ""


def _dropped_layer(g: Graph) -> str:
    """The next layer reads what this one reads."""
    ends = {}
    for index in (LAYER - 1, LAYER):
        inside = {n for n in g.graph if re.search(rf"/(layer|layers|h)\.{index}/", n.name or "")}
        # What leaves a layer along the residual stream is read by float arithmetic outside it.
        leaving = [n for n in inside if n.op_type in ("LayerNormalization", "Add")
                   and any(u not in inside and u.op_type != "Shape"
                           for o in n.outputs for u in o.consumers())]
        order = {n: i for i, n in enumerate(g.graph)}
        ends[index] = max(leaving, key=lambda n: order[n])
    last = ends[LAYER]
    g.replace(last.outputs[0], ends[LAYER - 1].outputs[0])
    layer = re.search(r"^.*\.(layer|layers|h)\.\d+", scope_of(last) + ".")
    assert layer
    return layer[0]


def _softmax_axis(g: Graph) -> str:
    node = g.node("Softmax", layer=LAYER)
    node.attributes["axis"] = ir.AttrInt64("axis", -2)
    return scope_of(node)


def _skipped_norm(g: Graph) -> str:
    node = g.norms(LAYER + 1)[-1]
    g.replace(node.outputs[0], node.inputs[0])
    return scope_of(node)


def _dropped_residual(g: Graph) -> str:
    for node in g.nodes("Add", layer=LAYER):
        weights = [v for v in node.inputs if v is not None and v.is_initializer()]
        if weights or not (node.name or "").endswith(("/Add", "/Add_1")):
            continue
        producers = [v.producer() for v in node.inputs if v is not None]
        if all(p is not None and p.op_type in ("Add", "LayerNormalization", "Reshape", "Mul")
               for p in producers) and not scope_of(node).endswith(("self", "attn", "act")):
            ours = [v for v in node.inputs if _scope(v.producer()).startswith(_scope(node))]
            if len(ours) == 1:
                g.replace(node.outputs[0], ours[0])
                return scope_of(node)
    raise AbsentError


def _padding_id(g: Graph) -> str:
    for node in g.nodes("Equal"):
        if node.inputs[0] is g.ids():
            node.replace_input_with(1, g.constant(np.array(2)))
            return ""
    raise AbsentError


def _cast_output(*types: int) -> Callable[[Graph], str]:
    def edit(g: Graph) -> str:
        old = new = g.graph.outputs[0]
        for kind in types:
            new = g.add("Cast", [new], to=kind)
        g.reroute(old, new, [])
        g.graph.outputs[0].dtype = ir.DataType(types[-1])
        return ""

    return edit


def _dropout(g: Graph) -> str:
    """ONNX Runtime removes a Dropout node whatever it says, so it is written out."""
    node = g.norms()[0]
    scope = _scope(node)

    def build(v: ir.Value) -> ir.Value:
        draw = g.add("RandomUniformLike", [v], scope, dtype=1)
        keep = g.add("Greater", [draw, np.array(0.1, np.float32)], scope)
        return g.add("Mul", [v, g.add("Cast", [keep], scope, to=1)], scope)

    g.wrap(node.outputs[0], build)
    return scope_of(node)


def _pooled_elsewhere(g: Graph) -> str:
    for node in reversed(g.nodes("Gather")):
        index = node.inputs[1].producer() if node.inputs[1] is not None else None
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if index is None or source is None or source.op_type != "LayerNormalization":
            continue
        node.replace_input_with(1, g.constant(np.array(-1)))
        return scope_of(node)
    raise AbsentError


GRAPHS: dict[str, Callable[[Graph], str]] = {
    "swapped inputs": _swapped_inputs,
    "frozen batch": _frozen(0, "batch"),
    "frozen sequence": _frozen(1, "sequence"),
    "mask cut at the traced length": _mask_cut,
    "ignored attention mask": _ignored_mask,
    "weak attention mask": _weak_mask,
    "missing causal mask": _causal,
    "ignored token types": _ignored_types,
    "wrong padding id": _padding_id,
    "int64 to int32": _int32,
    "the other GELU": _other_gelu,
    "ReLU for GELU": _relu,
    "LayerNorm eps 1e-3": _epsilon(1e-3),
    "last LayerNorm skipped": _skipped_norm,
    "attention scale x 1.01": _attention_scale(1.01),
    "softmax axis": _softmax_axis,
    "dropped residual": _dropped_residual,
    "dropped layer": _dropped_layer,
    "dropout left on": _dropout,
    "pooled at the last position": _pooled_elsewhere,
    "outputs swapped": _swapped_outputs,
    "output order": _output_order,
    "missing output": _missing_output,
    "float64 output": _cast_output(11),
    "output through float16": _cast_output(10, 1),
}

FAINT: dict[str, Callable[[Graph], str]] = {"LayerNorm eps 1e-5": _epsilon(1e-5)}
"""Faults no larger than rounding where the variance is large: reported, and nothing is claimed."""


def spoil(artifact: Artifact, name: str, out: Path) -> str:
    """Write a copy of an ONNX artifact's graph with one fault; returns where it sits.

    Raises:
        AbsentError: this architecture cannot have the fault.
    """
    from modelport.artifacts import onnx_files

    model = onnx_files.load(artifact.root)
    if name in WEIGHTS:
        where = _spoil_weights(model.graph, WEIGHTS[name])
    else:
        where = (GRAPHS | FAINT)[name](
            Graph(model, artifact.spec, artifact.manifest.facts["traced"]))
        model.graph.sort()
    out.mkdir(parents=True)
    onnx_files.save(model, out)
    return where


def _spoil_weights(graph: ir.Graph, edit: Callable[[Arrays], Arrays]) -> str:
    arrays = {n: v.const_value.numpy() for n, v in graph.initializers.items()
              if v.const_value is not None}
    changed = edit(arrays)
    for name, value in changed.items():
        graph.initializers[name].const_value = ir.tensor(value, name=name)
    first = next(n for n in arrays if n in changed)
    return first.rpartition(".")[0]


# --- modules ------------------------------------------------------------------------------------


def _module(module: Any, pattern: str) -> tuple[str, Any]:
    found = dict(module.named_modules())
    return _first([(n, m) for n, m in found.items() if re.search(pattern, n)])


def _module_layer(module: Any) -> tuple[str, Any]:
    return _module(module, rf"\.(layer|layers|h)\.{LAYER}$")


def _put_module(module: Any, name: str, new: Any) -> str:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, new)
    return name


def _module_gelu(module: Any) -> str:
    from torch import nn

    name, old = _module(module, rf"\.{LAYER}\..*(act_fn|activation_fn|activation|\bact)$")
    new = nn.GELU() if "New" in type(old).__name__ else nn.GELU(approximate="tanh")
    return _put_module(module, name, new)


def _module_epsilon(module: Any) -> str:
    from torch import nn

    _, layer = _module_layer(module)
    norm = _first([m for m in layer.modules() if isinstance(m, nn.LayerNorm)])
    norm.eps = 1e-3
    return ""


def _module_scale(module: Any) -> str:
    _, layer = _module_layer(module)
    name, owner = _first([(n, m) for n, m in layer.named_modules() if hasattr(m, "scaling")])
    owner.scaling = owner.scaling * 1.01
    return str(name)


def _module_layer_dropped(module: Any) -> str:
    name, layer = _module_layer(module)
    layer.forward = lambda hidden_states, *_, **__: (
        (hidden_states, None) if "deberta" in type(layer).__module__ else hidden_states)
    return name


def _module_norm_skipped(module: Any) -> str:
    from torch import nn

    name, _ = _first([(n, m) for n, m in module.named_modules()
                      if isinstance(m, nn.LayerNorm) and f".{LAYER}." in n])
    return _put_module(module, name, nn.Identity())


def _training(module: Any) -> str:
    if not any(getattr(m, "p", 0) for m in module.modules()):
        raise AbsentError  # no dropout, no difference
    module.train()
    return ""


MODULES: Mapping[str, Callable[[Any], str]] = {
    "the other GELU": _module_gelu,
    "LayerNorm eps 1e-3": _module_epsilon,
    "attention scale x 1.01": _module_scale,
    "dropped layer": _module_layer_dropped,
    "LayerNorm skipped": _module_norm_skipped,
    "training mode": _training,
}


def spoil_module(module: Any, name: str) -> str:
    """Put one fault, of weights or of the module, into a torch module in place.

    Raises:
        AbsentError: this architecture cannot have the fault.
    """
    import torch

    if name in MODULES:
        return MODULES[name](module)
    parameters = dict(module.named_parameters())
    arrays = {n: p.detach().numpy() for n, p in parameters.items()}
    changed = WEIGHTS[name](arrays)
    with torch.no_grad():
        for parameter, value in changed.items():
            parameters[parameter].copy_(torch.from_numpy(value))
    return next(iter(changed)).rpartition(".")[0]
