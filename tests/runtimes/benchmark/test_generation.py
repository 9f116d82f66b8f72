"""Prefill and decode measured apart: what is timed, how it is kept, what is claimed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modelport.errors import GateRefused, IncompleteError, UsageError
from modelport.runtimes import benchmark
from modelport.runtimes.benchmark import generating, generation
from modelport.runtimes.benchmark.fake import FakeSession
from modelport.runtimes.benchmark.generation import Contestant, Measured, Process, Sample, Shape
from modelport.runtimes.benchmark.records import write_json

SHAPE = Shape(2, 4, 3)


class Slow:
    """Generates at a known pace: ``first`` seconds to a token, then ``step`` for each."""

    main_input_name = "input_ids"
    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))

    def __init__(self, first: float, step: float, spoken: int | None = None) -> None:
        self.first, self.step, self.spoken = first, step, spoken
        self.asked: list[dict[str, Any]] = []

    def generate(self, input_ids: Any, attention_mask: Any, **asked: Any) -> Any:
        self.asked.append(asked)
        for index in range(self.spoken or asked["max_new_tokens"]):
            time.sleep(self.step if index else self.first)
            asked["logits_processor"][0](input_ids, None)
        cache = SimpleNamespace(nbytes=640)
        return SimpleNamespace(sequences=input_ids, past_key_values=cache)


def job(mode: str = "sessions", **changed: Any) -> dict[str, Any]:
    contestant = dataclasses.asdict(Contestant("it", "path", "id", mode))  # type: ignore[arg-type]
    return {"contestant": contestant, "round": 0, "repeats": 2, "threads": 1, "device": "cpu",
            "seed": 0, "shapes": [dataclasses.asdict(SHAPE)], **changed}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the measured process open this model."""

    def put(model: Any, *sessions: Any) -> None:
        home = SimpleNamespace(open=lambda path, mode, device, options: (model, sessions))
        monkeypatch.setattr(generating, "OPENER", ("anything", "open"))
        monkeypatch.setattr(generating, "importlib",
                            SimpleNamespace(import_module=lambda *_: home))
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    return put


def test_the_first_token_and_the_steps_after_it_are_timed_apart(opened: Any) -> None:
    opened(Slow(0.04, 0.01))
    (found,) = generating.measure(job()).shapes
    assert len(found.samples) == 2  # the first of three calls warms up
    for sample in found.samples:
        # Sleeping takes at least so long; how much longer is the machine's.
        assert sample.first >= 0.04
        assert len(sample.steps) == SHAPE.tokens - 1
        assert all(step >= 0.01 for step in sample.steps)
        assert sample.total >= sample.first + sum(sample.steps)
    assert found.cache == 640


def test_a_model_that_stops_early_is_a_failure_not_a_fast_one(opened: Any) -> None:
    opened(Slow(0.0, 0.0, spoken=2))
    (found,) = generating.measure(job()).shapes
    assert not found.samples
    assert "2 tokens came instead of 3" in found.failure


def test_a_session_that_ran_elsewhere_makes_it_invalid(opened: Any, tmp_path: Path) -> None:
    opened(Slow(0.0, 0.0), FakeSession({"device": "cpu"}), FakeSession({"device": "cuda"}))
    (found,) = generating.measure(job()).shapes
    assert found.faults == ("asked for cpu, ran on cuda",)
    wrong = dataclasses.replace(process("mine", 0, 0.01), shapes=(dataclasses.replace(
        process("mine", 0, 0.01).shapes[0], faults=found.faults),))
    report = summary(tmp_path, wrong, process("eager", 0, 0.02))
    report.require_complete()
    with pytest.raises(IncompleteError, match=r"mine.*ran on cuda"):
        report.require_valid()


