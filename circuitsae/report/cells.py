"""What a notebook shows of a graph, a validation, a card or an intervention: small tables, no script, nothing loaded.

Texts of models and files are untrusted; all of them are escaped here. Styles are on the elements, in colours that can
be read on light and on dark.
"""

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from circuitsae.graph.like import EDGE_COLUMNS, NODE_COLUMNS, GraphLike, require, scores_of
from circuitsae.graph.notes import CLAIMS, VERDICTS, Claim
from circuitsae.report.cards import card_data
from circuitsae.report.claims import verdicts_shown
from circuitsae.report.text import cut, printable, shorten, visible
from transcoders.token_text import join_tokens

_SCORE_NAMES = {"past": "share past the features"}
_LOGITS = 5
_EDGES = 8
_WIDTH = 60
_CELL = "text-align:left;vertical-align:top;padding:2px 10px 2px 0"
_DIGITS_CELL = "text-align:right;vertical-align:top;padding:2px 10px 2px 0;font-variant-numeric:tabular-nums"
_BLUE, _VIOLET = "0,114,178", "140,90,220"
_SIGNS = {"confirmed": "✓", "attention": "A", "norms": "N", "reversed": "⇄", "null": "○", "undecided": "?"}
_COLOURS = {"confirmed": "0,158,115", "attention": _BLUE, "norms": _VIOLET, "reversed": "204,60,140"}
_GREY = "128,128,128"
_CLAIM_NAMES = {"graph": "graph", "direct": "direct edge", "model": "model effect"}


class Markup(str):
    """Text that is HTML already, made here."""

    __slots__ = ()


