"""Idioms that a trace freezes follow the input instead, and everything else is left alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from modelport import pipeline
from modelport.checkpoints import load_reference, resolve
from modelport.exporters._onnx_opsets import keep_zeros
from modelport.exporters._torch_idioms import followed
from modelport.exporters._torch_operators import translatable
from modelport.exporters.onnx import OnnxOptions


class HalfOverlapping(torch.nn.Module):
    """Chunks of four, each half over the next, out of a view that is cut in chunks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.view(x.size(0), torch.div(x.size(1), 4, rounding_mode="trunc"), 4, x.size(2))
        size, stride = list(chunks.size()), list(chunks.stride())
        size[1] = size[1] * 2 - 1
        stride[1] = stride[1] // 2
        return chunks.as_strided(size=size, stride=stride)


class Thirds(torch.nn.Module):
    """Windows of six, one every two, out of an axis that is whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.stride()
        count = torch.div(x.size(1), 2, rounding_mode="trunc") - 2
        return x.as_strided(size=(x.size(0), count, 6, x.size(2)),
                            stride=(batch, 2 * length, length, width))


class Positions(torch.nn.Module):
    """A list of positions, sliced, extended and counted in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = list(range(x.size(1)))
        first = [-1]
        some = first + every[1:-1][::2]
        steps = torch.arange(some[0] + 2 * len(some), every[-1] - 1, -1)
        assert isinstance([1], list)
        return x.sum(1, keepdim=True) + steps[None, :, None]


class Steps(torch.nn.Module):
    """First differences, with something put before them and without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(x, prepend=x[:, :1] * 2, dim=1)[:, 1:] + x.diff(dim=1)


class Found(torch.nn.Module):
    """As many rows as hold a number that is found: none at some sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = (x[:, :, 0] > 50).nonzero(as_tuple=True)
        rows = x[places].view(len(places[0]), 3, 1)
        flat = rows.view(len(places[0]), -1) if len(places[0]) else rows[:, :, 0]
        left = flat.view(len(places[0]), 3, 1).transpose(0, 1)
        right = x.sum(0)[:4].view(4, 3, 1).transpose(0, 1)
        scores = torch.bmm(left, right.transpose(1, 2))
        again = torch.einsum("blhd,bshd->blhs", x[:1, :, None], flat[None, :, None])
        return x.sum(1) + scores.sum() + again.sum() + flat.sum(0)


class Repeated(torch.nn.Module):
    """Rows twice, of which the example has one, and the last as often as fives leave over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.repeat_interleave(x[:, 7:], repeats=2, dim=-2)
        return torch.cat([whole, x[:, -1:].repeat_interleave(x.size(1) % 5 + 1, dim=1)], dim=1)


class Full(torch.nn.Module):
    """A table read at places that are counted, in whole numbers, from a full tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.full(size=(x.size(0), x.size(1)), fill_value=0)
        places[x[:, :, 0] > 0] = 2
        return x + torch.nn.functional.embedding(places, x[0])


class Scattered(torch.nn.Module):
    """Rows gathered by where they go; what nothing goes to keeps its value."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[:, :, 0]
        index = torch.arange(x.size(1)).expand_as(rows) // 3
        target = torch.full_like(rows, 7.0)
        return target.scatter_reduce(1, index, rows - 1, reduce=self.reduce, include_self=False)


class Backwards(torch.nn.Module):
    """Positions from the last to the first, and every other one of some, as a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = list(range(x.size(1)))
        last_first = torch.tensor(every[::-1], device=x.device, dtype=x.dtype)
        some = torch.tensor(every[-2:1:-2]).sum()
        return x * last_first[None, :, None] + some


class Sorted(torch.nn.Module):
    """Rows by the expert that the data chooses for them, of which one may have none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        chosen = rows.argmax(-1)
        counts = (chosen[:, None] == torch.arange(3)).sum(0).tolist()
        order = (chosen * 1000 + torch.arange(rows.size(0))).sort()[1]
        pieces = rows[order].split(counts, dim=0)
        return torch.cat([piece * (i + 1) for i, piece in enumerate(pieces)]) + sum(counts[:0])


class Gathered(torch.nn.Module):
    """Several rows added to one place, in a third of the places, and half of them once more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(0, 1)
        places = torch.arange(x.size(1)) // 3
        once = torch.index_add(rows, 0, places, rows, alpha=0.5)
        return once.transpose(0, 1).index_add(1, places, x)


class Looping(torch.nn.Module):
    """A loop over a fixed number of columns, which stays what it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((x[:, i] * i for i in reversed(range(3))), torch.zeros(()))


def exported(
    module: torch.nn.Module, example: torch.Tensor, opset: int = 13
) -> onnxruntime.InferenceSession:
    file = io.BytesIO()
    with translatable(), followed(module):
        torch.onnx.export(module.eval(), (example,), file, input_names=["x"],
                          output_names=["y"], dynamic_axes={"x": {0: "b", 1: "n"}}, dynamo=False,
                          opset_version=opset)
    graph = ir.from_proto(onnx.load_from_string(file.getvalue()))
    keep_zeros(graph, opset)
    return onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [
    HalfOverlapping(), Thirds(), Positions(), Steps(), Looping(), Repeated(), Full(), Backwards(),
    Sorted(), Gathered(),
    *map(Scattered, ("sum", "mean", "amax", "amin"))], ids=lambda m: type(m).__name__)
def test_right_at_sizes_never_traced(module: torch.nn.Module) -> None:
    opset = 18 if isinstance(module, Scattered | Gathered) else 13
    session = exported(module, torch.randn(2, 8, 3), opset)
    for shape in ((2, 8, 3), (1, 12, 3), (3, 20, 3)):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        expected = module(torch.from_numpy(x)).numpy()
        found = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [3, 1, 0])
def test_rows_that_are_found_in_the_data_may_be_none(rows: int) -> None:
    def drawn(count: int) -> torch.Tensor:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 8, 3), np.float32))
        x[0, :count, 0] += 100
        return x

    session = exported(Found(), drawn(2), opset=17)
    expected = Found()(drawn(rows)).numpy()
    found = session.run(None, {"x": drawn(rows).numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_characters_are_repeated_at_lengths_never_traced(tmp_path: Path) -> None:
    """Molecules of four characters: the example has one to repeat, and the translation keeps it."""
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=64, downsampling_rate=4)
    transformers.CanineModel(config).save_pretrained(tmp_path / "model")
    request = pipeline.ModelRequest(str(tmp_path / "model"))
    artifact = pipeline.export("onnx", request, tmp_path / "out", OnnxOptions(strategy="trace"),
                               validate=False)
    reference = load_reference(resolve(request.model))
    with pipeline.open_session(artifact) as session:
        for length in (9, 17, 30):
            ids = np.arange(2 * length).reshape(2, length)
            feeds = {name: {"input_ids": ids}.get(name, np.ones_like(ids))
                     for name in artifact.spec.input_names}
            tensors = [torch.as_tensor(feeds[name]) for name in reference.spec.input_names]
            expected = reference.module(*tensors)[0].detach().numpy()
            found = session.run(feeds)[artifact.spec.output_names[0]]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_strides_are_left_to_torch() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    with followed(HalfOverlapping()):
        assert torch.equal(x.as_strided((2, 2), (1, 4)), torch.tensor([[0.0, 4.0], [1.0, 5.0]]))


def test_python_is_put_back() -> None:
    before = torch.Tensor.as_strided
    with pytest.raises(ZeroDivisionError), followed(Positions()):
        raise ZeroDivisionError
    assert torch.Tensor.as_strided is before
    assert "range" not in globals()
