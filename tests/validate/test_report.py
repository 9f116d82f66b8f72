"""Every view says the same, survives hostile names, and loads nothing from outside."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import browser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from junitparser import JUnitXml
from modelport.errors import UsageError
from modelport.validate import (
    CaseRecord,
    Effect,
    EffectBudget,
    LeftOut,
    ParityReport,
    Result,
    Rule,
    from_json,
    joined,
    judge,
    markdown,
    plan,
    table,
    to_html,
    to_junit,
)
from rich.console import Console
from toy_transformer import MUTANTS, Variant, toy_spec, varied

PLAN = plan(toy_spec(), sizes={"batch": (1, 3), "sequence": (2, 17)})


def report_of(candidate) -> ParityReport:
    return judge(candidate, varied(Variant()), varied(Variant(), dtype="float64"), PLAN)


@pytest.fixture(scope="module")
def passed() -> ParityReport:
    return report_of(varied(Variant(fuse=True)))


@pytest.fixture(scope="module")
def failed() -> ParityReport:
    found = report_of(MUTANTS["crash at one length"]())
    return replace(found, left_out=(LeftOut("batch=9 sequence=9 none matrix 0", "no time"),))


NUMBER = st.none() | st.floats(0, 1e300)
NAME = st.text(max_size=12)
VERDICT = st.sampled_from(["pass", "suspect", "fail"])
RESULT = st.builds(
    Result, NAME, NAME, st.sampled_from(["hygiene", "translation", "precision"]), VERDICT, NAME,
    st.integers(0, 99), st.integers(0, 99), NUMBER, NUMBER, st.none() | st.integers(0, 9), NUMBER,
    NUMBER, NUMBER, NUMBER, st.lists(st.integers(0, 9), max_size=4).map(tuple))
EFFECT = st.builds(Effect, NAME, st.sampled_from(["logits", "embedding"]), st.integers(0, 9),
                   NUMBER, NUMBER, broken=st.lists(NAME, max_size=2).map(tuple))
CASE = st.builds(CaseRecord, NAME, NAME, st.sampled_from(["none", "right"]), st.integers(0, 5),
                 NAME, st.floats(0, 100))
REPORT = st.builds(
    ParityReport, VERDICT, st.dictionaries(NAME, VERDICT, max_size=3),
    st.builds(Rule, st.floats(0, 9)), st.booleans(), st.integers(0, 9999),
    st.lists(CASE, max_size=3).map(tuple), st.lists(RESULT, max_size=4).map(tuple),
    st.lists(st.builds(LeftOut, NAME, NAME), max_size=3).map(tuple),
    st.lists(NAME, max_size=2).map(tuple), st.dictionaries(NAME, NAME, max_size=2),
    st.floats(0, 100), st.lists(EFFECT, max_size=2).map(tuple),
    st.none() | st.builds(EffectBudget, NUMBER, set_by=st.sampled_from(["flag", "file"])))


@given(REPORT)
def test_json_gives_the_same_report_back(report):
    text = report.to_json()
    assert from_json(text) == report
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


@given(REPORT)
def test_every_view_takes_any_report(report):
    Console(file=io.StringIO()).print(table(report))
    assert len(markdown(report, 4096).encode()) <= 4096
    JUnitXml.fromstring(to_junit(report).encode())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"verdict": "fine"}', "\x00", '{"schema": 2}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(UsageError, match="not a parity report"):
        from_json(text)


def test_a_summary_names_what_it_is_a_verdict_on(passed, failed):
    summary = passed.summary("abc")
    assert (summary.verdict, summary.identity, summary.left_out) == ("pass", "abc", 0)
    assert summary.comparisons == passed.comparisons > 0
    assert summary.worst_rho == passed.worst_rho
    assert failed.summary("abc").left_out == 1


class TestTerminal:
    def text(self, report, width=100):
        out = io.StringIO()
        Console(file=out, width=width, no_color=True).print(table(report))
        return out.getvalue()

    def test_shapes_outputs_and_verdict(self, passed):
        text = self.text(passed)
        assert "batch × sequence" in text
        assert "ρ pooler_output" in text
        assert "3 × 17" in text
        assert "equal" in text
        assert "parity pass" in text

    def test_failures_are_words_not_only_colours(self, failed):
        text = self.text(failed)
        assert "fail" in text
        assert "RuntimeError: no kernel for sequence 17" in " ".join(text.split())
        assert "left out: 1 planned" in text

    def test_markup_in_names_is_text(self, failed):
        result = replace(failed.results[0], output="[red]x[/red]", reason="[bold]")
        text = self.text(replace(failed, results=(result,)))
        assert "[red]x[/red]" in text

    def test_many_outputs_get_lines_of_their_own(self, passed):
        results = tuple(replace(passed.results[0], output=f"layer_{i}") for i in range(9))
        assert "layer_8" in self.text(replace(passed, results=results))


class TestMarkdown:
    def test_failures_come_first(self, failed):
        rows = [r for r in markdown(failed).splitlines() if r.startswith("| ")]
        assert "fail" in rows[2]
        assert "pass" in rows[-1]

    @pytest.mark.parametrize("limit", [200, 500, 1000])
    def test_it_is_cut_at_the_limit_and_says_so(self, failed, limit):
        text = markdown(failed, limit)
        assert len(text.encode()) <= limit
        assert "Cut here" in text

    def test_table_cells_cannot_be_broken(self, failed):
        result = replace(failed.results[0], output="a|b\n<script>x")
        text = markdown(replace(failed, results=(result,)))
        assert "a\\|b &lt;script>x" in text


class TestJUnit:
    def suite(self, report):
        (suite,) = JUnitXml.fromstring(to_junit(report, "demo").encode())
        return suite

    def test_one_case_for_each_output_shape_and_padding(self, passed):
        suite = self.suite(passed)
        keys = {(r.output, c.shape, c.padding) for r in passed.results
                for c in passed.cases if c.label == r.case}
        assert suite.tests == len(keys)
        assert suite.failures == suite.errors == suite.skipped == 0

    def test_failures_errors_and_what_was_left_out(self, failed):
        suite = self.suite(failed)
        assert suite.errors > 0
        assert suite.skipped == 1
        messages = [r.message for test in suite for r in test.result]
        assert "RuntimeError: no kernel for sequence 17" in messages

    def test_a_verdict_without_a_failing_comparison_still_fails(self, passed):
        unproven = replace(passed, verdict="fail", gates={"translation": "fail"},
                           notes=("the float32 artifact has not passed",))
        suite = self.suite(unproven)
        assert suite.failures == 1

    def test_characters_that_xml_lacks(self, failed):
        result = replace(failed.results[0], output="a\x00\x1bb", reason="\ud800 <&>")
        assert self.suite(replace(failed, results=(result,))).tests >= 1


class Loads(HTMLParser):
    """Collects whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts = 0
        self.handlers: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")