def test_company_and_throttling_make_a_line_unstable(tmp_path: Path) -> None:
    def beside(**conditions: Any) -> Process:
        (one,) = process("mine", 0, 0.01).shapes
        return dataclasses.replace(process("mine", 0, 0.01),
                                   shapes=(dataclasses.replace(one, **conditions),))

    for conditions, said in (
        ({"foreign": 0.4, "stolen": 0.2}, "others used 0.60 cores meanwhile"),
        ({"gpu": ({"throttle": ["GpuIdle", "HwSlowdown"]},)}, "GPU throttled: HwSlowdown"),
    ):
        line = summary(tmp_path, beside(**conditions)).line("mine", SHAPE)  # type: ignore[arg-type]
        assert line.verdict is not None
        assert (line.verdict.word, said in line.verdict.reasons) == ("unstable", True)
    report = summary(tmp_path, beside(gpu=({"process_bytes": 3 << 20}, {"process_bytes": None})))
    assert "| 3 MiB |" in benchmark.markdown(report)


def test_what_each_mode_asks_of_generate(opened: Any) -> None:
    asked = {}
    for mode in ("sessions", "dynamic", "static", "compiled"):
        model = Slow(0.0, 0.0)
        opened(model)
        generating.measure(job(mode))
        asked[mode] = model.asked[0]
    assert "cache_implementation" not in asked["sessions"]
    assert "cache_implementation" not in asked["dynamic"]
    assert asked["static"]["cache_implementation"] == "static"
    assert asked["static"]["disable_compile"]
    assert asked["compiled"]["compile_config"]._compile_all_devices
    assert all(a["min_new_tokens"] == a["max_new_tokens"] == 3 for a in asked.values())


def test_bytes_of_a_cache_with_an_encoders_beside_it() -> None:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own, cross = DynamicCache(), DynamicCache()
    own.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), 0)
    cross.update(torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8), 0)
    assert generating.cache_bytes(own) == 2 * 2 * 4 * 3 * 8 * 4
    assert generating.cache_bytes(EncoderDecoderCache(own, cross)) == 2 * 2 * 4 * 8 * 8 * 4
    assert generating.cache_bytes(None) is None


def process(name: str, number: int, step: float, tokens: str = "a", failure: str = "") -> Process:
    samples = tuple(Sample(10 * step, (step, step * 1.01), 13 * step) for _ in range(2))
    shapes = (Measured(SHAPE, () if failure else samples, 64, tokens, failure),)
    return Process(name, number, 1.0, 1 << 20, 1 << 21, shapes)


def request(tmp_path: Path, **changed: Any) -> generation.GenerationRequest:
    both = tuple(Contestant(n, n, n, "sessions") for n in ("eager", "mine"))
    return generation.GenerationRequest(both, (SHAPE,), tmp_path / "run", baseline="eager",
                                        **changed)


def summary(tmp_path: Path, *processes: Process) -> generation.GenerationReport:
    from modelport.runtimes.benchmark import environment

    return generation.summarise(request(tmp_path), processes, environment.read())


def test_a_speed_up_is_the_ratio_of_medians_paired_by_round(tmp_path: Path) -> None:
    pace = (0.010, 0.012, 0.011, 0.013, 0.010)
    report = summary(tmp_path, *(process("eager", n, 2 * s) for n, s in enumerate(pace)),
                     *(process("mine", n, s) for n, s in enumerate(pace)))
    line = report.line("mine", SHAPE)
    assert line.decode_speedup is not None
    assert line.decode_speedup.value == pytest.approx(2.0)
    assert line.decode_speedup.low > 1.9  # what drifts from round to round cancels
    assert line.total_speedup is not None
    assert line.total_speedup.value == pytest.approx(2.0)
    assert line.step is not None
    assert line.rate == pytest.approx(SHAPE.batch / line.step.value)
    assert line.same is True
    assert report.line("eager", SHAPE).decode_speedup is None


def test_other_ids_than_the_baselines_are_told(tmp_path: Path) -> None:
    report = summary(tmp_path, process("eager", 0, 0.02), process("mine", 0, 0.01, tokens="b"))
    assert report.line("mine", SHAPE).same is False
    shown = benchmark.markdown(report, "Title")
    assert "| no |" in shown
    assert "2.00 [" not in shown  # one round supports no interval
    assert "| 2.00 |" in shown


