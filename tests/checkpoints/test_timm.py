"""Checkpoints of timm, through transformers' wrapper, against timm itself.

timm lives in a folder of its own (see the Makefile): in the environment, its torchvision would be
found by transformers and fail on PyTorch's CPU build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import modelport
import numpy as np
import pytest
from modelport import checkpoints
from modelport.errors import BackendUnavailable

TIMM = Path(sys.prefix) / "timm"
SHIM = Path(__file__).parents[1] / "support" / "timm_on_cpu"
needs_timm = pytest.mark.skipif(not (TIMM / "timm").is_dir(), reason="make installs timm")

WRITE = """
import sys
import numpy as np, timm, torch
from timm.models import save_for_hf

name, classes, root = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = timm.create_model(name, pretrained=False, num_classes=classes).eval()
for buffer in model.buffers():
    if buffer.is_floating_point() and buffer.dim() == 1:
        buffer.add_(torch.rand_like(buffer))
save_for_hf(model, root, safe_serialization=True)
images = torch.randn(3, 3, 160, 160)
with torch.no_grad():
    whole = model(images) if classes else model.forward_features(images)
np.savez(root + "/expected.npz", images=images.numpy(), whole=whole.numpy())
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SHIM), str(TIMM), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})


def written(root: Path, name: str, classes: int) -> Path:
    """A checkpoint as timm saves it, of which transformers reads no arguments of the model."""
    done = python("-c", WRITE, name, str(classes), str(root))
    assert done.returncode == 0, done.stderr
    config = json.loads((root / "config.json").read_text())
    config.pop("model_args", None)
    (root / "config.json").write_text(json.dumps(config))
    return root


@needs_timm
@pytest.mark.parametrize(("name", "classes"), [("test_resnet", 10), ("test_vit", 0)])
def test_a_checkpoint_is_exported_with_the_task_it_has(
    name: str, classes: int, tmp_path: Path
) -> None:
    root = written(tmp_path / "model", name, classes)
    done = python("-m", "modelport", "export", "onnx", "--model", str(root), "--output",
                  str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["task"] == (
        "image-classification" if classes else "feature-extraction")
    expected = np.load(root / "expected.npz")
    _, session = modelport.open_artifact(tmp_path / "out")
    with session:
        assert session.spec.inputs[0].shape == ("batch", 3, 160, 160)
        found = session.run({"pixel_values": expected["images"]})
    np.testing.assert_allclose(next(iter(found.values())), expected["whole"], atol=2e-4)


@needs_timm
def test_arguments_that_transformers_passes_twice_are_told(tmp_path: Path) -> None:
    """What timm 1.0.31 saves by default."""
    root = written(tmp_path / "model", "test_vit", 10)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "model_args": {"num_classes": 10}}))
    done = python("-m", "modelport", "export", "onnx", "--model", str(root), "--output",
                  str(tmp_path / "out"))
    assert done.returncode == 2
    assert "multiple values for keyword argument 'num_classes'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_timm_the_extra_is_named(tmp_path: Path) -> None:
    config = {"architecture": "test_vit", "num_classes": 10, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file({"head.weight": np.zeros((10, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(BackendUnavailable, match="requires the timm library") as caught:
        checkpoints.load(checkpoints.resolve(str(tmp_path)))
    assert caught.value.hint == 'pip install "modelport[timm]"'
