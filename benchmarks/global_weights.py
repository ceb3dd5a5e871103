"""Claim: the TWERA of all pairs of features takes less than two minutes over 20,000 tokens, and ranks edges of graphs.

Both kinds of transcoder of the pocket model (4 layers of 1,024 features), each in a process of its own; *seconds* and
*peak memory* are of `Connections.collect` over 20,000 tokens of text that no training used and of `twera` of all pairs,
*before* is what model and dictionaries take. *pairs active together* are ordered, of features of any layers.

Then rank agreement (Spearman's ρ, of signed numbers / of magnitudes; the sign alone makes the first large) with the
edges between features at the same position in the graphs of 200 new texts of the pocket model's families, of at most 20
tokens. What passes by skip terms is left out of an edge, what attention adds from the token to itself is in it. *mean
edge* is over the tokens where both features are active, *expected edge* over all tokens, *weighted edge* over all in
proportion to the target's activation: what V, ERA and TWERA stand for. Pairs are those that are active together at five
of these tokens or more.

*interference* is the share of each active feature's ten largest virtual weights (of features that are ever active) that
are of features never active together with it.
"""

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from machine import write_table
from scipy import sparse
from scipy.stats import spearmanr

import circuitsae as cs
from circuitsae.features import Connections
from circuitsae.features.global_weights import feature_widths, virtual_weights
from circuitsae.graph import NodeKind
from circuitsae.pocket.corpus import CONTEXT, UNSEEN, documents

DICTIONARIES = {"pocket": "CLT", "pocket-plt": "per layer"}
TOKENS, PROMPTS, LENGTH, LEAST, TOP = 20_000, 200, 20, 5, 10
COLUMNS = [
    "dictionary", "weights", "seconds", "peak memory (MB)", "before (MB)", "pairs active together", "pairs compared",
    "mean edge", "expected edge", "weighted edge", "interference",
]  # fmt: skip


@dataclass(frozen=True)
class Edges:
    """Of all pairs, [source, target]: sums of their edges, also by the target's activation, and how many there were."""

    total: sparse.csr_array
    weighted: sparse.csr_array
    count: sparse.csr_array
    tokens: int
    activation: np.ndarray
    """[feature], the sum over all tokens."""


def peak() -> float:
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Same(NamedTuple):
    """The edges between features at one position of one graph, without skip terms, features by number."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    of_target: np.ndarray
    """Its activation."""
    tokens: int
    activation: np.ndarray
    """[feature], the sum over the tokens."""


def graphs(model: cs.ReplacementModel) -> Iterator[Same]:
    starts = np.cumsum([0, *feature_widths(model)])
    for text in islice(documents("global weights"), PROMPTS):
        tokens = model.tokens(text)[:LENGTH]
        graph = cs.attribute(model, tokens)
        edges = sparse.coo_array(graph.weights if graph.past is None else graph.weights - graph.past)
        number = np.array([starts[n.layer] + n.index if n.kind == NodeKind.FEATURE else -1 for n in graph.nodes])
        active = np.array([node.activation if node.kind == NodeKind.FEATURE else 0.0 for node in graph.nodes])
        pos = np.array([node.pos for node in graph.nodes])
        s, t = edges.col, edges.row
        keep = (number[s] >= 0) & (number[t] >= 0) & (pos[s] == pos[t])
        s, t, weight = s[keep], t[keep], edges.data[keep].astype(float)
        whole = np.bincount(number[number >= 0], weights=active[number >= 0], minlength=int(starts[-1]))
        yield Same(number[s], number[t], weight, active[t], len(tokens) - model.first, whole)


def edges_of(model: cs.ReplacementModel) -> Edges:
    n = sum(feature_widths(model))
    total, weighted, count = (sparse.csr_array((n, n)) for _ in range(3))
    tokens, activation = 0, np.zeros(n)
    for one in graphs(model):
        total, weighted, count = (
            sums + sparse.csr_array((values, (one.source, one.target)), shape=(n, n))
            for sums, values in (
                (total, one.weight), (weighted, one.weight * one.of_target), (count, np.ones_like(one.weight)),
            )
        )  # fmt: skip
        tokens, activation = tokens + one.tokens, activation + one.activation
    return Edges(total, weighted, count, tokens, activation)


def all_weights(model: cs.ReplacementModel) -> np.ndarray:
    """V of all pairs; the pocket model is small."""
    places = [(layer, i) for layer, width in enumerate(feature_widths(model)) for i in range(width)]
    return virtual_weights(model, places, places).cpu().numpy()


def interference(found: Connections, V: np.ndarray) -> float:
    """The share of never together among the largest weights into each feature."""
    over, starts, shares = found.over, np.cumsum([0, *feature_widths(found.model)]), []
    together = over.together.tocsc()
    for target in np.flatnonzero(over.count[starts[1] :]) + starts[1]:
        below = np.arange(int(starts[np.searchsorted(starts, target, side="right") - 1]))
        below = below[over.count[below] > 0]
        largest = below[np.argsort(-np.abs(V[below, target]))[:TOP]]
        shares.append(float((together[:, [target]].toarray()[largest, 0] == 0).mean()))
    return float(np.mean(shares))


def ranked(x: np.ndarray, y: np.ndarray) -> float:
    return float(spearmanr(x, y)[0])  # pyright: ignore[reportArgumentType]


def measured(dictionaries: str) -> list[list]:
    """A row for TWERA, ERA and V each."""
    torch.set_num_threads(1)
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries(dictionaries))
    before, start = peak(), time.perf_counter()
    found = Connections.collect(model, UNSEEN, tokens=TOKENS, context=CONTEXT)
    twera = found.twera()
    seconds, most = time.perf_counter() - start, peak()
    V, edges = all_weights(model), edges_of(model)
    source, target = np.nonzero(edges.count.toarray() >= LEAST)
    averages = (
        edges.total[source, target] / edges.count[source, target],
        edges.total[source, target] / edges.tokens,
        edges.weighted[source, target] / edges.activation[target],
    )
    share, rows = interference(found, V), []
    for name, matrix in (("TWERA", twera), ("ERA", found.era()), ("V", V)):
        x = np.asarray(matrix[source, target]).ravel()
        rho = [f"{ranked(x, y):.3f} / {ranked(np.abs(x), np.abs(y)):.3f}" for y in averages]
        cost = [f"{seconds:.0f}", f"{most:,.0f}", f"{before:,.0f}", f"{found.over.together.nnz:,}", f"{len(source):,}"]
        first = name == "TWERA"
        rows.append([
            DICTIONARIES[dictionaries], name, *(cost if first else [""] * len(cost)), *rho,
            f"{share:.1%}" if first else "",
        ])  # fmt: skip
    return rows


def main() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [row for rows in pool.map(measured, DICTIONARIES) for row in rows]
    print(write_table("global_weights", str(__doc__).strip(), COLUMNS, rows))


if __name__ == "__main__":
    main()
