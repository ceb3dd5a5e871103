"""One fact as a story: what makes SmolLM2 say Paris after "The capital of France is", and what makes it say Tokyo.

Features of a country, at its name, are those that write more there than at other countries' names, in sentences that
say nothing of capitals ("I have never been to France"); at the last token, those that do in other words for the same
question ("The capital city of France is"). They are tested on "The capital of France is", for every country whose
capital the model knows: removed, or set to what another country's are, while everything else, the name's own embedding
included, stays as it was. If this is how the model knows of which country it is asked, the answer becomes the other
country's capital. Controls add as much to random other features of the same layers that fire on these sentences.

    python -m examples.smollm2.story --model runs/smollm2/model --dictionaries runs/smollm2/plt --out story
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import tyro

import circuitsae as cs
from circuitsae.features import Activations, FeatureGroup, activations_at, contrast, suppress, swap
from circuitsae.interventions import Intervention, Prompt, run_alternatives
from circuitsae.interventions.prompts import Library, Recording
from circuitsae.tasks.facts import CAPITAL_OF
from examples.smollm2 import one_sentence
from examples.smollm2.story_page import write_story
from transcoders.errors import InputError, PromptError
from transcoders.files import write_file

ASKED = "The capital of {} is"
FOUND_ON = {
    "country": (
        "I have never been to {}", "The people of {}", "She was born in {}", "The history of {}", "They moved to {}",
        "A map of {}", "The weather in {}", "He comes from {}", "The army of {}", "We flew to {}",
    ),
    "last": (
        "The capital city of {} is", "The name of the capital of {} is", "The government of {} sits in the city of",
        "Everybody knows that the capital of {} is", "The largest airport near the capital of {} is in",
    ),
}  # fmt: skip
"""The sentences that features are found on, by the place that is looked at."""


class Place(NamedTuple):
    """Features that are changed together."""

    name: str
    role: str
    layers: range


PLACES = (
    Place("the name, layer 0", "country", range(1)),
    Place("the name, layers 1–9", "country", range(1, 10)),
    Place("the name, layers 10–29", "country", range(10, 30)),
    Place("the last token, layers 0–9", "last", range(10)),
    Place("the last token, layers 10–29", "last", range(10, 30)),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str
    """The folder of SmolLM2-135M-Instruct."""
    dictionaries: str
    """Its per-layer transcoders."""
    out: Path = Path("story")
    """Folder for the table."""
    html: Path | None = None
    """Write the first country's story as a page there."""
    k: int = 40
    """Features of a country in each range of layers, at most."""
    others: int = 4
    """Other countries that each one is set to."""
    rate: float = 0.5
    """Share of the sentences about a country on which its features fire, at least."""
    seed: int = 0


class Countries:
    """The countries whose capital the model gives as its answer, and what its features say of each."""

    def __init__(self, model: cs.ReplacementModel, options: Options) -> None:
        self.model, self.options = model, options
        tokens = {c: (self._token(c), self._token(capital)) for c, capital in CAPITAL_OF.items()}
        self.capital = {c: ids[1] for c, ids in tokens.items() if ids[0] is not None and ids[1] is not None}
        self.library = Library(model)
        asked = {country: self.prompt(ASKED, country) for country in self.capital}
        self.recorded = {c: self.library[prompt] for c, prompt in asked.items()}
        self.known = [c for c, r in self.recorded.items() if int(r.trace.logits[-1].argmax()) == self.capital[c]]
        if len(self.known) < 2:
            raise InputError(
                f"{model.model.name} answers with the capital of {len(self.known)} countries, and the story needs two; "
                "give a model that knows more, such as the one of `python -m examples.smollm2`."
            )
        self.about = {r: [(phrase, c) for phrase in phrases for c in self.known] for r, phrases in FOUND_ON.items()}
        self.read: dict[str, Activations] = {
            role: activations_at(model, [self.prompt(*each) for each in about], role)
            for role, about in self.about.items()
        }
        self.features = {(country, place): self._features(country, place) for country in self.known for place in PLACES}
        """What tells each country from the others, by place."""
        self.firing = {
            role: list(read.rate(torch.ones(read.n_prompts, dtype=torch.bool)) > 0) for role, read in self.read.items()
        }
        """What fires on some of the sentences: controls are drawn from these."""

    def _token(self, word: str) -> int | None:
        """The word's token within a sentence; None where it is several."""
        try:
            return self.model.model.token_id(" " + word)
        except PromptError:
            return None

    def prompt(self, phrase: str, country: str) -> Prompt:
        tokens = self.model.tokens(phrase.format(country))
        place = int((tokens == self.model.model.token_id(" " + country)).nonzero()[0, 0])
        return Prompt(tokens, {"country": place, "last": len(tokens) - 1}, phrase)

    def _features(self, country: str, place: Place) -> FeatureGroup:
        """What tells it from the others, in other sentences."""
        own, read = torch.tensor([of == country for _, of in self.about[place.role]]), self.read[place.role]
        k, rate = self.options.k, self.options.rate
        return contrast(self.model, read, own, ~own, at=place.role, layers=place.layers, k=k, rate=rate)


