"""The picture of docs/attention.md: the pairs that make head 1.1 of the pocket model look at *John* and not at *Mary*.

Needs playwright, a Chromium and pillow.
"""

import numpy as np
import plotly.graph_objects as go
from drawing import save_figure

import circuitsae as cs
from circuitsae.attribution import AttentionReasons, explain_attention
from circuitsae.features.cards import FeatureCards
from circuitsae.pocket import dictionary_folder

WIDTH, HEIGHT = 1000, 620
PROMPT = "When John and Mary went to the store, John gave a drink to"
MOST = 10
"""Sources of each side that are shown one by one."""


def reasons() -> AttentionReasons:
    model = cs.ReplacementModel(cs.load_model("pocket", dtype="float64"), cs.load_dictionaries("pocket"))
    cards = FeatureCards.load(dictionary_folder("pocket"))
    return explain_attention(model, PROMPT, layer=1, head=1, query=-1, key=10, names=cards.name).contrast(4)


def figure(why: AttentionReasons) -> go.Figure:
    """Contributions pair by pair, of the sources that give most on either side and of all others together."""
    matrix = why.matrix().numpy()
    rows, row_names = strongest(matrix.sum(1), [named(s.id, s.text) for s in why.query_sources])
    columns, column_names = strongest(matrix.sum(0), [named(s.id, s.text) for s in why.key_sources])
    shown = rows @ matrix @ columns.T
    drawn = go.Figure(
        go.Heatmap(
            z=shown, x=column_names, y=row_names, colorscale="RdBu_r", zmid=0, text=np.round(shown, 2),
            texttemplate="%{text:+.2f}", textfont={"size": 10}, colorbar={"title": "part of the score"},
        )
    )  # fmt: skip
    drawn.update_layout(
        template="plotly_white", width=WIDTH, height=HEIGHT, margin={"l": 10, "r": 10, "t": 20, "b": 10},
        xaxis={"title": "what wrote the key: more at ·John@10 than at ·Mary@4", "tickangle": 40, "automargin": True},
        yaxis={"title": "what wrote the query, ·to@14", "autorange": "reversed", "automargin": True},
    )  # fmt: skip
    return drawn


def strongest(total: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Ones that pick each of the strongest sources, and add up all others; and what these rows are called."""
    order = np.argsort(-np.abs(total), kind="stable")
    pick = np.zeros((MOST + 1, len(total)))
    pick[np.arange(MOST), order[:MOST]] = 1
    pick[MOST, order[MOST:]] = 1
    return pick, [names[i] for i in order[:MOST]] + [f"{len(total) - MOST} others"]


def named(id: str, text: str) -> str:
    return f"{id} {' / '.join(text.split(' / ')[:2])}".strip()


if __name__ == "__main__":
    save_figure(figure(reasons()), "attention")
