"""What ONNX lacks for images and sequences is exported as matrices, and gives the same numbers."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from modelport.exporters._torch_operators import translatable
from torch.nn import functional


class Applied(torch.nn.Module):
    """A function that the module keeps in an attribute or calls by its place in torch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.kept = partial(torch.fft.fftn, dim=(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "bicubic":
            return functional.interpolate(x, size=(3, 11), mode="bicubic", antialias=True,
                                          align_corners=False)
        if self.how == "bilinear":
            return functional.interpolate(x, size=(3, 4), mode="bilinear", antialias=True)
        if self.how == "pooled":
            return torch.nn.AdaptiveAvgPool2d((3, 2))(x)
        if self.how == "one place":
            return functional.adaptive_avg_pool2d(x, 1)
        if self.how == "standardised":
            return functional.batch_norm(x.flatten(2), None, None, training=True, momentum=0.0,
                                         eps=1e-3, weight=x[0, :, 0, 0], bias=x[0, :, 0, 1])
        if self.how == "kept":
            return self.kept(x[:, 0]).real
        if self.how == "twice":
            return torch.fft.fft2(x).imag
        return torch.fft.fft(x, dim=1).real + torch.fft.fft(x).imag


WAYS = ["bicubic", "bilinear", "pooled", "one place", "standardised", "kept", "twice", "once"]
LACKED = {"bicubic": "_upsample_bicubic2d_aa", "bilinear": "_upsample_bilinear2d_aa",
          "pooled": "adaptive_avg_pool2d", "standardised": "must be non-None",
          "kept": "fft_fftn", "twice": "fft_fft2", "once": "fft_fft"}
"""What torch says of each."""


def exported(module: torch.nn.Module, example: torch.Tensor, *, dynamic: bool = True) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(module.eval(), (example,), file, input_names=["x"], output_names=["y"],
                      dynamic_axes={"x": {0: "batch"} | ({1: "n"} if dynamic else {})},
                      dynamo=False, opset_version=13)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
def test_the_same_numbers_at_another_batch(how: str) -> None:
    module = Applied(how)
    with translatable():
        graph = exported(module, torch.randn(2, 5, 7, 8), dynamic=how == "once")
    session = onnxruntime.InferenceSession(graph)
    for shape in ((2, 5, 7, 8), (3, 9 if how == "once" else 5, 7, 8)):
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
        found = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", LACKED)
def test_without_it_torch_has_no_translation_or_a_wrong_one(how: str) -> None:
    module, x = Applied(how), torch.randn(2, 5, 7, 8)
    try:
        graph = exported(module, x, dynamic=False)
    except (torch.onnx.OnnxExporterError, AssertionError) as error:
        said = str(error)
    else:
        found = onnxruntime.InferenceSession(graph).run(None, {"x": x.numpy()})[0]
        assert not np.allclose(found, module(x).numpy(), rtol=1e-5, atol=2e-5)
        return
    assert LACKED[how] in said


def test_outside_a_trace_torch_does_it() -> None:
    x = torch.randn(1, 2, 4, 4)
    for how in WAYS:
        module = Applied(how)
        expected = module(x)
        with translatable():
            assert torch.equal(module(x), expected)
