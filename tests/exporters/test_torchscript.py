"""TorchScript archives: equal at unseen shapes, honest about what they froze, made in one copy."""

from __future__ import annotations

import json
import mmap
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hand_made
import numpy as np
import pytest
import torch
from modelport import artifacts, checkpoints, exporters, pipeline, runtimes, validate
from modelport.errors import BackendUnavailable, ClaimError
from modelport.exporters._torch_weights import real_weights
from modelport.exporters.torchscript import TorchScriptOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelport.checkpoints import LoadedModel
    from modelport.session import Session

EXPORTER = exporters.get("torchscript")
FAMILIES = (
    "camembert", "distilbert", "albert", "mpnet", "deberta-v2", "gpt2", "t5", "vit", "resnet",
    "wav2vec2",
)  # fmt: skip
CAP = {"batch": 3, "samples": 4000, "sequence": 40, "target": 40}


def shapes(model: LoadedModel) -> list[dict[str, int]]:
    """The smallest sizes, large ones, and odd ones that no trace saw."""
    dims = {n: d for n, d in model.spec.dims.items() if n in model.spec.check(model.samples)}
    return [
        {name: dim.min for name, dim in dims.items()},
        {name: min(dim.max, CAP.get(name, 7)) for name, dim in dims.items()},
        {name: min(dim.max, max(dim.min, 1300 if name == "samples" else 7 + 4 * i))
         for i, (name, dim) in enumerate(dims.items())},
    ]  # fmt: skip


def assert_equal_to_the_source(session: Session, model: LoadedModel, source: Path) -> None:
    reference = checkpoints.load_reference(checkpoints.resolve(str(source)), attention="eager")
    with runtimes.get("torch_eager").open(reference) as eager:
        for sizes in shapes(model):
            for padding in ("none", "right", "left"):
                if not validate.admits(model.spec, sizes, padding):
                    continue
                case = validate.Case(tuple(sorted(sizes.items())), padding, 1)
                given = validate.draw(model.spec, case)
                expected = eager.run(given)
                for name, value in session.run(given).items():
                    keep = content(model, name, given)
                    scale = np.abs(expected[name]).max()
                    np.testing.assert_allclose(
                        value[keep], expected[name][keep], rtol=0, atol=2e-5 * max(scale, 1),
                        err_msg=f"{name} {sizes} {padding}",
                    )  # fmt: skip


def content(model: LoadedModel, output: str, given: dict[str, np.ndarray]) -> Any:
    """Where an output means something: a padded position may hold anything."""
    shape = next(t.shape for t in model.spec.outputs if t.name == output)
    masks = [t for t in model.spec.inputs if t.role == "mask" and shape[: len(t.shape)] == t.shape]
    return given[masks[0].name].astype(bool) if masks else ...


def exported(
    source: Path, out: Path, **options: str
) -> tuple[artifacts.Artifact, LoadedModel]:
    chosen = TorchScriptOptions(**options)
    checkpoint = checkpoints.resolve(str(source))
    model = checkpoints.load(checkpoint, attention=EXPORTER.attention(chosen))
    return hand_made.written(EXPORTER, model, out, chosen, EXPORTER.strategies(chosen)[-1]), model


def opened(artifact: artifacts.Artifact) -> Any:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.load"):
        return torch.jit.load(str(artifact.root / "model.pt"))


