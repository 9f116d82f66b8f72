"""Intermediate values of an ONNX graph, and the part of it that computes one of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts import onnx_external
from .onnxruntime import PROVIDERS

if TYPE_CHECKING:
    import numpy as np
    import onnx

FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's setting for where the weights of a model given as bytes lie (1.20 and later)."""


class NodeFailedError(Exception):
    """A node raised while running.

    Attributes:
        node: its name, empty where the runtime did not tell.
    """

    def __init__(self, node: str, message: str) -> None:
        super().__init__(message)
        self.node = node


class GraphTap:
    """A graph file that can be asked for any of its values.

    Args:
        file: the ONNX file; its external data is checked and stays where it is.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self._folder = onnx_external.model_file(file).parent
        self._proto = onnx_external.load_checked(onnx_external.model_file(file))
        self._device = device
        graph = self._proto.graph
        self._producer = {out: i for i, n in enumerate(graph.node) for out in n.output if out}
        self._inputs = {i.name for i in graph.input}
        self.outputs = tuple(o.name for o in graph.output)
        self.dtypes = {o.name: onnx_external.DTYPES.get(o.type.tensor_type.elem_type, ("",))[0]
                       for o in graph.output}
        self._live = self._ancestors(self.outputs, ())

    @property
    def live(self) -> tuple[str, ...]:
        """Values that the outputs depend on, in the order of the graph."""
        nodes = self._proto.graph.node
        return tuple(out for i in sorted(self._live) for out in nodes[i].output if out)

    def place(self, value: str) -> int:
        """Index of the node that computes a value; -1 for an input of the graph."""
        return self._producer.get(value, -1)

    def place_of_node(self, name: str) -> int:
        """Index of a node; past the end where there is none of that name."""
        nodes = self._proto.graph.node
        return next((i for i, n in enumerate(nodes) if n.name == name), len(nodes))

    def has_node(self, name: str) -> bool:
        """Whether the file has a node of that name; the runtime makes up others when it fuses."""
        return bool(name) and self.place_of_node(name) < len(self._proto.graph.node)

    def scopes(self) -> dict[str, str]:
        """By scope, the value that was computed last in it, in modules inside it included."""
        found: dict[str, str] = {}
        for index in sorted(self._live):
            node = self._proto.graph.node[index]
            if node.op_type == "Constant" or not node.name.startswith("/"):
                continue
            parts = node.name.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                found["/".join(parts[:depth])] = node.output[0]
        return found

    def entries(self) -> dict[str, str]:
        """By innermost scope, the first value computed elsewhere that it reads."""
        nodes = self._proto.graph.node
        found: dict[str, str] = {}
        for index in sorted(self._live):
            node = nodes[index]
            scope = node.name.rpartition("/")[0]
            if not scope or scope in found:
                continue
            for name in node.input:
                source = self._producer.get(name)
                if source is None or nodes[source].op_type == "Constant":
                    continue
                if nodes[source].name.rpartition("/")[0] != scope:
                    found[scope] = name
                    break
        return found

    def run(self, feeds: Mapping[str, np.ndarray], values: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute some values; nothing that they do not depend on is run.

        Raises:
            NodeFailedError: a node raised.
        """
        import onnx
        import onnxruntime as ort

        if not values:
            return {}
        values = list(dict.fromkeys(values))
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        del proto.graph.output[:]
        del proto.graph.value_info[:]
        # ONNX Runtime runs what nothing reads, too.
        del proto.graph.node[:]
        proto.graph.node.extend(
            self._proto.graph.node[i] for i in sorted(self._ancestors(values, ())))
        known = {o.name: o for o in self._proto.graph.output}
        for name in values:
            proto.graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.add_session_config_entry(FOLDER, str(self._folder))
        try:
            session = ort.InferenceSession(
                proto.SerializeToString(), settings, providers=[PROVIDERS[self._device]],
                enable_fallback=0)
            wanted = {i.name for i in session.get_inputs()}
            given = {n: v for n, v in feeds.items() if n in wanted}
            return dict(zip(values, session.run(values, given), strict=True))
        except Exception as error:
            found = re.search(r"[Nn]ame:\s?'([^']*)'", str(error))
            message = str(error).strip().splitlines()[0]
            raise NodeFailedError(found[1] if found else "", message) from error

    def nodes_between(self, value: str, stops: Collection[str]) -> tuple[str, ...]:
        """``operator name`` of the nodes that compute a value from ``stops``."""
        nodes = self._proto.graph.node
        return tuple(f"{nodes[i].op_type} {nodes[i].name}"
                     for i in sorted(self._ancestors([value], stops))
                     if nodes[i].op_type != "Constant")

    def boundary(self, value: str, stops: Collection[str]) -> tuple[str, ...]:
        """Which of ``stops``, and which inputs of the graph, a value is computed from."""
        nodes = self._proto.graph.node
        inside = self._ancestors([value], stops)
        read = [name for i in sorted(inside) for name in nodes[i].input]
        return tuple(dict.fromkeys(n for n in read if n in stops or n in self._inputs))

    def inputs_of(self, node: int) -> tuple[str, ...]:
        """What a node reads that is computed or fed, weights left out."""
        names = self._proto.graph.node[node].input
        return tuple(n for n in names if n in self._producer or n in self._inputs)

    def output_of(self, node: int) -> str:
        """The first value a node computes."""
        return str(self._proto.graph.node[node].output[0])

    def cut(self, value: str, stops: Mapping[str, np.ndarray]) -> bytes:
        """A graph of its own that computes ``value`` from ``stops``, weights included."""
        import onnx
        from onnx.external_data_helper import load_external_data_for_tensor

        source = self._proto
        inside = sorted(self._ancestors([value], stops))
        nodes = [source.graph.node[i] for i in inside]
        read = {name for n in nodes for name in _reads(n)}
        weights = [t for t in source.graph.initializer if t.name in read]
        copies = []
        for weight in weights:
            copy = onnx.TensorProto()
            copy.CopyFrom(weight)
            if copy.external_data:
                load_external_data_for_tensor(copy, str(self._folder))
                copy.data_location = onnx.TensorProto.DEFAULT
                del copy.external_data[:]
            copies.append(copy)
        inputs = [onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
            for name, array in stops.items()]
        known = {o.name: o for o in source.graph.output}
        graph = onnx.helper.make_graph(
            nodes, "cut", inputs, [known.get(value) or onnx.ValueInfoProto(name=value)], copies)
        cut = onnx.helper.make_model(graph, opset_imports=source.opset_import,
                                     ir_version=source.ir_version)
        return bytes(cut.SerializeToString())

    def _ancestors(self, values: Collection[str], stops: Collection[str]) -> set[int]:
        nodes = self._proto.graph.node
        found: set[int] = set()
        pending = list(values)
        while pending:
            index = self._producer.get(pending.pop())
            if index is None or index in found:
                continue
            found.add(index)
            pending.extend(name for name in _reads(nodes[index]) if name and name not in stops)
        return found


def _reads(node: onnx.NodeProto) -> list[str]:
    """Names a node reads, those its subgraphs take from outside included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            inner = {o for n in graph.node for o in n.output}
            names.extend(n for node in graph.node for n in _reads(node) if n not in inner)
    return names