def changes(countries: Countries, country: str, other: str, seed: int) -> list[tuple[str, str, list[Intervention]]]:
    """Where, what, and the intervention itself: the features of every place removed, swapped, and with a control."""
    generator, made = torch.Generator().manual_seed(seed), []
    prompt: Recording = countries.recorded[country]
    for place in PLACES:
        own, new = (countries.features[c, place] for c in (country, other))
        swapped = swap(prompt, own, new)
        control = swapped.control(countries.model, generator, countries.firing[place.role])
        made += [
            (place.name, "removed", [suppress(prompt, own).intervention()]),
            (place.name, "swapped", [swapped.intervention()]),
            (place.name, "control", [control.intervention()]),
        ]
    return made


@torch.no_grad()
def measure(countries: Countries) -> pd.DataFrame:
    """A row for each country, other country and change: what the model answers then."""
    draw, rows, asked = random.Random(countries.options.seed), [], []
    for country in countries.known:
        rest = [c for c in countries.known if c != country]
        for other in draw.sample(rest, min(countries.options.others, len(rest))):
            for where, what, made in changes(countries, country, other, len(rows)):
                rows.append((countries.recorded[country], made))
                asked.append({"country": country, "other": other, "where": where, "what": what})
    chunks = run_alternatives(countries.model, rows, "model", library=countries.library)
    after = torch.cat([chunk.logits[:, -1] for chunk in chunks])
    frame = pd.DataFrame(asked)
    own, new = ([countries.capital[c] for c in frame[name]] for name in ("country", "other"))
    chance, each = after.softmax(-1), torch.arange(len(frame))
    clean = {c: r.trace.logits[-1].softmax(-1) for c, r in countries.recorded.items()}
    return frame.assign(
        before=[float(clean[c][countries.capital[c]]) for c in frame.country],
        own=chance[each, own].tolist(),
        new=chance[each, new].tolist(),
        moved=(after.argmax(-1) != torch.tensor(own)).tolist(),
        to_other=(after.argmax(-1) == torch.tensor(new)).tolist(),
        answer=countries.model.model.token_strings(after.argmax(-1)),
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the pairs of countries."""
    figures = ["before", "own", "new", "moved", "to_other"]
    return frame.groupby(["where", "what"], sort=False, as_index=False).agg(dict.fromkeys(figures, "mean"))


def page(frame: pd.DataFrame, countries: Countries) -> str:
    """The table as Markdown, with what it is of."""
    options = countries.options
    lines = [
        "# story_smollm2",
        "",
        "Claim: SmolLM2 knows of which country's capital it is asked by the first layer's features of the name.",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Dictionaries: {Path(options.dictionaries).name}. {len(frame) // (3 * len(PLACES))} pairs of "
        f"{len(countries.known)} countries: {', '.join(countries.known)}.",
        "Probabilities of the capital before and after, and of the other's capital; shares of pairs whose likeliest",
        "next token is no longer the capital, or is the other's.",
        "",
        "| features at | changed | capital, before | after | the other's | answer moved | it is the other's |",
        "|---|---|---|---|---|---|---|",
    ]
    for where, what, *figures in summary(frame).itertuples(index=False):
        lines.append(f"| {where} | {what} | {' | '.join(f'{value:.3f}' for value in figures)} |")
    one = pd.DataFrame(frame[(frame.country == countries.known[0]) & (frame["where"] == PLACES[0].name)])
    said = f"The first of them, {countries.known[0]}, whose capital has {one['before'].iloc[0]:.3f} before"
    lines += ["", f"{said}, with its features of layer 0 changed at the name:", ""]
    lines += ["| changed | to those of | capital, after | the other's | answer |", "|---|---|---|---|---|"]
    for row in one.to_dict("records"):
        lines.append(f"| {row['what']} | {row['other']} | {row['own']:.3f} | {row['new']:.3f} | `{row['answer']}` |")
    return "\n".join([*lines, ""])


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        model = cs.ReplacementModel(cs.load_model(options.model), cs.load_dictionaries(options.dictionaries))
        countries = Countries(model, options)
        frame = measure(countries)
        options.out.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.out / "pairs.csv", index=False)
        write_file(options.out / "story.md", page(frame, countries))
        if options.html:
            groups = {country: countries.features[country, PLACES[0]] for country in countries.known}
            print(write_story(countries, ASKED, groups, options.html))
        print(summary(frame).to_string(index=False, float_format=lambda x: f"{x:.3f}"))


if __name__ == "__main__":
    main()
