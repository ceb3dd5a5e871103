"""An audit in words, on its page and beside another: what fails is said first, and every bar is where it belongs."""

import re
from dataclasses import replace

import pytest

from circuitsae.audit.comparison import compare
from circuitsae.audit.page import comparison_page, figure, page
from circuitsae.audit.words import fails, in_all, open_questions, reached
from circuitsae.report.document import Document, Interval
from tests.sample_audits import sample_audit
from transcoders.errors import InputError


def test_what_fails_is_said_first_and_what_blocks_the_next_tier():
    audit = sample_audit()
    assert fails(audit) == "Disconfirmed: necessity."
    assert in_all(audit) == "Of 6 criteria: 2 confirmed, 1 partly, 1 inconclusive, 1 disconfirmed, 1 untested."
    assert open_questions(audit) == "Inconclusive: prompts. Untested: models."
    assert audit.tier == "measured"
    assert reached(audit).endswith("To be causal, it lacks necessity (disconfirmed).")
    better = replace(audit, findings=tuple(replace(one, status="partly") for one in audit.findings))
    assert fails(better) == "Nothing that was tested is disconfirmed."
    assert reached(better).startswith("The circuit is general")
    assert reached(better).endswith("There is no higher tier.")
    claim = replace(audit, findings=audit.findings[:1])
    assert "'measurement' have to be put to the test" in reached(claim)


def test_the_page_begins_with_what_fails_and_has_every_criterion():
    shown = page(sample_audit(text="<b>x"), "circuitsae audit --task ioi")
    main = shown[shown.index("<main>") :]
    assert main.index("Disconfirmed: necessity.") < main.index("necessity said") < main.index("All criteria")
    rows = re.findall(r"<tr[ >].*?</tr>", main)
    named = [row for row in rows if 'class="badge' in row]
    assert len(named) == 6
    assert ["not-met" in row for row in named] == ["necessity" in row for row in named]
    assert main.count('<svg class="interval"') == 4
    assert main.count("<figure>") == 4
    assert main.count("<details>") == 7, "the rows behind each criterion, and the circuit"
    assert "<b>x" not in main
    assert len(shown.encode()) < 1_600_000


@pytest.mark.parametrize(("confirms", "refutes"), [(0.8, 0.5), (0.2, 0.5)])
def test_an_interval_is_drawn_on_its_bars(confirms, refutes):
    made = Document("bars")
    made.table(["bar"], [[Interval("0.6", (0.6, 0.55, 0.7), (confirms, refutes))]])
    (drawn,) = re.findall(r"<svg.*?</svg>", made.html())
    zones = {kind: (float(x), float(x) + float(w)) for kind, x, w in
             re.findall(r'<rect class="(\w+)" x="([\d.]+)" width="([\d.]+)"', drawn)}  # fmt: skip
    (start, end, dot) = map(float, (*re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', drawn)[0],
                                    *re.findall(r'cx="([\d.]+)"', drawn)))  # fmt: skip
    assert start < dot < end
    if confirms > refutes:
        assert zones["bad"][0] == 0 < zones["bad"][1] < start < dot < end < zones["good"][0]
        scale = (zones["good"][0] - zones["bad"][1]) / 0.3
        assert dot == pytest.approx(zones["bad"][1] + 0.1 * scale, abs=0.2)
    else:
        assert zones["good"][0] == 0 < zones["good"][1] < zones["bad"][0] < start < dot < end


def test_an_interval_far_beyond_its_bars_leaves_them_in_sight():
    made = Document("bars")
    made.table(["bar"], [[Interval("-9", (-9.0, -900.0, 0.4), (0.5, 0.0))]])
    (drawn,) = re.findall(r"<svg.*?</svg>", made.html())
    widths = [float(w) for w in re.findall(r'<rect class="\w+" x="[\d.]+" width="([\d.]+)"', drawn)]
    assert min(widths) > 5


def test_a_figure_has_every_point_with_its_interval_and_the_levels():
    chart = sample_audit().findings[1].chart
    assert chart is not None
    made = figure(chart)
    assert [list(trace.y) for trace in made.data] == [[0.5], [0.7]]  # pyright: ignore[reportAttributeAccessIssue]
    assert [trace.error_y.array[0] for trace in made.data] == pytest.approx([0.1, 0.1])  # pyright: ignore
    assert made.layout.shapes[0].y0 == 0.6  # pyright: ignore[reportAttributeAccessIssue]
    along = figure(replace(chart, x=[0.0, 1.0], series=(), low=(), high=()))
    assert [trace.mode for trace in along.data] == ["lines+markers"]  # pyright: ignore[reportAttributeAccessIssue]
    cloud = figure(replace(chart, x=[1.0, 0.0], series=()))
    assert [trace.mode for trace in cloud.data] == ["markers"]  # pyright: ignore[reportAttributeAccessIssue]


def test_two_audits_are_compared_by_criterion():
    a, b = sample_audit(), sample_audit(shift=0.5)
    both = compare(a, replace(b, findings=b.findings[:-1]), ("ours", "theirs"))
    rows = {row["criterion"]: row for row in both.frame().to_dict("records")}
    assert rows["necessity"]["difference"] == pytest.approx(0.5)
    assert (rows["necessity"]["status_a"], rows["necessity"]["status_b"]) == ("disconfirmed", "partly")
    assert rows["necessity"]["apart"] == "apart"
    assert rows["sufficiency"]["apart"] == "apart"
    assert rows["prompts"]["status_b"] == ""
    assert rows["prompts"]["apart"] == ""
    assert "necessity (disconfirmed and partly)" in both.said
    assert compare(a, sample_audit(shift=0.01)).rows[2].apart == "overlap"
    shown = comparison_page(both)
    assert "theirs:" in shown
    assert "+0.50" in shown
    with pytest.raises(InputError, match="'ioi' and 'induction'"):
        compare(a, sample_audit(task="induction"))
