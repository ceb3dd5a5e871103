"""Claim: totals in graphs of a real model hold in the model as far as its dictionaries' derivatives do.

SmolLM2-135M on ten prompts: T̂, the effect of a source through all paths of the linear replacement, against the model,
patterns and norm scales held and all live, at a dose of 1 % (a full removal through thirty gated MLPs whose norms are
held diverges). Of every prompt's graph (the 1,000 most influential features and the ten top logits) 20 edges of each
class by influence, drawn from all layer distances, and 20 of feature→feature over at least five layers. Spearman, same
sign, ratio in [½, 2] over the edges of all prompts.

    python benchmarks/totals.py MODEL NAME=DICTIONARIES [NAME=DICTIONARIES …] [--prompts 10]
    python benchmarks/totals.py MODEL NAME=DICTIONARIES --errors    # writes totals_answering.md
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from machine import write_table

import circuitsae as cs
from circuitsae.attribution.limits import Response
from circuitsae.graph import AttributionGraph
from circuitsae.graph.totals import total_effects
from circuitsae.interventions import Recording, Regime, RegimeName, node_change
from circuitsae.validation import agreement
from circuitsae.validation.choice import choose_edges
from circuitsae.validation.claims import Pairs
from circuitsae.validation.measuring import Targets, effects

PROMPTS = (
    "When John and Mary went to the store, John gave a drink to",
    "The war lasted from the year 1765 to the year 17",
    "The capital of France is",
    "The capital of Japan is",
    'The opposite of "hot" is "',
    "The Eiffel Tower is located in the city of",
    "The keys to the cabinet",
    "The key to the cabinets",
    "def add(a, b): return a",
    "Fact: the capital of the state containing Dallas is",
)
ANSWERING = """Claim: where errors answer, totals are the model's own at small doses, whatever the dictionaries.

SmolLM2-135M on ten prompts, as in `totals`, but of graphs with `errors="linear"`: T̂ = (I − B)⁻¹ A, from the edges of
the graph alone (the 1,000 most influential features, the rest with the errors), against the model at a dose of 1 %,
patterns and norm scales held (`frozen`) or all live (`linear`). *Past*: the share of all weight in edges that passed by
errors and no feature, the mean over prompts. *Seconds*: of the processor, a graph, the mean.

    python benchmarks/totals.py MODEL NAME=DICTIONARIES [NAME=DICTIONARIES …] --errors [--prompts 10]
"""
CLASSES = ("feature→logit", "token→logit", "feature→feature", "token→feature")
FAR, EDGES, DOSE = 5, 20, 1e-2


def chosen(graph: AttributionGraph) -> Iterator[tuple[str, Pairs]]:
    """Of each class the edges that are tested."""
    for name in CLASSES:
        s, t, hops = choose_edges(graph, name).rows[["s", "t", "hops"]].to_numpy(int).T
        yield name, pairs_of(graph, s[:EDGES], t[:EDGES])
        if name == "feature→feature":
            far = np.flatnonzero(hops >= FAR)[:EDGES]
            yield f"{name}, {FAR} layers and more", pairs_of(graph, s[far], t[far])


def pairs_of(graph: AttributionGraph, sources: np.ndarray, targets: np.ndarray) -> Pairs:
    return Pairs.of([(graph.nodes[s], graph.nodes[t]) for s, t in zip(sources, targets, strict=True)])


def effect(
    model: cs.ReplacementModel, prompt: Recording, pairs: Pairs, regime: RegimeName | Regime, dose: float
) -> np.ndarray:
    """Of taking a dose of each source out, over the dose."""
    taken = [[-dose * node_change(model, prompt.trace, node)] for node in pairs.sources]
    targets = Targets(model, prompt.trace, pairs.targets)
    return effects(model, prompt, taken, targets, regime)[pairs.source, pairs.target] / dose


def tested(model: cs.ReplacementModel, text: str) -> pd.DataFrame:
    """T̂ and the model's effects on the chosen edges of one prompt."""
    graph = cs.attribute(model, text, max_features=1000)
    prompt = Recording(model, model.trace(text))
    frames = []
    for name, pairs in chosen(graph):
        found = {"class": name, "predicted": effect(model, prompt, pairs, "linear", 1.0)}
        found |= {regime: effect(model, prompt, pairs, regime, DOSE) for regime in ("graph", "model")}
        frames.append(pairs.frame().assign(**found))
    return pd.concat(frames)


