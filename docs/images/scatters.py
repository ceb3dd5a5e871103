"""Two figures of the pocket model: `PYTHONPATH=benchmarks python docs/images/scatters.py`.

`response.png` of docs/response.md: what both graphs foresee of removing a feature, against the live model's logit; the
edges of benchmarks/results/response.md from features to logits, found again by its script. `global-weights.png` of
docs/global-weights.md: the inputs of feature 2.372 over 5,000 tokens, as `circuitsae connections 2.372` finds them.

Needs playwright, a Chromium and pillow.
"""

import claims
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from drawing import save_figure
from plotly.subplots import make_subplots
from response import RESPONSES, Options, foreseen

import circuitsae as cs
from circuitsae.features import Connections
from circuitsae.features.cards import FeatureCards
from circuitsae.pocket import dictionary_folder
from circuitsae.pocket.corpus import CONTEXT, UNSEEN
from circuitsae.validation import agreement

WIDTH, HEIGHT = 1000, 440
BLUE, ORANGE = "#1d4ed8", "#b45309"
FEATURE = (2, 372)
NAMED = 6
"""Inputs with the largest |TWERA|, which are named."""


def effects() -> pd.DataFrame:
    """The edges from features to logits that the frozen graphs chose."""
    options = Options()
    model = cs.ReplacementModel(cs.load_model("pocket", dtype="float64"), cs.load_dictionaries("pocket"))
    found = foreseen(model, claims.pocket_prompts(options.n, options.seed))
    return found.query("kind == 'feature→logit' and chosen == 'frozen'")


def foretold(edges: pd.DataFrame) -> go.Figure:
    """A point per edge; both panels have the same measurements."""
    agreed = [agreement(edges[name].to_numpy(float), edges["full"].to_numpy(float)) for name in RESPONSES]
    titles = [f"{name}: rank correlation {found.spearman:.3f}" for name, found in zip(RESPONSES, agreed, strict=True)]
    drawn = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    most = 1.05 * float(edges[["full", *RESPONSES]].abs().to_numpy().max())
    for column, (name, colour) in enumerate(zip(RESPONSES, (ORANGE, BLUE), strict=True), 1):
        marker = {"color": colour, "size": 6, "opacity": 0.5}
        drawn.add_scatter(x=edges[name], y=edges["full"], mode="markers", marker=marker, row=1, col=column)
        line = {"color": "#888888", "dash": "dot", "width": 1}
        drawn.add_scatter(x=[-most, most], y=[-most, most], mode="lines", line=line, row=1, col=column)
    drawn.update_xaxes(title="foreseen: T̂ of removing the feature", range=[-most, most])
    drawn.update_yaxes(range=[-most, most])
    drawn.update_yaxes(title="measured in the live model", col=1)
    return styled(drawn)


def inputs() -> pd.DataFrame:
    """Of the feature over text that no training used, with what the cards call them."""
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))
    cards = FeatureCards.load(dictionary_folder("pocket"))
    found = Connections.collect(model, UNSEEN, [FEATURE], tokens=5_000, context=CONTEXT).inputs(FEATURE)
    named = [(feature, cards.name(*map(int, feature.split("."))).split(" / ")) for feature in found["feature"]]
    return found.assign(name=[f"{feature} {' / '.join(name[:2])}" for feature, name in named])


def connected(found: pd.DataFrame) -> go.Figure:
    """Weight against how often both are active; the area of a point goes with |TWERA|."""
    named = found["twera"].abs().rank(ascending=False) <= NAMED
    colour = np.where(found["never_together"], ORANGE, np.where(named, BLUE, "#93aef0"))
    marker = {"color": colour, "size": 6 + 70 * np.sqrt(found["twera"].abs()), "opacity": 0.7}
    drawn = go.Figure(go.Scatter(x=found["weight"], y=found["together"], mode="markers", marker=marker))
    for i, row in enumerate(found[named].sort_values(by="together").to_dict("records")):
        drawn.add_annotation(
            x=row["weight"], y=row["together"], text=row["name"], bgcolor="rgba(255,255,255,0.7)",
            showarrow=False, xanchor="left", xshift=16, yshift=9 if i % 2 else -9,
        )  # fmt: skip
    drawn.update_xaxes(title="virtual weight into 2.372", range=[-0.5, 1])
    drawn.update_yaxes(title="share of its tokens on which both are active", tickformat=".0%")
    return styled(drawn)


def styled(drawn: go.Figure) -> go.Figure:
    margin = {"l": 60, "r": 20, "t": 40, "b": 50}
    return drawn.update_layout(template="plotly_white", width=WIDTH, height=HEIGHT, margin=margin, showlegend=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_figure(connected(inputs()), "global-weights")
    save_figure(foretold(effects()), "response")
