"""Two hops: is the state a step on the way from a city to the capital? Its features are found, suppressed and swapped.

The features of a state are found on one-hop sentences ("The state containing Houston is"), which name no capital, about
its other cities. They are tested on two-hop prompts ("The capital of the state containing Dallas is") about a city
that was not used to find them: suppressed, they should move the answer away from the capital; with another state's
features in their place, that state's capital should become the answer; random features that write as much should do
neither. Strengths were chosen on the first phrasing and the cities that the model saw in two-hop training, layers and
numbers of features on the first phrasing and all cities; the other phrasings are a test.

python examples/two_hop.py [--quick] [--dictionaries pocket pocket-plt] [--write FILE]
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import circuitsae as cs
from circuitsae.features import Activations, FeatureGroup, activations_at, contrast, suppress, swap
from circuitsae.interventions import Prompt, run_alternatives
from circuitsae.interventions.prompts import Library, Recording
from circuitsae.pocket.facts import CITIES, HELD_OUT_CITIES, STATE_OF, STATES
from circuitsae.pocket.families import TWO_HOP_TEMPLATES
from transcoders.files import write_file

ONE_HOP = (
    "{city} is a city in the state of", "{city} is in", "The city of {city} is in", "The state containing {city} is",
    "The state that contains {city} is", "{city} is in a state called", "The state where {city} is found is",
    "If you live in {city}, your state is", "Anyone living in {city} has as the home state",
    "Question: which state contains {city}? Answer:", "The state that {city} belongs to is",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Where the features are, how many, and how strong; chosen on the first phrasing and trained cities."""

    layers: tuple[tuple[str, int, int], ...] = (("city", 0, 40), ("last", 1, 10))
    """Role, layer, number of features."""
    suppress: float = -0.75
    """Suppressed features are set to this times their activation."""
    factor: float = -0.25
    """When swapped, the state's own features are set to this times their activation,"""
    strength: float = 2.0
    """and the other state's to this times their mean activation."""


def prompt_about(model: cs.ReplacementModel, phrase: str, city: str) -> Prompt:
    tokens = model.tokens(phrase.format(city=city))
    name = model.model.token_id(city if phrase.startswith("{city}") else " " + city)
    return Prompt(tokens, {"city": int((tokens == name).nonzero()[0, 0]), "last": len(tokens) - 1}, phrase)


class States:
    """The features of every state, from one-hop sentences about its cities."""

    def __init__(self, model: cs.ReplacementModel, settings: Settings, phrases: tuple[str, ...] = ONE_HOP) -> None:
        self.model, self.settings = model, settings
        asked = [(phrase, city) for phrase in phrases for city in CITIES]
        self.cities = [city for _, city in asked]
        prompts = [prompt_about(model, phrase, city) for phrase, city in asked]
        self.read: dict[str, Activations] = {r: activations_at(model, prompts, r) for r, _, _ in settings.layers}

    def features(self, state: str, without: str) -> list[FeatureGroup]:
        """What tells the state's cities (but one) from those of other states, at each place."""
        own = torch.tensor([STATE_OF[city].name == state and city != without for city in self.cities])
        others = torch.tensor([STATE_OF[city].name != state for city in self.cities])
        return [
            contrast(self.model, self.read[role], own, others, at=role, layers=[layer], k=k)
            for role, layer, k in self.settings.layers
        ]

    def firing(self) -> list[torch.Tensor]:
        """The features that fire on some of the sentences: what controls are drawn from."""
        every = torch.ones(len(self.cities), dtype=torch.bool)
        rate = torch.stack([read.rate(every) for read in self.read.values()])
        return list((rate > 0).any(0))


