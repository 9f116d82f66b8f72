"""Which fusions of a graph for ONNX Runtime replace more and pass parity: ours, or others' own.

    python benchmarks/fusions.py                    # a few minutes on two cores
    python benchmarks/fusions.py --only gpt2

Tiny models with seeded weights, a decoder with its cache among them, each fused in four ways, then
judged by the whole flow: every part, step and token against the source in float64.

- modelport: ``--optimize fuse``.
- optimizer: ``onnxruntime.transformers.optimizer`` on the same graph, simplified, with its weights.
- transformers, trace: ``fuse_for_onnxruntime`` of ``transformers.exporters`` on that graph.
- transformers, dynamo: the same on the graph that transformers' own exporter captures, with the
  shapes that its patterns look for, at opset 18.

Results go to ``benchmarks/results/fusions.md`` and ``.json``; those of ``--only`` and ``--way``
beside what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
PAGE = ROOT / "benchmarks" / "results" / "fusions.md"
KEPT = PAGE.with_suffix(".json")
MODELS = {"bert": ("feature-extraction", "bert"), "gpt2": ("text-generation", "gpt2"),
          "llama": ("text-generation", "gpt2")}
"""Task, and the type that the optimizer knows such a model by: it converts Llama as ``gpt2``."""
WAYS = ("modelport", "optimizer", "transformers, trace", "transformers, dynamo")
STANDARD = ("SimplifiedLayerNormalization",)
"""Fused operators of ONNX Runtime that stand in the standard's domain."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model fused in one way.

    Attributes:
        before: nodes of the graph as captured.
        after: nodes of the fused graph, those of both branches of an If.
        fused: operators of ONNX Runtime's own, with their number.
        verdict: parity, with the worst ρ; or what it failed with.
    """

    before: int
    after: int
    fused: dict[str, int]
    verdict: str


def outcome(kind: str, way: str, checkpoint: Path, place: Path) -> Outcome:
    """Export, fuse in that way, validate."""
    from modelport import checkpoints, exporters, pipeline
    from modelport.artifacts import onnx_files
    from modelport.errors import ModelportError
    from modelport.exporters.onnx import OnnxOptions
    from modelport.pipeline import deriving, exporting
    from modelport.transforms import _graph
    from transformers import AutoConfig

    dynamo = way == WAYS[3]
    request = pipeline.ModelRequest(str(checkpoint), task=MODELS[kind][0])
    plain = OnnxOptions(strategy="transformers", opset=18) if dynamo else OnnxOptions()
    parent = pipeline.export("onnx", request, place / "base", plain, validate=False)
    file = "decoder.onnx" if parent.manifest.components else "model.onnx"
    before = _graph.count(onnx_files.load(parent.root / file))
    if dynamo:
        root = place / "fused"
        with fused_while_captured():
            made = pipeline.export("onnx", request, root, plain, validate=False)
        return Outcome(before, *_found(made.root / file), verdict_of(made.root))
    exporter, asked = exporters.get("onnx"), dataclasses.replace(plain, optimize="fuse")
    model = checkpoints.load(request.resolve(), attention=exporter.attention(plain))
    steps = exporter.derivations(asked)
    with applied(way, MODELS[kind][1], AutoConfig.from_pretrained(checkpoint)):
        for step in steps:
            root = place / step.transform
            root.mkdir()
            try:
                parent = deriving.derive(exporter, model, parent, root, step)
            except (ModelportError, RuntimeError, ValueError, TypeError, IndexError) as error:
                return Outcome(before, 0, {}, f"failed: {exporting.first_line(error)[:160]}")
    return Outcome(before, *_found(parent.root / file), verdict_of(parent.root))


def verdict_of(root: Path) -> str:
    from modelport.errors import ModelportError
    from modelport.pipeline.validator import Validator

    try:
        with Validator() as validator:
            parity = validator.validate(root).parity
    except ModelportError as error:
        return f"failed: {error.found[:160]}"
    assert parity is not None
    return parity.verdict + (f", ρ {parity.worst_rho:.2f}" if parity.worst_rho else "")


def _found(file: Path) -> tuple[int, dict[str, int]]:
    from modelport.artifacts import onnx_files
    from modelport.transforms import _graph

    operators = _graph.operators(onnx_files.load(file))
    fused = {name.removeprefix("com.microsoft::"): count for name, count in operators.items()
             if name.startswith("com.microsoft") or name in STANDARD}
    return sum(operators.values()), fused


@contextmanager
def applied(way: str, kind: str, config: Any) -> Iterator[None]:
    """Let the transform ``fuse`` be that way's inside the block."""
    from modelport import transforms

    fuse = {WAYS[1]: lambda model: optimized(model, kind, config), WAYS[2]: rewritten}.get(way)
    if fuse is None:
        yield
        return

    def apply(_: Any, model: Any, options: Any) -> transforms.TransformResult:
        return transforms.TransformResult(fuse(model), True, {}, {"runtime": "onnxruntime"})

    with mock.patch.object(type(transforms.get("fuse")), "apply", apply):
        yield


