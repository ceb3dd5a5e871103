"""What a notebook's cell shows: the figures are those of what is shown, its texts are inert, a page is in a frame."""

import builtins
import html
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import circuitsae as cs
from circuitsae.features import FeatureCards
from circuitsae.features.cards import FeatureCard
from circuitsae.interventions import Feature, Intervention, Zero, generate, intervene
from circuitsae.interventions.steering import Limits, SteeringReport
from circuitsae.interventions.steering.page import page as steering_page
from circuitsae.pocket import dictionary_folder
from circuitsae.report import card_html, graph_html, interactive, notebook, outcome_html, show, summary_html
from circuitsae.report.page import assemble, document
from circuitsae.validation import Validation
from tests.sample_graphs import sample_graph, small_graph, whole_graph
from transcoders import random_dictionaries
from transcoders.errors import InputError
from transcoders.random_models import random_model

HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", '"quote', "\u2028", "\u202eabc", "\0"]
TAGS = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "bdi", "span", "p", "b", "code"}


class Read(HTMLParser):
    """Words, rows of cells, and tags of a piece of HTML; nothing in it may run or load."""

    def __init__(self, piece: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(piece)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all(name in ("class", "style", "scope") for name, _ in attrs)
        assert not any("url(" in (value or "") for _, value in attrs)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


def read(piece: str) -> Read:
    found = Read(piece)
    assert found.tags <= TAGS
    return found


def source_of(piece: str) -> str:
    """The page inside a frame."""
    (found,) = re.findall(r'<iframe [^>]* srcdoc="([^"]*)"></iframe>', piece)
    return html.unescape(found)


def test_a_summary_of_a_graph():
    found = read(summary_html(small_graph()))
    for word in ("<s> a", "5 (1 feature, 1 error, 1 token, 1 bias, 1 logit)", "·b", "0.75", "✓ confirmed", "+2"):
        assert word in found.words, word
    assert [trace["name"] for trace in small_graph().to_figure().to_dict()["data"]][-1] == "logit"


def test_hostile_graphs_are_text():
    graph = sample_graph(tokens=HOSTILE, n_features=5, n_edges=30)
    graph.provenance = {"model": "<script>alert(1)</script>"}
    graph.edges["graph_verdict"] = "<u>"
    found = read(summary_html(graph))
    assert "<script>alert(1)</script>" in found.words
    assert len(summary_html(graph)) < 20_000


def test_a_graph_shows_its_page_in_a_frame_without_origin():
    graph = whole_graph(HOSTILE)
    piece = graph._repr_html_()
    assert source_of(piece) == assemble(document(graph))
    assert 'sandbox="allow-scripts allow-downloads"' in piece
    assert not re.search(r'<(?!iframe|/iframe)|"\s+on', re.sub(r'srcdoc="[^"]*"', "", piece))


def test_a_page_in_a_cell_may_take_plotly_from_its_server():
    graph = small_graph()
    inline, lean = (len(graph.show(plotlyjs=source, height=300).html) for source in ("inline", "cdn"))
    assert inline - lean > 1_000_000
    assert repr(graph.show()).startswith("Shown(")
    assert "height:300px" in show(graph, height=300)._repr_html_()
    with pytest.raises(InputError, match="plotlyjs='directory' is not for a notebook's cell"):
        graph.show(plotlyjs="directory")


@pytest.mark.parametrize(("limit", "most"), [("MOST_EDGES", 3), ("MOST_BYTES", 1000)])
def test_a_graph_with_too_large_a_page_shows_a_summary(monkeypatch, limit, most):
    graph = small_graph()
    monkeypatch.setattr(notebook, limit, most)
    piece = graph_html(graph)
    assert piece.startswith(summary_html(graph))
    assert any("With 4 edges its page is too large" in word for word in read(piece).words)


def test_a_widget_needs_anywidget(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("anywidget") or name == "circuitsae.report.widget":
            raise ModuleNotFoundError("No module named 'anywidget'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"No module named 'anywidget'.*pip install 'circuitsae\[notebook\]'"):
        small_graph().interactive()


def test_a_widget_has_and_takes_nodes_of_its_graph_only():
    graph = small_graph()
    ids = graph.ids.tolist()
    widget = interactive(graph, opened={"groups": {"both": ids[:2]}, "pinned": [ids[2]]})
    assert (widget.graph, widget.chosen, widget.pinned, widget.groups) == (graph, None, [ids[2]], {"both": ids[:2]})
    assert set(graph.group(widget.supernodes)) == {"both", *ids[2:]}
    assert widget.opened == {"groups": {"both": ids[:2]}, "pinned": [ids[2]]}
    widget.chosen = ids[0]
    for trait, value in {"chosen": "9.9@9", "pinned": ["9.9@9"], "groups": {"a": ["9.9@9"]}}.items():
        with pytest.raises(InputError, match="Node '9.9@9' is not among the 5 of this graph"):
            setattr(widget, trait, value)
    assert (widget.chosen, widget.pinned) == (ids[0], [ids[2]])


@pytest.fixture(scope="module")
def check() -> Validation:
    graph = sample_graph(validated=60)
    tested = graph.edges[graph.edges["graph_measured"].notna()].assign(kind="feature→feature")
    return Validation(tested.reset_index(drop=True), share=0.25, frozen_error=1e-7, logit_error=2e-7)


def test_a_validation_shows_its_verdicts_and_agreement(check):
    found = read(check._repr_html_())
    for claim, name in {"graph": "graph", "direct": "direct edge", "model": "model effect"}.items():
        row, agreement = found.row(name), check.agreement(claim)["all"]
        for verdict, count in check.verdicts(claim).items():
            assert f"{count} {verdict}" in row[1]
        assert row[2:] == [
            f"{agreement.spearman:.3g}",
            f"{100 * agreement.sign:.0f} %",
            f"{100 * agreement.within:.0f} %",
        ]
    strongest = check.edges.iloc[int(np.argmax(np.abs(check.edges["weight"])))]
    row = found.row(strongest["source"])
    assert row[1:4] == [strongest["target"], *(f"{strongest[f'graph_{n}']:+.3g}" for n in ("predicted", "measured"))]
    assert row[4].endswith(strongest["graph_verdict"])
    assert any("They hold 25 % of the influence" in word for word in found.words)


def test_validations_that_are_old_hostile_or_empty(check):
    edges = pd.DataFrame(
        {"source": HOSTILE[:2], "target": HOSTILE[:2], "predicted": [1.0, 2.0], "measured": [1.0, np.nan]}
    ).assign(verdict=["confirmed", "<b>"])
    found = read(Validation(edges, format="old")._repr_html_())
    assert "1 confirmed" in found.row("older validation")[1]
    assert found.row(HOSTILE[0])[2:] == ["+1", "+1", "✓ confirmed"]
    read(Validation(check.edges.head(0))._repr_html_())


def test_a_card_marks_tokens_by_activation():
    card = {
        "layer": 1,
        "feature": 2,
        "firing_rate": 0.01,
        "tokens_seen": 1000,
        "max_activation": 4.0,
        "examples": [{"tokens": [" a", *HOSTILE], "activations": [2.0, 4.0, 0, 0, 0, 0, 0], "peak": 1}],
        "top_logits": [{"token": HOSTILE[1], "value": 1.5}],
        "label": {"text": HOSTILE[0], "status": "supported", "display": HOSTILE[0], "evidence": []},
    }
    piece = card_html(card)
    found = read(piece)
    assert any("fires on 1 % of 1,000 tokens, strongest 4" in word for word in found.words)
    heats = re.findall(r"rgba\(140,90,220,(0\.\d\d)\)", piece)
    assert [float(heat) for heat in heats] == pytest.approx([0.08 + 0.25, 0.08 + 0.5])
    assert piece.count("box-shadow") == 1
    assert "+1.5" in "".join(found.words)


def test_cards_of_pocket_and_dead_ones():
    cards = FeatureCards.load(dictionary_folder("pocket"))
    found = read(cards._repr_html_())
    frame = cards.frame()
    strongest = frame.loc[frame["max"].idxmax()]
    assert found.row(f"{strongest['layer']}.{strongest['feature']}")[3] == f"{strongest['max']:.3g}"
    assert found.row("tokens")[1] == f"{cards.tokens_seen:,}"
    some = cards.card(0, 3)
    assert some is not None
    text = "".join(read(some._repr_html_()).words)
    assert f"fires on {100 * some.firing_rate:.3g} %" in text
    dead = FeatureCard(0, 1, 0.0, 500, dead=True, max_activation=0.0, mean_activation=0.0)
    assert "dead: it never fired in 500 tokens" in "".join(read(dead._repr_html_()).words)


def test_an_outcome_shows_what_the_model_says():
    model = cs.ReplacementModel(
        random_model("gpt2", n_layers=2, d_model=16), random_dictionaries("plt", n_layers=2, d_model=16, features=24)
    )
    changes = [[Intervention(Feature(0, index, 2), Zero())] for index in range(2)]
    outcome = intervene(model, [torch.tensor([1, 2, 3])], changes)
    found = read(outcome._repr_html_())
    heads = [word for word in found.words if "nats" in word]
    assert heads == [f"0.{i}@2 zero (KL {outcome.kl()[0, i, -1]:.3g} nats)" for i in range(2)]
    likeliest = outcome.changed[0, 0, -1].softmax(-1)
    assert found.rows[1][3] == f"{100 * likeliest.max():.2f} %"
    before = outcome.clean[0, -1].softmax(-1)[likeliest.argmax()]
    assert found.rows[1][1] == f"{100 * before:.2f} %"
    written = generate(model, torch.tensor([1, 2, 3]), changes, n=3)
    assert [row[0] for row in read(written._repr_html_()).rows] == ["change", "the model", "0.0@2 zero", "0.1@2 zero"]


def test_many_and_hostile_outcomes():
    row = {"text": HOSTILE[1], "probability_before": float("nan"), "probability_after": 2e-5}
    document = {
        "prompts": [HOSTILE[0]] * 4,
        "alternatives": [[HOSTILE[1]], []],
        "kl": [[0.5, 0.25]] * 4,
        "top": [{"prompt": p, "alternative": a, **row} for p in range(4) for a in range(2)],
    }
    found = read(outcome_html(document))
    assert "and 2 more; outcome.top() has all of them." in found.words
    assert found.words.count(HOSTILE[0]) == 3
    assert found.rows[1][1:] == ["–", "", "< 0.01 %", ""]


def test_steering_shows_its_page_in_a_frame():
    effects = pd.DataFrame(columns=["set", "prompt", "control", "strength", "before", "after", "effect"])
    written = pd.DataFrame(columns=["prompt", "strength", "text"])
    table = pd.DataFrame({"strength": [1.0], "effect": [0.5], "control": [1.0], "broken": [""]}).assign(
        **dict.fromkeys(("held_out_effect", "held_out_control", "kl", "control_kl", "loss_rise"), 0.0),
        **dict.fromkeys(("control_loss_rise", "distinct"), 0.0),
    )
    counts = {"prompts": 1, "held_out": 0, "unrelated": 0, "controls": 0}
    report = SteeringReport(
        HOSTILE[1], HOSTILE[0], "add", (1.0,), "a − b", "up", 1.0, Limits(), table, effects, written, counts
    )
    shown = source_of(report._repr_html_())
    figure = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")  # plotly draws the id of a figure by lot
    assert figure.sub("", shown) == figure.sub("", steering_page(report.to_json()))
    assert "no strength moves the metric up by more than every control" in shown