class TestHtml:
    def parsed(self, text):
        parser = Loads()
        parser.feed(text)
        return parser

    def test_the_page_loads_nothing(self, failed):
        text = to_html(failed)
        parser = self.parsed(text)
        assert parser.addresses == []
        assert parser.scripts == 1
        assert "@import" not in text.split("</style>")[0]
        assert "import(" not in re.sub(r"\w+import\(", "", text.split("const charts")[0][:2000])
        assert '"heat"' in text
        assert '"errors"' in text
        assert "no kernel for sequence 17" in text

    def test_hostile_names_are_text(self, failed):
        evil = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'
        cases = tuple(replace(c, shape=evil, label=evil) for c in failed.cases[:1])
        results = tuple(replace(r, output=evil, case=evil, reason=evil)
                        for r in failed.results[:2])
        text = to_html(replace(failed, cases=cases, results=results, notes=(evil,),
                               left_out=(LeftOut(evil, evil),), sides={"candidate": evil}), evil)
        parser = self.parsed(text)
        assert parser.scripts == 1
        assert parser.handlers == []

    @pytest.mark.skipif(browser.ABSENT is not None, reason=str(browser.ABSENT))
    def test_a_browser_draws_it_and_asks_nobody_for_anything(self, failed, tmp_path):
        evil = "</script><img src=x onerror=boom()>"
        page = tmp_path / "parity.html"
        page.write_text(to_html(replace(failed, notes=(evil,)), evil), encoding="utf-8")
        seen = browser.look(page, tmp_path, height=2000)
        assert seen.console == ()
        assert seen.requests == ()
        drawn = seen.charts()
        assert set(drawn) == {"heat", "errors"}
        assert min(drawn.values()) > 1

    def test_effects_are_shown_with_who_set_the_budget(self, passed):
        effects = (Effect("logits", "logits", 10, 31.5, broken=("agreement is 0.9",)),)
        text = to_html(passed.with_effects(effects, EffectBudget(set_by="file")))
        assert "budget set by file" in text
        assert "agreement is 0.9" in text