def answering(model: cs.ReplacementModel, text: str, response: Response) -> tuple[pd.DataFrame, float, float]:
    """The same of a graph whose errors answer, from its own edges; what passed by errors, and seconds."""
    began = time.process_time()
    graph = cs.attribute(model, text, max_features=1000, errors="linear", response=response)
    seconds, prompt = time.process_time() - began, Recording(model, model.trace(text))
    total = total_effects(graph.nodes_frame(), graph.edges_frame(), range(len(graph.nodes)))
    held = Regime() if response == "linear" else Regime(patterns="frozen", norms="frozen")
    frames = []
    for name, pairs in chosen(graph):
        ends = zip(pairs.source, pairs.target, strict=True)
        at = [(graph.position[pairs.targets[t].id], graph.position[pairs.sources[s].id]) for s, t in ends]
        found = {"class": name, "predicted": -total[tuple(np.transpose(at))]}
        frames.append(pairs.frame().assign(**found, measured=effect(model, prompt, pairs, held, DOSE)))
    return pd.concat(frames), graph.scores.past or 0.0, seconds


def answering_rows(
    name: str, model: cs.ReplacementModel, texts: Sequence[str], response: Response
) -> Iterator[Sequence[object]]:
    frames, past, seconds = zip(*(answering(model, text, response) for text in texts), strict=True)
    for kind, rows in pd.concat(frames).groupby("class", sort=False):
        foreseen, done = (np.asarray(rows[column], dtype=float) for column in ("predicted", "measured"))
        found = agreement(foreseen, done)
        figures = [f"{value:.3f}" for value in (found.spearman, found.sign, found.within)]
        yield (name, response, kind, len(rows), *figures, f"{np.mean(past):.2f}", f"{np.mean(seconds):.0f}")


def rows_of(name: str, table: pd.DataFrame) -> Iterator[Sequence[object]]:
    for kind, rows in table.groupby("class", sort=False):
        cells = []
        for regime in ("graph", "model"):
            foreseen, done = (np.asarray(rows[column], dtype=float) for column in ("predicted", regime))
            known = np.isfinite(done)
            found = agreement(foreseen[known], done[known])
            cells += [f"{value:.3f}" for value in (found.spearman, found.sign, found.within)]
        yield (name, kind, len(rows), *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("dictionaries", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--errors", action="store_true", help="Of graphs whose errors answer.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    language_model, table = cs.load_model(arguments.model), []
    texts = PROMPTS[: arguments.prompts]
    for each in arguments.dictionaries:
        name, _, folder = each.partition("=")
        model = cs.ReplacementModel(language_model, cs.load_dictionaries(folder, dtype="float32"))
        if arguments.errors:
            for response in get_args(Response):
                table += answering_rows(name, model, texts, response)
                columns = ("dictionaries", "response", "edges", "n", "Spearman", "sign", "in [½, 2]", "past", "seconds")
                claim = ANSWERING.replace("on ten prompts", f"on {arguments.prompts} prompts")
                print(write_table("totals_answering", claim, columns, table), flush=True)
            continue
        frames = [tested(model, text) for text in texts]
        table += rows_of(name, pd.concat(frames))
        columns = ["dictionaries", "edges", "n"]
        columns += [f"{of}: {what}" for of in ("held", "live") for what in ("Spearman", "sign", "in [½, 2]")]
        assert __doc__ is not None
        claim = __doc__.replace("on ten prompts", f"on {arguments.prompts} prompts")
        print(write_table("totals", claim, columns, table), flush=True)


if __name__ == "__main__":
    main()
