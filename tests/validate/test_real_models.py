"""Real architectures: every fault is rejected, every correct export is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import mutants
import pytest
import subjects
from subjects import FEW, KINDS, Subject

if TYPE_CHECKING:
    from pathlib import Path

Subjects = Callable[[str], Subject]
ONNX = [*mutants.WEIGHTS, *mutants.GRAPHS]
TORCH = [*mutants.WEIGHTS, *mutants.MODULES]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subjects]:
    """Each architecture exported once, with its references."""
    root = tmp_path_factory.mktemp("subjects")
    made: dict[str, Subject] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELPORT_CACHE", str(root / "cache"))

        def get(kind: str) -> Subject:
            if kind not in made:
                made[kind] = subjects.subject(kind, root, sizes=FEW)
                assert made[kind].judge_file(made[kind].artifact.root).accepted
            return made[kind]

        yield get


def accepted_onnx(subject: Subjects, name: str, out: Path) -> tuple[list[str], list[str]]:
    """Kinds that have the fault, and those of them whose spoilt graph was accepted."""
    tried, accepted = [], []
    for kind in KINDS:
        try:
            mutants.spoil(subject(kind).artifact, name, out / kind)
        except mutants.AbsentError:
            continue
        tried.append(kind)
        if subject(kind).judge_file(out / kind).accepted:
            accepted.append(kind)
    return tried, accepted


@pytest.mark.parametrize("name", ONNX)
def test_a_spoilt_graph_is_rejected(name: str, subject: Subjects, tmp_path: Path) -> None:
    tried, accepted = accepted_onnx(subject, name, tmp_path)
    assert tried, "no architecture has this fault"
    assert not accepted


@pytest.mark.parametrize("name", TORCH)
def test_a_spoilt_module_is_rejected(name: str, subject: Subjects) -> None:
    tried, accepted = [], []
    for kind in KINDS:
        try:
            session = subject(kind).spoilt(lambda module: mutants.spoil_module(module, name))
        except mutants.AbsentError:
            continue
        tried.append(kind)
        if subject(kind).judge(session).accepted:
            accepted.append(kind)
    assert len(tried) >= 4
    assert not accepted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_a_correct_export_is_accepted(kind: str, level: str, subject: Subjects) -> None:
    report = subject(kind).judge_file(subject(kind).artifact.root, level=level)
    assert report.accepted, [r.reason for r in report.failures]
    assert report.noise_floor


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_itself_is_accepted(kind: str, subject: Subjects) -> None:
    report = subject(kind).judge(subjects.opened(subject(kind).model))
    assert report.accepted
    assert report.worst_rho is not None
    assert report.worst_rho <= 1.0 + 1e-9


def test_there_are_enough_kinds_of_fault() -> None:
    assert len({*ONNX, *TORCH}) >= 20
    assert len(KINDS) >= 4


def test_a_fault_that_is_none_is_accepted(subject: Subjects, tmp_path: Path) -> None:
    """The test above can fail: a graph written back unchanged is no mutant."""
    from modelport.artifacts import onnx_files

    one = subject("bert")
    onnx_files.save(onnx_files.load(one.artifact.root), tmp_path)
    assert one.judge_file(tmp_path).accepted


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_alarm_over_opsets_and_levels(kind: str, seed: int, tmp_path: Path) -> None:
    """The whole default matrix: 6 kinds x 3 seeds x 5 opsets x 3 levels, 270 runs."""
    alarms = []
    lowest = 12 if kind == "deberta-v2" else 11  # Clip takes no int64 below 12
    for opset in (lowest, 13, 14, 17, 21):
        one = subjects.subject(kind, tmp_path, seed=seed, opset=opset)
        for level in ("disabled", "extended", "all"):
            report = one.judge_file(one.artifact.root, level=level)
            if not report.accepted:
                alarms.append((opset, level, [r.reason for r in report.failures][:2]))
    assert not alarms


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_alarm_in_other_runtimes(kind: str, tmp_path: Path) -> None:
    from modelport import runtimes

    one = subjects.subject(kind, tmp_path)
    artifact = subjects.export(one.checkpoint, tmp_path / "script", "torchscript")
    report = one.judge(runtimes.get("torchscript").open(artifact))
    assert report.accepted, [r.reason for r in report.failures]
