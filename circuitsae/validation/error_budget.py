"""Which heads' patterns and which norms do what an edge's own mechanism does not.

From the run in which all patterns and norm scales are held, one part after the other is let go: heads layer by layer,
then norms, and once more in the reverse order. A part's value is the mean of what it adds in the two orders:

    Δ_part = ½ (f(before it and itself) − f(before it)) + ½ (f(after it and itself) − f(after it))

with f the effect of removing the source when these parts are live. The heads sum to Δ_patterns and the norms to Δ_norms
of `circuitsae.validation.claims`, for there too patterns are let go before norms and after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from circuitsae.graph import AttributionGraph
from circuitsae.interventions import Recording, Regime
from circuitsae.interventions.changes import node_changes
from circuitsae.interventions.forward import layer_of
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel
from circuitsae.validation.claims import Pairs
from circuitsae.validation.measuring import Asked, Targets, effects_in, node_row, require_active, traced
from transcoders.errors import InputError

Split = Literal["direct", "model"]
HELD: dict[Split, Regime] = {
    "direct": Regime(mlps="constant", patterns="frozen", norms="frozen"),
    "model": Regime(patterns="frozen", norms="frozen"),
}
"""What each claim's parts are let go from."""
_NORMS = {
    "ln1": "attention", "ln1_post": "after attention", "ln2": "MLP", "ln2_post": "after MLP",
    "attn.q_norm": "queries", "attn.k_norm": "keys",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A head's pattern, or a norm's scale."""

    name: str
    """"head 2.3", "norm 3 (attention)", "norm (final)"."""
    layer: int
    what: tuple[int, int] | str
    """Layer and head, or the hook of the scale."""

    def between(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Where it can act, by layers of sources and targets: a head behind earlier layers, a norm also an MLP's."""
        behind = sources < self.layer if isinstance(self.what, tuple) else sources <= self.layer
        return behind & (self.layer <= targets)


def split_by_part(
    model: ReplacementModel, graph: AttributionGraph, edges: pd.DataFrame, claim: Split = "direct"
) -> pd.DataFrame:
    """What every head's pattern and every norm adds to the effect of an edge's source: a row per edge and part.

    `edges` has columns `source` and `target`, as in `Validation.edges`. Columns: `source`, `target`, `part`, `value`;
    of the direct edge the values of heads sum to `direct_patterns` and those of norms to `direct_norms`; of the model's
    effect, to `miss_patterns` and `miss_norms`. Takes two runs of every source for each part.

    Raises `InputError` for another claim, for nodes that the graph has not, and for one made with another model.
    """
    if claim not in HELD:
        raise InputError(f"claim={claim!r} holds no patterns to let go; give one of {', '.join(HELD)}.")
    prompt = Recording(model, traced(model, graph))
    names = edges[["source", "target"]].to_numpy()
    if not len(names):
        return pd.DataFrame(columns=["source", "target", "part", "value"])
    pairs = Pairs.of([(graph.nodes[node_row(graph, s)], graph.nodes[node_row(graph, t)]) for s, t in names])
    found, values = split(model, prompt, pairs, claim)
    rows = pairs.frame()[["source", "target"]]
    return pd.concat(
        [rows.assign(part=part.name, value=value) for part, value in zip(found, values.T, strict=True)]
    ).sort_index(kind="stable", ignore_index=True)


def leading_heads(
    model: ReplacementModel, prompt: Recording, pairs: Pairs, *, memory: int | None = None, **how: Any
) -> list[str]:
    """The head ("2.3") that carries most of each direct edge; `how` as in `split`."""
    heads, values = split(model, prompt, pairs, "direct", norms=False, memory=memory, **how)
    return [heads[i].name.removeprefix("head ") for i in np.abs(values).argmax(axis=1)]


def split(
    model: ReplacementModel,
    prompt: Recording,
    pairs: Pairs,
    claim: Split,
    *,
    norms: bool = True,
    memory: int | None = None,
    **how: Any,
) -> tuple[list[Part], Float[np.ndarray, "pair part"]]:
    """All parts of the model, or its heads alone, and what each adds to each pair's effect.

    `how`: `kept`, `begin` and `advance` of `effects_in`.
    """
    require_active(prompt.trace, [*pairs.sources, *pairs.targets])
    every, targets = parts_of(prompt), Targets(model, prompt.trace, pairs.targets)
    parts = [part for part in every if norms or isinstance(part.what, tuple)]
    removed = Shares.removing(Writers(model, prompt, node_changes(model, prompt.trace, pairs.sources)))
    first = np.array([node.layer for node in pairs.sources])
    last = np.zeros_like(first)
    np.maximum.at(last, pairs.source, [pairs.targets[target].layer for target in pairs.target])
    values = np.zeros((len(pairs.source), len(parts)))
    # In the reverse order what follows the parts is let go first.
    orders = (list(range(len(parts))), []), (list(reversed(range(len(parts)))), every[len(parts) :])
    asked: list[Asked] = []
    for order, live in orders:
        asked.append((removed, _let_go(HELD[claim], live)))
        for i in order:
            live.append(parts[i])
            moves = np.flatnonzero(parts[i].between(first, last))
            asked.append((removed.take(moves), _let_go(HELD[claim], live)))
    found = iter(effects_in(model, prompt, asked, targets, memory, **how))
    for order, _ in orders:
        now = next(found)
        for i in order:
            after = now.copy()
            after[parts[i].between(first, last)] = next(found)
            values[:, i] += (after - now)[pairs.source, pairs.target] / 2
            now = after
    return parts, values


def parts_of(prompt: Recording) -> list[Part]:
    """Every head, layer by layer, then every norm, the final one last."""
    constants, end = prompt.trace.frozen.constants, prompt.model.model.n_layers
    heads, norms = [], []
    for name in constants:
        layer = layer_of(name, end)
        if name.endswith("hook_pattern"):
            heads += [Part(f"head {layer}.{head}", layer, (layer, head)) for head in range(prompt.model.model.n_heads)]
        else:
            norms.append(Part(_norm_name(name), layer, name))
    return sorted(heads, key=lambda part: part.layer) + sorted(norms, key=lambda part: part.layer)


def _norm_name(scale: str) -> str:
    norm = scale.removesuffix(".hook_scale")
    if not norm.startswith("blocks."):
        return "norm (final)" if norm == "ln_final" else f"norm ({norm})"
    _, layer, inside = norm.split(".", 2)
    return f"norm {layer} ({_NORMS.get(inside, inside)})"


def _let_go(held: Regime, parts: Sequence[Part]) -> Regime:
    heads = frozenset(part.what for part in parts if isinstance(part.what, tuple))
    norms = frozenset(part.what for part in parts if isinstance(part.what, str))
    return replace(held, patterns=heads, norms=norms)
