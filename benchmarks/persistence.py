"""What of a graph is found again with dictionaries of other seeds and widths: results/persistence.md.

    python benchmarks/persistence.py [--prompts 6] [--tokens 4000] [--work runs/sets]

Transcoders of the pocket model (`trained_sets.py`), 512 features of each layer, against those of the other seeds, and
against 256 and 1,024 features; each of the three seeds is once the one whose graphs are looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import tyro
from machine import write_table
from trained_sets import COMPARED, WORK, Setting, setting, trained_sets

from circuitsae.attribution import attribute
from circuitsae.benchmark.result import interval
from circuitsae.graph import (
    AttributionGraph,
    Other,
    Supernode,
    by_parent,
    persistence_frame,
    persistence_in,
    unit_frame,
)
from circuitsae.pocket.prompts import DEMONSTRATION, ioi_prompts, two_hop_prompts
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import coactivations, counterparts, meta_parents, narrow_parents, superset
from transcoders.training.meta_sae import meta_config, train_meta_sae

SEEDS = (0, 1, 2)
NARROW, OWN, WIDE = 256, 512, 1024
COLUMNS = ["compared", "of", "count", "persistence", "chance", "above it", "by influence", "its chance", "above it"]
FIGURES = ["persistence", "chance", "above", "weighted", "weighted_chance", "weighted_above"]
TOGETHER, AT_RANDOM = "together", "together at random"
META_PASSES = 500
"""Times that a meta-SAE sees each decoder, a quarter of the default."""
ALONE, BATCH = ("transcoder TopK",), "transcoder BatchTopK"
CLAIM = (
    "Transcoders of the pocket model (TopK, L0 16, 300,000 tokens), 512 features of each layer, {prompts} prompts: "
    "which features and edges of a pruned graph are found again in the graphs of the same prompts by dictionaries of "
    "the two other seeds, or of another width (`circuitsae persist`). Persistence is the share of the others; chance "
    "the same with the features of a layer and position exchanged at random, 20 times. Top half: the fewest that hold"
    " half of the influence. Supersets: BatchTopK, the 256 features and what is novel of 512 ({sizes} features of a "
    "layer). Features of one parent, a feature of the 256 or a meta-latent, are looked for with the two other seeds, "
    "in graphs pruned to 95 % of the influence: each alone, together, and in groups of the same sizes of other "
    "features of the same places. Counts are a graph's. Means of prompts, then of three seeds, and 95 % intervals "
    "over seeds."
)
Groups = Mapping[str, pd.DataFrame]


@dataclass
class Options:
    """What is measured on."""

    prompts: int = 6
    """Prompts, half of indirect objects and half of two hops."""
    tokens: int = 4000
    """On which features are matched."""
    work: Path = WORK
    """Where the dictionaries are, or are trained."""
    meta: bool = True
    """Whether to train meta-SAEs."""


class Compared(NamedTuple):
    """A dictionary, others by name, and which of theirs stand for its features."""

    own: DictionarySet
    others: Mapping[str, DictionarySet]
    groups: Groups


def matched(
    where: Setting, own: DictionarySet, others: Mapping[str, DictionarySet], *, text: bool = True, sums: bool = True
) -> Groups:
    """By activations and decoders on text, or by decoders alone."""
    found = {}
    for name, other in others.items():
        together = coactivations(where.model, own, other, where.rows) if text else None
        found[name] = counterparts(own, other, together, sums=sums)
    return found


class Graphs:
    """Full graphs of some prompts, each made once."""

    def __init__(self, where: Setting, prompts: Sequence[str]) -> None:
        self.model, self.prompts = where.model, prompts
        self._made: dict[int, list[AttributionGraph]] = {}

    def of(self, dictionaries: DictionarySet) -> list[AttributionGraph]:
        """In the order of the prompts."""
        if id(dictionaries) not in self._made:
            model = ReplacementModel(self.model, dictionaries)
            self._made[id(dictionaries)] = [attribute(model, prompt) for prompt in self.prompts]
        return self._made[id(dictionaries)]

    def others(self, compared: Compared) -> Iterator[tuple[AttributionGraph, list[Other]]]:
        """Of each prompt the graph, in full, and those of the others that explain the same logits."""
        for at, graph in enumerate(self.of(compared.own)):
            found = [Other(n, self.of(d)[at], compared.groups[n]) for n, d in compared.others.items()]
            yield graph, found


def frames(graphs: Graphs, compared: Compared) -> pd.DataFrame:
    """What is found again, a row for each subject, of one seed: means over prompts."""
    found = []
    for graph, others in graphs.others(compared):
        drawn = graph.prune()
        found.append(persistence_frame(drawn, persistence_in(drawn, others)))
    return mean_of(found)


def unit_frames(graphs: Graphs, compared: Compared, parents: pd.DataFrame) -> pd.DataFrame:
    """Whether features that have one parent persist more together."""
    found = []
    for graph, others in graphs.others(compared):
        drawn = graph.prune(nodes=0.95)
        units: list[Supernode] = by_parent(drawn.nodes_frame(), parents)
        if units:
            found.append(unit_frame(drawn, units, others))
    mean = mean_of(found)
    for suffix in ("", ": their edges") if len(mean) else ():
        mean.loc[f"{TOGETHER} less at random{suffix}"] = mean.loc[TOGETHER + suffix] - mean.loc[AT_RANDOM + suffix]
    return mean


def mean_of(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Means of the same rows, in their order."""
    if not frames:
        return pd.DataFrame()
    mean = pd.DataFrame(pd.concat(frames).groupby("what", sort=False).mean())
    above = mean["persistence"] - mean["chance"], mean["weighted"] - mean["weighted_chance"]
    return mean.assign(above=above[0], weighted_above=above[1])