def alternatives(states: States, prompt: Recording, city: str, other: str, seed: int) -> Iterator[tuple[str, list]]:
    """Suppressed and swapped, each with its control."""
    settings, generator, firing = states.settings, torch.Generator().manual_seed(seed), states.firing()
    own, new = (states.features(state, city) for state in (STATE_OF[city].name, other))
    changes = {
        "suppressed to 0": [suppress(prompt, group) for group in own],
        "suppressed": [suppress(prompt, group, settings.suppress) for group in own],
        "swapped": [
            swap(prompt, group, by, factor=settings.factor, strength=settings.strength)
            for group, by in zip(own, new, strict=True)
        ],
    }
    for name, made in changes.items():
        yield name, [change.intervention() for change in made]
        yield f"{name}, control", [c.control(states.model, generator, firing).intervention() for c in made]


@torch.no_grad()
def measure(states: States, phrase: str, cities: list[str]) -> pd.DataFrame:
    """For every prompt that the model answers rightly and every change: what is the answer then?"""
    model, rows, asked = states.model, [], []
    library, draw = Library(model), random.Random(f"two-hop:{phrase}")
    for number, city in enumerate(cities):
        prompt = library[prompt_about(model, phrase, city)]
        other = draw.choice([state for state in STATES if state != STATE_OF[city]])
        right, wrong = (model.model.token_id(" " + state.capital) for state in (STATE_OF[city], other))
        if int(prompt.trace.logits[-1].argmax()) != right:
            continue
        for name, made in alternatives(states, prompt, city, other.name, number):
            rows.append((prompt, made))
            asked.append({"city": city, "change": name, "right": right, "other": wrong})
    chunks = run_alternatives(model, rows, "model", library=library)
    answers = torch.cat([chunk.logits[:, -1].argmax(-1) for chunk in chunks])
    frame = pd.DataFrame(asked).assign(answer=answers.tolist(), phrase=phrase)
    return frame.assign(
        moved=frame.answer != frame.right,
        to_other=frame.answer == frame.other,
        held_out=frame.city.isin(HELD_OUT_CITIES),
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares of prompts: the answer moved away from the capital, and became the other state's capital."""
    chosen_on = (frame.phrase == TWO_HOP_TEMPLATES[0]) & ~frame.held_out
    parts = {"chosen on": chosen_on, "other phrasings": ~chosen_on & ~frame.held_out, "held-out cities": frame.held_out}
    tables = []
    for name, mask in parts.items():
        if mask.any():
            table = (
                frame[mask]
                .groupby("change", sort=False)
                .agg(prompts=("moved", "size"), moved=("moved", "mean"), to_other=("to_other", "mean"))
            )
            tables.append(table.assign(part=name).reset_index())
    return pd.concat(tables, ignore_index=True).reindex(columns=["part", "change", "prompts", "moved", "to_other"])


def two_hop(dictionaries: str = "pocket", *, quick: bool = False, settings: Settings = Settings()) -> pd.DataFrame:
    model = cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries(dictionaries))
    states = States(model, settings, ONE_HOP[3:7] if quick else ONE_HOP)
    phrases = TWO_HOP_TEMPLATES[:2] if quick else TWO_HOP_TEMPLATES
    cities = list(CITIES[::10]) if quick else list(CITIES)
    return summary(pd.concat([measure(states, phrase, cities) for phrase in phrases], ignore_index=True))


def write_tables(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    lines = ["# Two hops", "", f"Written by `python examples/two_hop.py --write {path}`.", ""]
    for name, table in tables.items():
        lines += [f"Dictionaries `{name}`:", "", "| prompts | change | n | answer moved | other state's capital |"]
        lines += ["|---|---|---|---|---|"]
        for part, change, n, moved, to_other in table.itertuples(index=False):
            lines.append(f"| {part} | {change} | {n} | {moved:.1%} | {to_other:.1%} |")
        lines.append("")
    write_file(path, "\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cities and two phrasings")
    parser.add_argument("--dictionaries", nargs="+", default=["pocket", "pocket-plt"])
    parser.add_argument("--write", type=Path, help="file for the tables")
    given = parser.parse_args()
    found = {chosen: two_hop(chosen, quick=given.quick) for chosen in given.dictionaries}
    for name, table in found.items():
        print(name, table.to_string(index=False, float_format=lambda x: f"{x:.1%}"), sep="\n")
    if given.write:
        write_tables(given.write, found)