def optimized(model: Any, kind: str, config: Any) -> Any:
    """ONNX Runtime's optimizer, with the weights that its fusions of attention join."""
    import onnx_ir as ir
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}.{number}"
    done = optimize_by_fusion(ir.to_proto(in_memory(model)), kind, config.num_attention_heads,
                              config.hidden_size)
    return with_contract(ir.from_proto(done.model), model)


def rewritten(model: Any) -> Any:
    """The fusions of transformers, on a graph whose shapes ONNX inferred."""
    import onnx
    import onnx_ir as ir
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    proto = ir.to_proto(in_memory(model))
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    fuse_for_onnxruntime(inferred, "cpu")
    return with_contract(inferred, model)


@contextmanager
def fused_while_captured() -> Iterator[None]:
    """Fuse each graph as soon as transformers has captured it and its weights are bound."""
    from modelport.exporters import onnx as exporter
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    bind: Callable[..., None] = exporter._bind_weights

    def bound(graph: Any, model: Any) -> None:
        bind(graph, model)
        in_memory(graph)
        fuse_for_onnxruntime(graph, "cpu")

    with mock.patch.object(exporter, "_bind_weights", bound):
        yield


def in_memory(model: Any) -> Any:
    """Hold the stored weights, which these fusions read or join."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return model


def with_contract(made: Any, original: Any) -> Any:
    """Let inputs and outputs have the names of dimensions that they had."""
    for new, old in (*zip(made.graph.inputs, original.graph.inputs, strict=True),
                     *zip(made.graph.outputs, original.graph.outputs, strict=True)):
        new.shape, new.type = old.shape, old.type
    made.metadata_props.update(original.metadata_props)
    return made


def table(found: dict[tuple[str, str], Outcome]) -> str:
    lines = ["| model | fused by | nodes | of ONNX Runtime's own | parity |",
             "| --- | --- | --- | --- | --- |"]
    for kind, way in sorted(found, key=lambda k: (list(MODELS).index(k[0]), WAYS.index(k[1]))):
        one = found[kind, way]
        own = ", ".join(f"{count} {name}" for name, count in one.fused.items()) or "none"
        nodes = f"{one.before} → {one.after}" if one.after else f"{one.before}"
        lines.append(f"| {kind} | {way} | {nodes} | {own} | {one.verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--way", choices=WAYS, action="append", help="default: all")
    chosen = parser.parse_args()
    import tiny_models

    warnings.filterwarnings("ignore")
    found = {tuple(key.split(": ")): Outcome(**one)
             for key, one in (json.loads(KEPT.read_text()) if KEPT.exists() else {}).items()}
    for kind in chosen.only or MODELS:
        for way in chosen.way or WAYS:
            with tempfile.TemporaryDirectory() as place:
                checkpoint = tiny_models.build(kind, MODELS[kind][0], Path(place, "model"))
                found[kind, way] = outcome(kind, way, checkpoint, Path(place))
            print(kind, way, found[kind, way], file=sys.stderr, flush=True)
            KEPT.write_text(json.dumps({f"{k}: {w}": dataclasses.asdict(one)
                                        for (k, w), one in found.items()}, indent=1) + "\n")
    text = table(found)
    print(text)
    head = "# Fusions for ONNX Runtime\n\nWritten by `python benchmarks/fusions.py`.\n\n"
    PAGE.write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
