"""From a module, or from an exported program, to TorchScript.

``torch.jit.script`` cannot read the Python of transformers 5, but it reads the plain code that an
exported graph prints, once everything only Python needs is taken out of that graph.
"""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..spec import ModelSpec


def compile_module(module: torch.nn.Module, spec: ModelSpec) -> torch.jit.ScriptModule:
    """Compile a module's own code, with its branches and loops.

    An adapter's ``forward(*tensors)`` is beyond TorchScript. So what it calls, its ``model``, is
    compiled behind a forward that takes the spec's inputs one by one and gives its outputs.

    Raises:
        ExportError: the model returns something that outputs cannot be taken from.
    """
    import torch

    taken = inspect.signature(module.forward).parameters.values()
    if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in taken):
        plain: torch.jit.ScriptModule = torch.jit.script(module)
        return plain
    inner: Any = torch.jit.script(module.model)
    returned = inner.forward.schema.returns[0].type
    graph = torch.fx.Graph()
    feeds = {name: graph.placeholder(name, type_expr=torch.Tensor) for name in spec.input_names}
    result = graph.call_module("model", kwargs={**feeds, **getattr(module, "constants", {})})
    graph.output(tuple(_picked(graph, result, returned, name) for name in spec.output_names))
    scripted: torch.jit.ScriptModule = torch.jit.script(
        torch.fx.GraphModule({"model": inner}, graph).eval())
    return scripted


def _picked(
    graph: torch.fx.Graph, result: torch.fx.Node, returned: Any, name: str
) -> torch.fx.Node:
    """An output in what a compiled model returns: a tensor, or a collection of them."""
    kind = returned.kind()
    if kind == "TensorType":
        return result
    key = name if kind == "DictType" else name.removeprefix("output_")
    if kind in ("TupleType", "ListType") and key.isdigit():
        return graph.call_function(operator.getitem, (result, int(key)))
    if kind == "DictType":
        return graph.call_function(operator.getitem, (result, key))
    raise ExportError(f"the compiled module returns {returned.annotation_str}, without {name}",
                      hint="--mode trace")


def compile_program(
    program: torch.export.ExportedProgram, names: tuple[str, ...]
) -> torch.jit.ScriptModule:
    """Compile an exported program; sizes stay as dynamic as the program has them.

    Args:
        program: from :func:`._torch_capture.program`.
        names: of the inputs of the compiled ``forward``.
    """
    import torch

    module = program.module(check_guards=False)
    plain = torch.fx.GraphModule(module, _plain(module, names))
    scripted: torch.jit.ScriptModule = torch.jit.script(plain.eval())
    return scripted


def _plain(module: torch.fx.GraphModule, names: tuple[str, ...]) -> torch.fx.Graph:
    """The graph with TorchScript's operators only, no checks, and nested graphs inlined."""
    import torch

    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, Any] = {}
    given = iter(names)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(next(given), type_expr=torch.Tensor)
        elif node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], values.__getitem__))
        else:
            _copy(module, node, graph, values)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _copy(
    module: torch.fx.GraphModule,
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    values: dict[torch.fx.Node, Any],
) -> None:
    """Append a node's TorchScript form to ``graph`` and note its value."""
    import torch

    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        values[node] = _inlined(module, node, graph, values)
        return
    if node.op == "get_attr" and isinstance(_attribute(module, str(node.target)), torch.nn.Module):
        return  # the graph of a higher-order operator, found again where it is called
    if _is_check(node):
        return
    if node.target is operator.getitem:
        owner: Any = node.args[0]
        if isinstance(values[owner], tuple | list):  # the outputs of an inlined graph
            values[node] = values[owner][node.args[1]]
            return
    made = graph.node_copy(node, values.__getitem__)
    if node.op == "call_function":
        made.target = _translated(node)
    values[node] = made


def _is_check(node: torch.fx.Node) -> bool:
    """Checks of sizes and metadata: our session makes them before the call."""
    name = str(node.target)
    return node.op == "call_function" and any(
        word in name for word in ("_assert_", "sym_constrain_range", "_check")
    )


def _translated(node: torch.fx.Node) -> Any:
    """What a node calls, in a form that TorchScript resolves.

    Raises:
        ExportError: there is none.
    """
    import torch

    target = node.target
    if target in _symbolic():
        return _symbolic()[target]
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket
    if getattr(target, "__module__", "") in ("_operator", "builtins", "math"):
        return target
    raise ExportError(f"TorchScript has no form of {target}", hint="--mode trace")


def _symbolic() -> Mapping[Any, Callable[..., Any]]:
    """Arithmetic of sizes, which in TorchScript are plain integers."""
    import torch

    return {
        torch.ops.aten.sym_size.int: torch.ops.aten.size,
        torch.ops.aten.sym_numel.default: torch.ops.aten.numel,
        torch.ops.aten.sym_stride.int: torch.ops.aten.stride,
        torch.sym_max: max,
        torch.sym_min: min,
        torch.sym_float: float,
        torch.sym_int: int,
        torch.sym_not: operator.not_,
    }


def _inlined(
    module: torch.fx.GraphModule,
    node: torch.fx.Node,
    graph: torch.fx.Graph,
    values: dict[torch.fx.Node, Any],
) -> Any:
    """The nodes of a region that only switches a mode off that is off at inference anyway.

    Raises:
        ExportError: any other higher-order operator, or autocast switched on.
    """
    import torch

    kind = str(node.target)
    attributes = [
        (position, argument)
        for position, argument in enumerate(node.args)
        if isinstance(argument, torch.fx.Node) and argument.op == "get_attr"
        and isinstance(_attribute(module, str(argument.target)), torch.fx.GraphModule)
    ]
    on = kind == "wrap_with_autocast" and bool(node.args[2])
    if kind not in ("wrap_with_autocast", "wrap_with_set_grad_enabled") or on or not attributes:
        raise ExportError(f"TorchScript has no form of {kind}", hint="--mode trace")
    position, argument = attributes[0]
    inner = _attribute(module, str(argument.target))
    feeds = iter(torch.fx.map_arg(node.args[position + 1 :], values.__getitem__))
    local: dict[torch.fx.Node, Any] = {}
    for child in inner.graph.nodes:
        if child.op == "placeholder":
            local[child] = next(feeds)
        elif child.op == "output":
            return torch.fx.map_arg(child.args[0], local.__getitem__)
        else:
            _copy(inner, child, graph, local)
    raise ExportError(f"the graph of {kind} has no output")


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