def rows_of(name: str, by_seed: Sequence[pd.DataFrame]) -> list[list[str]]:
    """Mean and 95 % interval over seeds."""
    rows = []
    by_seed = [frame for frame in by_seed if len(frame)]
    for what in by_seed[0].index if by_seed else []:
        own = pd.DataFrame([frame.loc[what] for frame in by_seed if what in frame.index])
        count = f"{own['count'].mean():.1f}"
        rest = [str(interval(own[c].tolist())) for c in FIGURES]
        rows.append([name, str(what), count, *rest])
    return rows


def trained(where: Setting, work: Path, features: int, kind: str) -> list[DictionarySet]:
    """The sets of a width, by seed."""
    kinds = {OWN: COMPARED, WIDE: ALONE, NARROW: (*ALONE, BATCH)}[features]
    return [trained_sets("pocket", where, kinds, features=features, seed=s, work=work)[kind] for s in SEEDS]


def against_seeds(where: Setting, sets: Sequence[DictionarySet], **settings: Any) -> list[Compared]:
    """Each against the others."""
    found = []
    for s in SEEDS:
        others = {f"seed {t}": sets[t] for t in SEEDS if t != s}
        found.append(Compared(sets[s], others, matched(where, sets[s], others, **settings)))
    return found


def main(given: Options) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    where, half = setting("pocket", given.tokens), given.prompts // 2
    texts = [DEMONSTRATION, *(p.text for p in ioi_prompts(half - 1))]
    texts += [p.text for p in two_hop_prompts(held_out_cities=True)[:half]]
    graphs = Graphs(where, texts)
    own, narrow, wide = (trained(where, given.work, width, ALONE[0]) for width in (OWN, NARROW, WIDE))
    seeds = against_seeds(where, own)
    rows = rows_of("seeds", [frames(graphs, c) for c in seeds])
    partners = against_seeds(where, own, text=False, sums=False)
    rows += rows_of("seeds, decoders one to one", [frames(graphs, c) for c in partners])[:3]
    for name, sets in (("width 256", narrow), ("width 1,024", wide)):
        pairs = [(d, {name: sets[s]}) for s, d in zip(SEEDS, own, strict=True)]
        compared = [Compared(d, others, matched(where, d, others)) for d, others in pairs]
        rows += rows_of(name, [frames(graphs, c) for c in compared])
    batch = [trained(where, given.work, width, BATCH) for width in (NARROW, OWN)]
    stitched = [superset(*pair) for pair in zip(*batch, strict=True)]
    for name, sets in (("BatchTopK, 256, seeds", batch[0]), ("their supersets, seeds", stitched)):
        rows += rows_of(name, [frames(graphs, c) for c in against_seeds(where, sets)])[:3]
    sizes = ", ".join(f"{sum(d.n_features(i) for i in range(d.n_layers)) / d.n_layers:.0f}" for d in stitched)

    def units(name: str, tables: Sequence[pd.DataFrame]) -> None:
        rows.extend(rows_of(name, [unit_frames(graphs, *pair) for pair in zip(seeds, tables, strict=True)]))
        print(write_table("persistence", CLAIM.format(prompts=len(texts), sizes=sizes), COLUMNS, rows))

    units("split from one of 256", [narrow_parents(*pair) for pair in zip(own, narrow, strict=True)])
    if given.meta:
        config = replace(meta_config(OWN), tokens=META_PASSES * OWN)
        metas = [{i: train_meta_sae(d, i, config=config)[1] for i in range(d.n_layers)} for d in own]
        units("of one meta-latent", [meta_parents(found) for found in metas])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
