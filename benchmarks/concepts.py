"""Question: which labelled concepts does one unit find: neurons, features, principal components, random directions?

The pocket model. *kinds of words*: tokens of text that no training used, labelled by the kind of word that they are
(animals, colours, men, women …); held out are all tokens of a third of the words of each kind, so that a unit for one
word finds nothing. *states*: the last token of one-hop prompts about a city ("The state containing Houston is"),
labelled by its state; held out are all prompts about one city of each. Layers were set beforehand, none other tried:
for words the second MLP, for states the last. *neurons*: of that MLP; *features*: of the per-layer transcoder there;
*PCA* and *random directions*: of what it reads, both signs: all components, and twice as many directions.

AUROC on held-out rows, mean over concepts, of the unit that is best on the other rows, of the best five and of all
units (`concept_table`), and balanced accuracy; *found by one*: concepts with AUROC above .9 by a single unit. *purity*
and *concepts per unit* are means over units that are active on ten held-out rows or more (`purity_table`); *pure*:
share of them with purity above .5; *chance*: one through the number of concepts. Mean (range) of three seeds, of text,
words, cities and states.

    python benchmarks/concepts.py
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch
from machine import write_table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import circuitsae as cs
from circuitsae.pocket.corpus import documents
from circuitsae.pocket.facts import STATES
from circuitsae.pocket.words import MEN, WOMEN, WORDS
from examples.two_hop import ONE_HOP
from transcoders.dictionaries import DictionarySet
from transcoders.evaluation import concept_table, direction_baselines, purity_table
from transcoders.language_model import LanguageModel
from transcoders.sites import Site

KINDS = {
    "men": MEN, "women": WOMEN, **{kind: WORDS[kind] for kind in (
        "animal", "food", "weather", "day", "place", "object", "trade", "kin", "feeling", "color",
    )},
}  # fmt: skip
LAYERS = {"kinds of words": 1, "states": 3}
N_STATES, PER_KIND, LEAST_ROWS, AT_ONCE = 12, 200, 10, 64
FOUND, PURE = 0.9, 0.5


@dataclass(frozen=True)
class Contexts:
    """Prompts, the token of each that is read, its label, and whether it is held out."""

    rows: list[Tensor]
    places: list[int]
    labels: np.ndarray
    held_out: np.ndarray


def kinds_of_words(model: LanguageModel, seed: int) -> Contexts:
    """The words that are of one kind alone, where they stand in documents."""
    often = Counter(word for words in KINDS.values() for word in words)
    kind_of = {word: kind for kind, words in KINDS.items() for word in words if often[word] == 1}
    rng, held = random.Random(f"concepts:{seed}"), set()
    for kind in KINDS:
        words = sorted(word for word, own in kind_of.items() if own == kind)
        held |= set(rng.sample(words, max(1, len(words) // 3)))
    found: dict[str, list[tuple[Tensor, int, str]]] = defaultdict(list)
    for text in islice(documents(f"concepts:{seed}"), 100 * PER_KIND):
        tokens = model.to_tokens(text)
        for place, piece in enumerate(model.token_strings(tokens)):
            word = re.sub(r"^\W+", "", piece)
            if place and word in kind_of and len(found[kind_of[word]]) < PER_KIND:
                found[kind_of[word]].append((tokens, place, word))
    chosen = [item for kind in KINDS for item in found[kind]]
    rows, places, words = (list(side) for side in zip(*chosen, strict=True))
    return Contexts(rows, places, np.array([kind_of[w] for w in words]), np.array([w in held for w in words]))


def states(model: LanguageModel, seed: int) -> Contexts:
    """One-hop prompts about the cities of some states."""
    rng = random.Random(f"states:{seed}")
    asked = []
    for state in rng.sample(STATES, N_STATES):
        held = rng.choice(state.cities)
        asked += [(phrase.format(city=city), state.name, city == held) for phrase in ONE_HOP for city in state.cities]
    rows = [model.to_tokens(text) for text, _, _ in asked]
    labels, held_out = (np.array([item[side] for item in asked]) for side in (1, 2))
    return Contexts(rows, [len(row) - 1 for row in rows], labels, held_out)


@torch.no_grad()
def units(
    model: LanguageModel, dictionaries: DictionarySet, contexts: Contexts, layer: int, seed: int
) -> dict[str, np.ndarray]:
    """What every basis says of the contexts' tokens, [row, unit]."""
    sites = (Site(layer, "mlp_neurons"), *dictionaries.reads)
    read: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(contexts.rows), AT_ONCE):
        rows, places = contexts.rows[start : start + AT_ONCE], contexts.places[start : start + AT_ONCE]
        found = model.activations(pad_sequence(rows, batch_first=True), sites)  # what follows a token, it does not see
        for site in sites:
            read[site].append(found[site][torch.arange(len(rows)), places])
    reads = torch.stack([torch.cat(read[site]) for site in dictionaries.reads])
    index, value = dictionaries.encode(reads)
    here = index[:, 0] == layer
    features = np.zeros((len(contexts.rows), dictionaries.n_features(layer)))
    features[index[here, 1].numpy(), index[here, 2].numpy()] = value[here].numpy()
    x = reads[layer].double().numpy()
    return {
        "neurons": torch.cat(read[sites[0]]).double().numpy(),
        "features": features[:, (features[~contexts.held_out] > 0).any(axis=0)],
        **direction_baselines(x, contexts.held_out, 2 * x.shape[1], seed),
    }


def measure(name: str, contexts: Contexts, found: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """A row for each basis."""
    probes = concept_table(found, contexts.labels, held_out=contexts.held_out)
    rows = []
    for basis, activations in found.items():
        own = probes[probes["basis"] == basis]
        by_probe = {probe: own[own["probe"] == probe] for probe in ("1", "5", "all")}
        purities = purity_table(activations, contexts.labels, held_out=contexts.held_out)
        purities = purities[purities["rows"] >= LEAST_ROWS].dropna()
        rows.append(
            {
                "contexts": name, "basis": basis, "seed": seed, "units": activations.shape[1],
                **{f"AUROC, {probe}": by_probe[probe]["auroc"].mean() for probe in by_probe},
                "accuracy, all": by_probe["all"]["accuracy"].mean(),
                "found by one": (by_probe["1"]["auroc"] > FOUND).sum(),
                "purity": purities["purity"].mean(), "concepts per unit": purities["concepts"].mean(),
                "pure": (purities["purity"] > PURE).mean(), "chance": 1 / len(np.unique(contexts.labels)),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def interval(values: pd.Series) -> str:
    """Mean and range of the seeds."""
    mean, low, high = values.mean(), values.min(), values.max()
    form = ".0f" if values.name == "units" else ".1f" if values.name in ("found by one", "concepts per unit") else ".3f"
    return f"{mean:{form}}" if low == high else f"{mean:{form}} ({low:{form}}–{high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    model, dictionaries = cs.load_model("pocket"), cs.load_dictionaries("pocket-plt")
    made = []
    for name, draw in (("kinds of words", kinds_of_words), ("states", states)):
        for seed in range(given.seeds):
            contexts = draw(model, seed)
            made.append(measure(name, contexts, units(model, dictionaries, contexts, LAYERS[name], seed), seed))
            print(made[-1].to_string(), flush=True)
    frame = pd.concat(made).drop(columns="seed")
    table = frame.groupby(["contexts", "basis"], sort=False).agg(interval).reset_index()
    print(write_table("concepts", str(__doc__).strip(), list(table.columns), table.to_numpy().tolist()))


if __name__ == "__main__":
    main()
