"""``modelport bench bark --combinations``: tables from fresh processes, proofs beside them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny_bark
from click.testing import CliRunner
from modelport import bark, cli
from modelport.bark import Optimisations, Setting
from modelport.checkpoints import consent
from modelport.errors import ParityError
from modelport.pipeline import ModelRequest, combinations
from modelport.runtimes.benchmark.records import Cell

SETTING = Setting(new_tokens=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bark.build(tmp_path_factory.mktemp("bark") / "model")


def test_tables_hold_what_was_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (Optimisations(), Optimisations("fused"), Optimisations(offload=True))
    monkeypatch.setattr(bark, "combinations", lambda device: few)
    plan = combinations.Plan(ModelRequest(str(root), task="text-to-audio"), setting=SETTING,
                             batches=(2,), samples=2, rounds=1, threads=1, prove=False)
    report = combinations.combinations(plan, tmp_path)
    figures, relative = report.tables()
    assert [row[0] for row in figures.rows] == [o.name for o in few]
    assert "this is a CPU" in figures.rows[2][4]
    assert figures.rows[2][1:4] == ("", "", "")
    assert [row[0] for row in relative.rows] == [o.name for o in few[:2]]
    assert relative.rows[0][1:4] == ("+0%", "+0%", "+0%")
    taken = next(r for r in report.run.results if r.cell.subject == "fused attention")
    assert len(taken.samples) == 2
    row = next(r for r in report.run.rows if r.cell.subject == "fused attention")
    assert row.p50 is not None
    assert row.throughput is not None
    assert row.throughput.value == pytest.approx(2 / row.p50.value)
    kept = json.loads((tmp_path / combinations.REPORT).read_text())
    assert kept["tables"][0]["rows"][0][0] == "no optimisation"
    report.require_sound()

    # What was measured is kept; what was absent would be asked for again.
    monkeypatch.setattr(bark, "combinations", lambda device: few[:2])
    monkeypatch.setattr(combinations.calls.sweep, "run_job",
                        lambda *_, **__: pytest.fail("measured again"))
    again = combinations.combinations(plan, tmp_path)
    assert again.tables()[0].rows == figures.rows[:2]
    assert "| no optimisation |" in (tmp_path / combinations.TABLES).read_text()
    assert str(root.parent) not in json.dumps(kept["run"])


def test_every_combination_is_proven(root: Path) -> None:
    proofs = {p.name: p for p in combinations.prove(root, SETTING, "cpu")}
    assert proofs["no optimisation"].verdict == "pass"
    assert proofs["fused attention"].verdict == "pass"
    assert proofs["alone against in a batch"].verdict == "pass"
    assert proofs["fused attention + bfloat16"].verdict == "pass"
    assert proofs["offload"].verdict == "absent"
    half = proofs["bfloat16"].found
    assert half is not None
    assert half.quality < 80


def test_a_combination_that_says_something_else_fails_the_run(root: Path) -> None:
    wrong = bark.Agreement(10, 3, 3, 50.0, 10.0, 0.1, True)
    report = combinations.Report(
        combinations.Plan(ModelRequest(str(root))), None,  # type: ignore[arg-type]
        (combinations.Proof("fused attention", wrong.verdict("float32"), wrong),))
    with pytest.raises(ParityError, match="3 of 10 decisions differ"):
        report.require_sound()


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("bark", "--combinations", "--help"), 0, "--fine-window"),
    (("--help",), 0, "--runtimes"),
    (("whisper", "--combinations"), 2, "'whisper' is not 'bark'"),
    (("bark", "--combinations", "--new-tokens", "0"), 2, "--new-tokens"),
])
def test_the_flag_brings_options_of_its_own(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    found = CliRunner().invoke(cli.cli, ["bench", *arguments])
    assert found.exit_code == code
    assert said in found.output


def plans(monkeypatch: pytest.MonkeyPatch) -> list[combinations.Plan]:
    """What the command asks to be measured; nothing is."""
    asked: list[combinations.Plan] = []

    class Stop(Exception):
        pass

    def measure(plan: combinations.Plan, *_: Any, **__: Any) -> None:
        asked.append(plan)
        raise Stop

    monkeypatch.setattr(combinations, "combinations", measure)
    return asked


def test_a_gpu_gets_the_article_s_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = plans(monkeypatch)
    for device in ("cuda", "cpu"):
        CliRunner().invoke(cli.cli, ["bench", "bark", "--combinations", "--device", device,
                                     "--voice", "seeded", "--output", str(tmp_path)])
    gpu, cpu = asked
    assert (gpu.setting.new_tokens, gpu.samples, gpu.batches) == (256, 100, (1, 8))
    assert (gpu.setting.text_window, gpu.model.weights) == (None, "pretrained")
    assert (cpu.setting.new_tokens, cpu.model.weights) == (16, "random")
    assert cpu.setting.voice == "seeded"


def test_what_is_allowed_reaches_what_is_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is named only where something is allowed: else results would have other keys."""
    asked = plans(monkeypatch)
    given: list[consent.Consent] = []
    for flags in ((), ("--allow-pickle", "--trust-remote-code", "--revision", "0" * 40)):
        CliRunner().invoke(cli.cli, ["bench", "bark", "--combinations", *flags,
                                     "--output", str(tmp_path)])
    assert [plan.model.allowed for plan in asked] == [
        consent.Consent(), consent.Consent(allow_pickle=True, trust_remote_code=True)]
    assert [plan.model.revision for plan in asked] == [None, "0" * 40]

    plain, trusting = (
        dict(combinations._subject(plan, Optimisations(), root, "digest", "").options)
        for plan in asked)
    assert set(plain) == {f.name for kind in (Optimisations, Setting) for f in fields(kind)}
    assert trusting == {**plain, "trust_remote_code": True}
    monkeypatch.setattr(bark, "open_speaker", lambda *_, **__: given.append(consent.given()))
    for options in (plain, trusting):
        combinations.open_cell(Cell("bark", str(root), "digest", options=options))
    assert [now.trust_remote_code for now in given] == [False, True]