def test_what_failed_is_named_and_never_counted(tmp_path: Path) -> None:
    report = summary(tmp_path, process("eager", 0, 0.02), process("mine", 0, 0.01, failure="oh"))
    assert report.line("mine", SHAPE).failure == "oh"
    assert report.line("mine", SHAPE).step is None
    with pytest.raises(IncompleteError, match="mine, batch 2, prompt 4, 3 tokens: oh"):
        report.require_complete()


class Machine:
    """Runs what a process would: takes its shapes one by one, and dies where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: Any = lambda name, shape: "") -> None:
        self.dies, self.runs = dies, []
        monkeypatch.setattr(generation, "_run", self)

    def __call__(self, job: Any, place: Path, request: Any) -> str:
        name = job["contestant"]["name"]
        shapes = [Shape(**s) for s in job["shapes"]]
        self.runs.append((name, job["round"], tuple(s.batch for s in shapes)))
        if reason := self.dies(name, None):
            return reason
        before = generation.read_process(place)
        made = dataclasses.replace(process(name, job["round"], 0.01),
                                   shapes=before.shapes if before else ())
        write_json(place, dataclasses.asdict(made))
        for shape in shapes:
            if reason := self.dies(name, shape):
                return reason
            (one,) = process(name, job["round"], 0.01).shapes
            made = dataclasses.replace(
                made, shapes=(*made.shapes, dataclasses.replace(one, shape=shape)))
            write_json(place, dataclasses.asdict(made))
        return ""


THREE = tuple(Shape(batch, 4, 3) for batch in (1, 8, 64))


def asked_of(tmp_path: Path, rounds: int) -> generation.GenerationRequest:
    return dataclasses.replace(request(tmp_path, rounds=rounds), shapes=THREE)


def test_a_process_that_dies_costs_the_shape_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = {("mine", THREE[1])}
    machine = Machine(monkeypatch, lambda *at: "status -9" if at in dead else "")
    first = generation.run_generation(asked_of(tmp_path, 1))
    assert first.line("mine", THREE[1]).failure == "status -9"
    assert first.line("mine", THREE[0]).step is not None
    assert first.line("mine", THREE[2]).step is not None
    assert [r for r in machine.runs if r[0] == "mine"] == [
        ("mine", 0, (1, 8, 64)), ("mine", 0, (64,))]
    with pytest.raises(IncompleteError, match="mine, batch 8"):
        first.require_complete()
    machine.runs.clear()
    dead.clear()
    second = generation.run_generation(asked_of(tmp_path, 1))
    assert machine.runs == [("mine", 0, (8,))]
    second.require_complete()


def spoil(asked: generation.GenerationRequest, **changes: Any) -> None:
    """Change the one shape that each process left."""
    for place in asked.output.glob("*.json"):
        if place.name != generation.GENERATION:
            kept = generation.read_process(place)
            assert kept
            (one,) = kept.shapes
            wrong = dataclasses.replace(one, **changes)
            write_json(place, dataclasses.asdict(dataclasses.replace(kept, shapes=(wrong,))))


def test_what_is_invalid_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    asked = request(tmp_path, rounds=1)
    generation.run_generation(asked)
    spoil(asked, faults=("asked for cuda, ran on cpu",))
    machine.runs.clear()
    generation.run_generation(asked).require_valid()
    assert len(machine.runs) == 2


def test_another_shape_or_place_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    asked = asked_of(tmp_path, 1)
    generation.run_generation(dataclasses.replace(asked, shapes=THREE[:2]))
    machine.runs.clear()
    moved = tuple(dataclasses.replace(c, path="elsewhere") for c in asked.contestants)
    generation.run_generation(dataclasses.replace(asked, contestants=moved))
    assert sorted(machine.runs) == [("eager", 0, (64,)), ("mine", 0, (64,))]
    machine.runs.clear()
    report = generation.run_generation(dataclasses.replace(asked, shapes=THREE[1:2]))
    assert not machine.runs
    assert {m.shape for p in report.processes for m in p.shapes} == {THREE[1]}


def test_two_measurements_do_not_write_to_one_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(tmp_path, 1)

    def again(name: str, shape: Shape | None) -> str:
        with pytest.raises(UsageError, match="another sweep is writing"):
            generation.run_generation(asked)
        return ""

    Machine(monkeypatch, again)
    generation.run_generation(asked).require_complete()


def test_names_that_are_given_twice_are_named(tmp_path: Path) -> None:
    asked = request(tmp_path)
    both = tuple(dataclasses.replace(c, name="t5") for c in asked.contestants)
    with pytest.raises(UsageError, match="more than one is named t5") as caught:
        generation.run_generation(dataclasses.replace(asked, contestants=both))
    assert "rename" in caught.value.hint


def test_a_shape_that_failed_is_measured_anew_and_not_kept_as_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    asked = request(tmp_path, rounds=1)
    generation.run_generation(asked)
    spoil(asked, samples=(), failure="no memory")
    machine.runs.clear()
    generation.run_generation(asked).require_complete()
    assert len(machine.runs) == 2


def test_what_fails_in_two_rounds_is_not_started_in_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda name, shape: "gone" if shape == THREE[2] else "")
    found = generation.run_generation(asked_of(tmp_path, 5))
    asked = [r[2] for r in machine.runs if r[0] == "mine"]
    assert asked == [(1, 8, 64)] * 2 + [(1, 8)] * 3
    assert found.line("mine", THREE[2]).failed == 5
    machine = Machine(monkeypatch, lambda name, shape: "cannot open" if name == "mine" else "")
    found = generation.run_generation(
        dataclasses.replace(asked_of(tmp_path, 5), output=tmp_path / "other"))
    assert len([r for r in machine.runs if r[0] == "mine"]) == 2
    assert {found.line("mine", s).failure for s in THREE} == {"cannot open"}


def test_rounds_that_failed_are_told_beside_the_figures_of_the_others(tmp_path: Path) -> None:
    report = summary(
        tmp_path, *(process("eager", n, 0.02) for n in range(5)),
        *(process("mine", n, 0.01, failure="" if n < 2 else "no memory") for n in range(5)))
    line = report.line("mine", SHAPE)
    assert (line.failed, line.failure) == (3, "no memory")
    assert line.verdict is not None
    assert line.verdict.reasons[0] == "3 of 5 processes failed"
    shown = benchmark.markdown(report, "Title")
    assert "2.00 [" not in shown  # two processes support no interval
    assert "10 ms ±" not in shown
    with pytest.raises(IncompleteError, match="no memory"):
        report.require_complete()


def test_a_process_is_given_time_for_each_shape(tmp_path: Path) -> None:
    place = tmp_path / "place"
    shows = ("import pathlib, sys, time\n"
             "for n in range(3):\n"
             "    time.sleep(0.6)\n"
             "    pathlib.Path(sys.argv[1]).write_text(str(n))\n")
    with subprocess.Popen([sys.executable, "-c", shows, str(place)]) as child:
        assert generation._ended(child, place, 1.5) == 0
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        assert generation._ended(child, place, 0.2) is None
        child.kill()


def test_a_report_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    asked = request(tmp_path, rounds=1)
    assert generation.run_generation(asked) == benchmark.load_report(asked.output)
    with pytest.raises(UsageError, match="there is no benchmark"):
        benchmark.load_report(tmp_path)


@pytest.mark.parametrize("wrong", [(0, 4, 4), (1, 0, 4), (1, 4, 1)])
def test_shapes_that_cannot_be_measured(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="cannot be measured"):
        Shape(*wrong)


def test_a_baseline_that_is_no_contestant(tmp_path: Path) -> None:
    asked = dataclasses.replace(request(tmp_path), baseline="other")
    with pytest.raises(UsageError, match="'other'"):
        generation.run_generation(asked)


def five(tmp_path: Path, mine: float, eager: float = 0.02, seed: int = 0) -> Any:
    """Both measured in five processes, each a little off."""
    off = [1 + 1e-3 * ((n * 7 + seed) % 5) + 1e-4 * seed for n in range(5)]
    return summary(tmp_path, *(process("eager", n, eager * x) for n, x in enumerate(off)),
                   *(process("mine", n, mine * x) for n, x in enumerate(off)))


@pytest.mark.parametrize(("slower", "machine", "past"), [
    (1.0, 1.0, False), (1.2, 1.0, True), (1.2, 1.25, False)])
def test_an_older_run_is_the_measure_where_the_source_took_as_long(
    tmp_path: Path, slower: float, machine: float, past: bool
) -> None:
    """What the source itself differs by from run to run is the machine, not the artifact."""
    new = five(tmp_path, 0.01 * slower, 0.02 * machine, seed=1)
    found = benchmark.compare_runs(new, five(tmp_path, 0.01), max_regression=0.05)
    (change,) = found.changes  # the source is no artifact, however much slower it got
    assert change.label.startswith("mine")
    assert change.past_limit is past
    assert not found.only_new


def test_a_source_that_both_runs_measured_is_no_counterpart(tmp_path: Path) -> None:
    """A renamed artifact is compared with nothing, though the source is there on both sides."""
    new, old = five(tmp_path, 0.01, seed=1), five(tmp_path, 0.01)
    lines = tuple(dataclasses.replace(x, contestant="renamed") if x.contestant == "mine" else x
                  for x in old.lines)
    processes = tuple(dataclasses.replace(p, contestant="renamed") if p.contestant == "mine" else p
                      for p in old.processes)
    old = dataclasses.replace(old, lines=lines, processes=processes)
    found = benchmark.compare_runs(new, old)
    assert (len(found.only_new), len(found.only_old)) == (1, 1)
    with pytest.raises(GateRefused, match="now: mine"):
        found.require_counterparts("OLD")


def test_what_never_opened_has_no_time_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, lambda name, shape: "cannot open" if name == "mine" else "")
    report = generation.run_generation(asked_of(tmp_path, 5))
    assert "| mine | 0" not in benchmark.markdown(report)
    assert all(p.failure == "not started again: cannot open" for p in report.processes
               if p.contestant == "mine" and p.round > 1)


def test_a_process_that_cannot_open_again_gives_up_all_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def dies(name: str, shape: Shape | None) -> str:
        if shape is not None:
            return "killed" if name == "mine" and shape == THREE[0] else ""
        opened.append(name)
        return "no memory" if opened.count("mine") > 1 and name == "mine" else ""

    machine = Machine(monkeypatch, dies)
    found = generation.run_generation(asked_of(tmp_path, 1))
    assert len([r for r in machine.runs if r[0] == "mine"]) == 2
    assert [found.line("mine", s).failure for s in THREE] == ["killed", "no memory", "no memory"]


def test_a_run_of_graphs_has_no_counterpart_of_one_that_generates(tmp_path: Path) -> None:
    from benchmark_fakes import outcome, subject, typical
    from benchmark_fakes import request as graphs

    asked = graphs(tmp_path, subject("mine"), rounds=5)
    old = benchmark.summarise(asked, outcome(asked, typical({"mine": 1.0})))
    with pytest.raises(GateRefused, match="no measurement has a counterpart"):
        benchmark.compare_runs(five(tmp_path, 0.01), old).require_counterparts("OLD")


def test_verdicts_are_of_the_artifact_that_was_measured(tmp_path: Path) -> None:
    report = five(tmp_path, 0.01)
    assert list(report.verdicts("mine")) == [f"mine · {SHAPE}"]
    assert report.verdicts("another") == {}