class Digits(Markup):
    """A number as it is shown."""

    __slots__ = ()


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; what is no `Markup` is escaped, and numbers stand to the right, as the heads of their columns do."""
    lines = [[_cell(value) for value in row] for row in rows]
    styles = [_style(cell) for cell in lines[0]] if lines else [_CELL] * len(head)
    columns = "".join(
        f'<th scope="col" style="{style}">{_text(name)}</th>' for name, style in zip(head, styles, strict=False)
    )
    cells = ("".join(f'<td style="{_style(cell)}"><bdi>{cell}</bdi></td>' for cell in line) for line in lines)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    title = (
        f'<caption style="text-align:left;font-weight:600;white-space:nowrap">{_text(caption)}</caption>'
        if caption
        else ""
    )
    first = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<table style="margin:6px 0 10px">{title}{first}<tbody>{body}</tbody></table>'


def _style(cell: Markup) -> str:
    return _DIGITS_CELL if isinstance(cell, Digits) else _CELL


def _cell(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(_text(value))


def _text(value: Any) -> str:
    return html.escape(str(value))


def number(value: float | None, sign: str = "") -> Digits:
    """Three digits; a dash for what is missing."""
    return Digits("–" if value is None or math.isnan(value) else f"{value:{sign}.3g}")


def _paragraph(*parts: Any) -> str:
    return f'<p style="margin:4px 0">{"".join(map(_cell, parts))}</p>'


def _piece(*parts: str) -> str:
    return f'<div class="circuitsae">{"".join(parts)}</div>'


# graphs


def summary_html(graph: GraphLike) -> str:
    """Prompt, counts, scores, top logits and strongest edges as a piece of HTML; the text in it is untrusted."""
    nodes = require(graph.nodes_frame(), NODE_COLUMNS, "nodes_frame()")
    edges = require(graph.edges_frame(), EDGE_COLUMNS, "edges_frame()")
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(nodes["kind"].tolist()).items())
    prompt = shorten(visible(join_tokens(graph.tokens), most=None), 400)
    facts: list[tuple[str, Any]] = [
        ("prompt", prompt),
        ("nodes", f"{len(nodes)} ({counts})"),
        ("edges", f"{len(edges):,}"),
    ]
    if model := graph.provenance.get("model"):
        facts.insert(1, ("model", shorten(str(model), _WIDTH)))
    facts += [(_SCORE_NAMES.get(name, f"{name} score"), str(number(value))) for name, value in scores_of(graph).items()]
    return _piece(table("Attribution graph", (), facts), _tops(nodes), _strongest(nodes, edges))


def _tops(nodes: pd.DataFrame) -> str:
    explained = "explained" in nodes
    tops = nodes.query("explained" if explained else "kind == 'logit'")
    rows = tops.sort_values("probability", ascending=False, kind="stable").head(_LOGITS).to_dict("records")
    return table(
        "What is explained" if explained else "Top logits",
        ("what", "value") if explained else ("token", "probability"),
        [
            (
                visible(str(row["text"])) if row["kind"] == "logit" else row["id"],
                number(row["pre_activation" if row.get("explained") else "probability"]),
            )
            for row in rows
        ],
    )


def _strongest(nodes: pd.DataFrame, edges: pd.DataFrame) -> str:
    strongest = edges.iloc[np.argsort(-np.abs(edges["weight"].to_numpy(float)), kind="stable")[:_EDGES]]
    names = dict(zip(nodes["id"].tolist(), (_name(row) for row in nodes.to_dict("records")), strict=True))
    claim, verdicts = verdicts_shown(strongest)
    judged = [(badge(verdict),) for verdict in verdicts] or [()] * len(strongest)
    columns = [strongest[name].tolist() for name in ("source", "target", "weight")]
    return table(
        f"Strongest {len(strongest)} edges",
        ("source", "target", "weight", *([f"verdict ({claim})"] if claim else [])),
        [
            (names.get(source, source), names.get(target, target), number(weight, "+"), *verdict)
            for source, target, weight, verdict in zip(*columns, judged, strict=True)
        ],
    )


def _name(row: Mapping[Any, Any]) -> str:
    text = visible(str(row["text"])) if row["kind"] in ("token", "logit") else ""
    return f"{row['id']} {shorten(text, 24)}".strip()


# validations


@runtime_checkable
class Validated(Protocol):
    """A validation, as `circuitsae.validation.Validation`."""

    @property
    def edges(self) -> pd.DataFrame: ...
    @property
    def claims(self) -> tuple[Claim, ...]: ...
    @property
    def share(self) -> float: ...
    @property
    def frozen_error(self) -> float: ...
    @property
    def logit_error(self) -> float: ...
    def verdicts(self, claim: Any = ..., /) -> Mapping[str, int]: ...
    def agreement(self, claim: Any = ..., /) -> Mapping[str, Any]: ...


def badge(verdict: Any, count: int | None = None) -> Markup:
    """A verdict with its sign and colour; nothing for what is none."""
    if verdict not in VERDICTS:
        return Markup("")
    words = f"{_SIGNS[verdict]} {verdict}" if count is None else f"{_SIGNS[verdict]} {count} {verdict}"
    colour = _COLOURS.get(verdict, _GREY)
    style = f"background:rgba({colour},.2);border-radius:3px;padding:0 5px;white-space:nowrap"
    return Markup(f'<span style="{style}">{words}</span>')


def validation_html(check: Validated) -> str:
    """Verdicts and agreement claim by claim, how far the checks of the code are off, and the strongest edges."""
    rows = [_claim_row(check, claim) for claim in check.claims]
    older = [] if rows else [("older validation", _badges(check.verdicts()), *[Digits("–")] * 3)]
    held = "" if math.isnan(check.share) else f"They hold {100 * check.share:.0f} % of the influence. "
    exact = (
        f"With what is frozen held, effects equal edges to {check.frozen_error:.1e} of the largest; "
        f"the replacement's logits equal the model's to {check.logit_error:.1e}."
    )
    return _piece(
        table(
            f"Validation of {len(check.edges):,} edges",
            ("claim", "verdicts", "rank correlation", "same sign", "within a factor of two"),
            rows + older,
        ),
        _paragraph(held, exact),
        _tested(check),
    )


def _claim_row(check: Validated, claim: Claim) -> tuple[Any, ...]:
    found = check.agreement(claim)["all"]
    verdicts = Markup("reported without a verdict") if claim == "model" else _badges(check.verdicts(claim))
    shares = (Digits("–" if math.isnan(share) else f"{100 * share:.0f} %") for share in (found.sign, found.within))
    return _CLAIM_NAMES[claim], verdicts, number(found.spearman), *shares


def _badges(verdicts: Mapping[str, int]) -> Markup:
    return Markup(" ".join(badge(verdict, count) for verdict, count in verdicts.items()))


def _tested(check: Validated) -> str:
    """The strongest of the tested edges: predicted, measured and judged."""
    edges = check.edges
    size = "weight" if "weight" in edges else "predicted"
    order = np.argsort(-np.abs(edges[size].to_numpy(float)), kind="stable")[:_EDGES]
    rows = edges.iloc[order].to_dict("records")
    first = "graph_" if "graph" in check.claims else ""
    judged = {f"{claim}_verdict": _CLAIM_NAMES[claim] for claim in CLAIMS if f"{claim}_verdict" in edges} or {
        "verdict": "verdict"
    }
    return table(
        f"Strongest {len(rows)} of them",
        ("source", "target", "predicted", "measured", *judged.values()),
        [
            (
                *(shorten(printable(str(row[end])), _WIDTH) for end in ("source", "target")),
                *(number(row.get(f"{first}{name}"), "+") for name in ("predicted", "measured")),
                *(badge(row.get(name)) for name in judged),
            )
            for row in rows
        ],
    )


# features


def card_html(card: Mapping[str, Any], *, examples: int = 5) -> str:
    """A feature card: its label, how often it fires, examples with each token as dark as its activation, its logits."""
    card = card_data(card)
    label = card.get("label") or {}
    status = f" — {label['status']}" if label.get("display") else ""
    title = f"<b>{card['layer']}.{card['feature']}</b> {_text(label.get('display', ''))}{_text(status)}"
    drawn = [_example(example, card.get("max_activation")) for example in card.get("examples", ())[:examples]]
    logits = [_logits(name, card.get(key)) for name, key in (("raises", "top_logits"), ("lowers", "bottom_logits"))]
    like = ", ".join(f"{row['layer']}.{row['feature']} ({row['score']:.2f})" for row in card.get("nearest", ()))
    return _piece(
        _paragraph(Markup(title)),
        _paragraph(_fires(card)),
        *drawn,
        *(_paragraph(Markup(line)) for line in logits if line),
        *([_paragraph(f"writes alike: {like}")] if like else []),
    )


def _fires(card: Mapping[str, Any]) -> str:
    seen = f" of {card['tokens_seen']:,} tokens" if card.get("tokens_seen") is not None else ""
    if card.get("dead"):
        return f"dead: it never fired{seen and ' in' + seen[3:]}"
    rate = "" if card.get("firing_rate") is None else f"fires on {100 * card['firing_rate']:.3g} %{seen}"
    most = "" if card.get("max_activation") is None else f"strongest {card['max_activation']:.3g}"
    return ", ".join(filter(None, (rate, most)))


def _example(example: Mapping[str, Any], most: float | None) -> str:
    most = max(most or 0, *example["activations"], 1e-9)
    tokens = [example["tokens"][0].lstrip(" "), *example["tokens"][1:]]
    shown = "".join(
        _token(token, value / most, t == example["peak"])
        for t, (token, value) in enumerate(zip(tokens, example["activations"], strict=True))
    )
    strength = f'<span style="display:inline-block;width:3.5em;opacity:.7">{max(example["activations"]):.3g}</span>'
    style = "margin:1px 0;white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<div style="{style}">{strength}<bdi>{shown}</bdi></div>'


def _token(token: str, heat: float, peak: bool) -> str:
    if heat <= 0 and not peak:
        return _text(token)
    outline = f";box-shadow:0 0 0 1px rgba({_VIOLET},1)" if peak else ""
    style = f"background:rgba({_VIOLET},{0.08 + 0.5 * min(1.0, heat):.2f});border-radius:2px{outline}"
    return f'<span style="{style}">{_text(token)}</span>'


def _logits(name: str, rows: Sequence[Mapping[str, Any]] | None) -> str:
    told = " ".join(f"<bdi><code>{_text(row['token'])}</code></bdi> {number(row['value'], '+')}" for row in rows or ())
    return f"{name}: {told}" if told else ""


def cards_html(manifest: Mapping[str, Any], features: pd.DataFrame, names: Sequence[str]) -> str:
    """What cards were collected from, how many features live by layer, and the most active ones with their `names`.

    features: `FeatureCards.frame()`, whose rows with the highest `max` the names are of.
    """
    facts = [
        (name, shorten(printable(str(manifest[name])), _WIDTH))
        for name in ("model", "kind", "corpus")
        if name in manifest
    ]
    layers = features["layer"].to_numpy()
    columns = np.stack(
        [np.ones(len(features), bool), features["dead"].to_numpy(bool), features["label"].to_numpy() != ""]
    )
    counts = {int(layer): columns[:, layers == layer].sum(1).tolist() for layer in np.unique(layers)}
    most = features.nlargest(len(names), "max").to_dict("records")
    return _piece(
        table(f"Cards of {len(features):,} features", (), [*facts, ("tokens", f"{manifest['tokens_seen']:,}")]),
        table(
            "",
            ("layer", "features", "dead", "labelled"),
            [(layer, *(Digits(f"{count:,}") for count in row)) for layer, row in counts.items()],
        ),
        table(
            "Most active",
            ("feature", "label, or the tokens it is strongest on", "fires", "strongest"),
            [
                (
                    f"{row['layer']}.{row['feature']}",
                    shorten(printable(name), 2 * _WIDTH),
                    Digits(f"{100 * row['firing_rate']:.3g} %"),
                    number(row["max"]),
                )
                for row, name in zip(most, names, strict=True)
            ],
        ),
        _paragraph("cards.card(layer, feature) shows one of them."),
    )


# interventions

_PAIRS = 6
_TEXT = 2000


def outcome_html(document: Mapping[str, Any]) -> str:
    """What a model says before and after, alternative by alternative; `document`: `Outcome.to_json()`."""
    pairs: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in document["top"]:
        pairs.setdefault((row["prompt"], row["alternative"]), []).append(row)
    parts = []
    for (prompt, alternative), rows in list(pairs.items())[:_PAIRS]:
        if alternative == 0:
            text = shorten(printable(document["prompts"][prompt]), 400)
            parts.append(_paragraph(Markup(f"<b>{_text(text)}</b>")))
        parts.append(_change(document["alternatives"][alternative], document["kl"][prompt][alternative], rows))
    left = len(pairs) - _PAIRS
    more = [_paragraph(f"and {left} more; outcome.top() has all of them.")] if left > 0 else []
    return _piece(*parts, *more)


def _change(changes: Sequence[str], kl: float, rows: Sequence[Mapping[str, Any]]) -> str:
    done = shorten("; ".join(map(printable, changes)), 2 * _WIDTH) or "nothing changed"
    counted = f"{len(changes)} changes: {done}" if len(changes) > 1 else done
    colours = {"before": _GREY, "after": _BLUE}
    return _paragraph(f"{counted} (KL {kl:.3g} nats)") + table(
        "",
        ("token", "before", "", "after", ""),
        [
            (
                visible(str(row["text"])),
                *(f(row[f"probability_{run}"], colour) for run, colour in colours.items() for f in (_percent, _bar)),
            )
            for row in rows
        ],
    )


def _percent(share: float, _colour: str) -> Digits:
    return Digits("–" if math.isnan(share) else "&lt; 0.01 %" if share < 5e-5 else f"{100 * share:.2f} %")


def _bar(share: float, colour: str) -> Markup:
    width = 0 if math.isnan(share) else 90 * min(1.0, share)
    return Markup(
        f'<span style="display:inline-block;width:90px"><span style="display:inline-block;height:9px;'
        f'width:{width:.1f}px;background:rgba({colour},.8)"></span></span>'
    )


def continuations_html(rows: Iterable[Mapping[Any, Any]]) -> str:
    """What a model writes on, itself and with changes; `rows`: `interventions` and `text`."""
    return _piece(
        table(
            "Continuations",
            ("change", "text"),
            [
                (shorten(row["interventions"], 2 * _WIDTH) or "the model", printable(cut(row["text"], 2000)))
                for row in rows
            ],
        )
    )