@pytest.mark.parametrize("mode", ["trace", "script"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_at_unseen_shapes_and_paddings(
    kind: str, mode: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, model = exported(tiny(kind), tmp_path / "out", mode=mode)
    with runtimes.get("torchscript").open(artifact) as session:
        assert_equal_to_the_source(session, model, tiny(kind))
    assert artifact.manifest.facts["route"] == ("trace" if mode == "trace" else "export")


@pytest.mark.parametrize("mode", ["trace", "script"])
@pytest.mark.parametrize("kind", ["camembert", "gpt2"])
def test_unfused_attention(
    kind: str, mode: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, model = exported(tiny(kind), tmp_path / "out", mode=mode, attention="eager")
    assert "scaled_dot_product_attention" not in opened(artifact).code
    with runtimes.get("torchscript").open(artifact) as session:
        assert_equal_to_the_source(session, model, tiny(kind))


def test_fused_attention_is_fused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    artifact, _ = exported(tiny("camembert"), tmp_path / "out")
    assert "scaled_dot_product_attention" in opened(artifact).code


@pytest.mark.parametrize(("kind", "asked", "found"), [
    ("bert", "sdpa", "sdpa"), ("bert", "eager", "eager"),
    ("deberta-v2", "sdpa", "eager"),  # which has no other
])
def test_the_attention_told_is_the_one_in_the_archive(
    kind: str, asked: str, found: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, _ = exported(tiny(kind), tmp_path / "out", attention=asked)
    assert artifact.manifest.facts["attention"] == found
    assert ("scaled_dot_product_attention" in opened(artifact).code) == (found == "sdpa")


@pytest.mark.parametrize("mode", ["trace", "script"])
def test_the_pipeline_proves_it_and_tells_the_route(
    mode: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    artifact = pipeline.export("torchscript", pipeline.ModelRequest(str(tiny("bert"))), out,
                               TorchScriptOptions(mode=mode), validate=False)  # fmt: skip
    report = pipeline.validate_artifact(out)
    assert report.accepted, "\n".join(r.reason for r in report.failures)
    facts = artifact.manifest.facts
    assert (facts["branches"], facts["loops"]) == (0, 0)
    tried = [(a.strategy, a.outcome) for a in artifact.manifest.attempts]
    if mode == "trace":
        assert (facts["route"], tried) == ("trace", [("trace", "kept")])
    else:
        assert facts["route"] == "export"
        assert tried == [("script", "failed"), ("export", "kept")]


class Branches(torch.nn.Module):
    """Takes one of two paths by a value, and repeats one by a size."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(1, 1)
        self.down = torch.nn.Linear(1, 1)
        with torch.no_grad():
            self.up.weight.fill_(2)
            self.down.weight.fill_(-3)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        x = values.unsqueeze(-1)
        x = self.up(x) if bool(values.sum() > 0) else self.down(x)
        for _ in range(values.size(1)):
            x = torch.tanh(x) + self.up(x) / 4
        return (x.squeeze(-1),)


def branches() -> tuple[LoadedModel, list[np.ndarray]]:
    torch.manual_seed(0)
    model = hand_made.loaded(Branches(), hand_made.spec(hand_made.VALUES))
    positive = np.abs(hand_made.feeds(model.spec, batch=3, length=4)["values"])
    return model, [positive, -positive, positive[:1, :1], np.tile(-positive, (1, 3))]


def test_control_flow_takes_its_branches_after_reload(tmp_path: Path) -> None:
    model, values = branches()
    options = TorchScriptOptions(mode="script")
    assert EXPORTER.strategies(options)[0] == "script"
    artifact = hand_made.written(EXPORTER, model, tmp_path / "out", options, "script")
    facts = artifact.manifest.facts
    assert facts["route"] == "script"
    assert facts["branches"] >= 1
    assert facts["loops"] >= 1
    with runtimes.get("torchscript").open(artifact) as session, torch.no_grad():
        for value in values:
            expected = model.module(torch.from_numpy(value))[0].numpy()
            np.testing.assert_allclose(session.run({"values": value})["y"], expected, rtol=1e-6)


def test_a_trace_of_the_same_module_is_wrong_and_says_what_it_froze(tmp_path: Path) -> None:
    """The test above can fail: recorded once, the other branch is gone."""
    model, values = branches()
    artifact = hand_made.written(
        EXPORTER, model, tmp_path / "out", TorchScriptOptions(), "trace"
    )
    facts = artifact.manifest.facts
    assert (facts["branches"], facts["loops"]) == (0, 0)
    assert facts["frozen_choices"] == 1  # the branch; of the number of turns torch says nothing
    with runtimes.get("torchscript").open(artifact) as session, torch.no_grad():
        wrong = [
            not np.allclose(session.run({"values": value})["y"],
                            model.module(torch.from_numpy(value))[0].numpy(), rtol=1e-3)
            for value in values
        ]  # fmt: skip
    assert any(wrong)


class BakedSize(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (values * torch.ones(int(values.shape[0]), 1),)


class Half(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (values.half(),)


class Two(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values + 1, values + 2


@pytest.mark.parametrize(
    ("module", "message"),
    [(Half(), "float16"), (Two(), "2 outputs")],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else "",
)
def test_a_file_that_is_not_what_was_asked_for(
    module: torch.nn.Module, message: str, tmp_path: Path
) -> None:
    model = hand_made.loaded(module, hand_made.spec(hand_made.VALUES))
    with pytest.raises(ClaimError, match=message):
        hand_made.written(EXPORTER, model, tmp_path / "out", TorchScriptOptions(), "trace")


def test_a_size_that_the_trace_froze_fails_the_attempt(tmp_path: Path) -> None:
    model = hand_made.loaded(BakedSize(), hand_made.spec(hand_made.VALUES))
    with pytest.raises(RuntimeError, match="must match the size"):
        hand_made.written(EXPORTER, model, tmp_path / "out", TorchScriptOptions(), "trace")


def test_the_archive_says_what_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    artifact, model = exported(tiny("bert"), tmp_path / "out", mode="script")
    with zipfile.ZipFile(artifact.root / "model.pt") as file:
        name = next(n for n in file.namelist() if n.endswith("extra/modelport.json"))
        record = json.loads(file.read(name))
    assert record["source"] == model.source.digest
    assert record["torch"] == torch.__version__
    assert (record["mode"], record["route"], record["device"]) == ("script", "export", "cpu")
    assert [t["name"] for t in record["spec"]["inputs"]] == list(model.spec.input_names)
    assert artifact.manifest.target == {"device": "cpu", "torch": torch.__version__}


def test_inputs_have_their_names_in_the_archive(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    for mode in ("trace", "script"):
        artifact, model = exported(tiny("bert"), tmp_path / mode, mode=mode)
        schema = str(opened(artifact).forward.schema)
        positions = [schema.index(f"Tensor {name}") for name in model.spec.input_names]
        assert positions == sorted(positions)


@pytest.mark.parametrize("mode", ["trace", "script"])
def test_tied_weights_are_stored_once(
    mode: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, model = exported(tiny("camembert"), tmp_path / "out", mode=mode)
    refs = {(r.file, r.offset): r.nbytes for r in model.weights.values()}
    assert len(refs) < len(model.weights)  # the vocabulary projection is the embedding
    with zipfile.ZipFile(artifact.root / "model.pt") as file:
        stored = [e.file_size for e in file.infolist() if "/constants/" in e.filename]
    assert sum(stored) < sum(refs.values()) * 1.2  # index constants and the table of contents
    found = artifact.manifest.facts["weight_bytes"]["float32"]
    assert sum(refs.values()) * 0.9 < found <= sum(refs.values())


@pytest.mark.parametrize(
    ("options", "missing"), [({"device": "cuda"}, "CUDA"), ({}, "3.14")], ids=["cuda", "python"]
)
def test_what_is_absent_is_said_before_any_work(
    options: dict[str, str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if missing == "3.14":
        monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(BackendUnavailable, match=missing) as refused:
        EXPORTER.check(TorchScriptOptions(**options))
    assert refused.value.exit_code == 6
    if missing == "3.14":
        assert "aotinductor" in refused.value.hint


def test_the_deprecation_is_stated_with_the_alternative() -> None:
    assert "deprecated" in EXPORTER.notice
    assert "aotinductor" in EXPORTER.notice


# Weights: mapped, never copied, and out of the module again afterwards.


def stored_as_views(model: LoadedModel) -> dict[str, bool]:
    """For each parameter, whether its bytes lie in a mapping of the checkpoint's file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {str(ref.file) for ref in model.weights.values()}
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in lines if any(line.endswith(file) for file in files)
    ]  # fmt: skip
    return {
        name: any(start <= p.data_ptr() < end for start, end in spans)
        for name, p in model.module.named_parameters()
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_are_views_of_the_checkpoints_file(tiny: Callable[..., Path]) -> None:
    model = checkpoints.load(checkpoints.resolve(str(tiny("camembert"))))
    with real_weights(model):
        views = stored_as_views(model)
        assert all(views.values()), [name for name, view in views.items() if not view]
        for p in model.module.parameters():  # what is saved is the storage
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_weights_have_the_checkpoints_values(tiny: Callable[..., Path]) -> None:
    for stored in ("float32", "float16", "bfloat16"):
        checkpoint = checkpoints.resolve(str(tiny("camembert", dtype=stored)))
        model = checkpoints.load(checkpoint)
        reference = checkpoints.load_reference(checkpoint).module.state_dict()
        with real_weights(model):
            for name, value in model.module.state_dict().items():
                assert torch.equal(value, reference[name]), name
        with real_weights(model, dtype=torch.bfloat16):
            for name, p in model.module.named_parameters():
                assert torch.equal(p, reference[name].bfloat16()), name


def test_placeholders_come_back_whatever_happens(tiny: Callable[..., Path]) -> None:
    model = checkpoints.load(checkpoints.resolve(str(tiny("camembert"))))
    before = {name: id(p) for name, p in model.module.named_parameters()}
    with pytest.raises(KeyboardInterrupt), real_weights(model):
        raise KeyboardInterrupt
    assert {name: id(p) for name, p in model.module.named_parameters()} == before
    assert all(p.untyped_storage().nbytes() == p.itemsize for p in model.module.parameters())


def test_a_weight_at_an_odd_offset_is_copied(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    checkpoint = checkpoints.resolve(str(tiny("camembert")))
    model = checkpoints.load(checkpoint)
    reference = checkpoints.load_reference(checkpoint).module.state_dict()
    name, ref = next(iter(model.weights.items()))
    shifted = ref.file.parent / "shifted"
    shifted.write_bytes(b"\0" + ref.file.read_bytes())
    odd = dataclasses.replace(ref, file=shifted, offset=ref.offset + 1)
    model = dataclasses.replace(
        model, weights={n: odd if r == ref else r for n, r in model.weights.items()}
    )
    mapped: list[Any] = []
    original = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: mapped.append(1) or original(*a, **k))
    with real_weights(model):
        assert torch.equal(model.module.state_dict()[name], reference[name])
    shifted.unlink()
    assert len(mapped) == 1