def test_every_view_says_why_the_effects_alone_do_not_pass(passed):
    effects = (Effect("logits", "logits", 10, 31.5, agreement=0.9, broken=("agreement is 0.9",)),
               Effect("score", "values", 10, None))
    broken = passed.with_effects(effects, EffectBudget())
    nothing = passed.with_effects((), EffectBudget())
    for report, why in ((broken, "logits: agreement is 0.9"),
                        (nothing, "no effects were measured")):
        assert report.unmet == (why,)
        assert f"fail: effects on the answers: {why}" in printed(report)
        for view in (markdown, to_html, to_junit):
            assert why in view(report)
    assert "effects on logits, 10 rows: SQNR 31.5 dB, agreement 0.9" in printed(broken)
    assert "effects on score, 10 rows: none" in printed(broken)
    assert passed.unmet == passed.with_effects(effects[1:], EffectBudget()).unmet == ()


def printed(report: ParityReport) -> str:
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(table(report))
    return out.getvalue()


def test_of_many_outputs_the_worst_of_each_shape_is_shown(passed):
    case = passed.cases[0]
    results = tuple(Result(case.label, f"present_{i}", "translation", "pass", samples=1, rho=i / 10)
                    for i in range(20))
    shown = printed(replace(passed, results=results))
    assert "present_19" in shown
    assert "present_18" not in shown
    wrong = replace(results[3], verdict="fail", reason="too far")
    shown = printed(replace(passed, results=(*results[:3], wrong, *results[4:])))
    assert "present_3" in shown
    assert "present_19" not in shown


def test_a_whole_is_as_good_as_its_worst_part(passed, failed):
    whole = joined({"encoder": passed, "decoder": failed})
    assert whole.verdict == failed.verdict != "pass"
    assert whole.gates["hygiene"] == failed.gates["hygiene"]
    assert whole.comparisons == passed.comparisons + failed.comparisons
    assert len({case.label for case in whole.cases}) == len(passed.cases) + len(failed.cases)
    assert {case.shape.split()[0] for case in whole.cases} == {"part=encoder", "part=decoder"}
    labels = {case.label for case in whole.cases}
    assert all(result.case in labels for result in whole.results if result.case != "*")
    assert [left.case for left in whole.left_out] == [
        f"part=decoder {left.case}" for left in failed.left_out]
    assert whole.sides["encoder candidate"] == passed.sides["candidate"]
    assert from_json(whole.to_json()) == whole
    assert joined({"decoder": passed}).verdict == "pass"


def test_a_gate_added_counts(passed):
    fine = Result("x", "greedy", "generation", "pass", samples=2)
    assert passed.with_results("generation", (), (fine,)).accepted
    assert passed.with_results("generation", (), ()).verdict == "fail"
    alike = replace(fine, verdict="suspect")
    assert passed.with_results("generation", (), (fine, alike)).verdict == "suspect"
