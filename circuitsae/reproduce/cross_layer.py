"""Cross-layer audit: one task traced with a cross-layer transcoder and with per-layer ones, and the two compared.

A cross-layer feature writes to all later layers, so a path of two steps (city → state → capital) may show as one.
`Path lengths`: walking from the answer to its sources, each source with probability Â (its share of the target's
absolute input), the number of edges walked until a token. `Middle step`: the features of the state, found on one-hop
sentences about other cities, suppressed and swapped in the real model. Both are reported for both kinds; where they
disagree, the graph's length is a property of the dictionary, not of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.features import Activations, FeatureGroup, activations_at, contrast, suppress, swap
from circuitsae.graph import AttributionGraph, NodeKind
from circuitsae.interventions import Prompt, run_alternatives
from circuitsae.interventions.prompts import Library
from circuitsae.pocket.facts import CITIES, STATES
from circuitsae.replacement import ReplacementModel
from circuitsae.tasks import Task, load_task

ONE_HOP = (
    "The city of {city} is in", "The state containing {city} is", "The state that contains {city} is",
    "The state where {city} is found is",
)  # fmt: skip
"""Sentences that name a city and ask for its state."""
_PLACES = (("city", 40), ("END", 10))
_FACTOR, _STRENGTH = -0.25, 2.0
"""When swapped, the state's features go to this times their activation, the other's to this times their mean."""


@dataclass(frozen=True)
class Walk:
    """Where a walk from the answer ends."""

    steps: dict[int, float]
    """Share of the walks that end at the subject's token after so many edges."""
    to_errors: float
    through: float
    """Mean number of the middle step's features that a walk passes."""


def walk(graph: AttributionGraph, pos: int, middle: set[tuple[int, int]] = frozenset()) -> Walk:  # pyright: ignore[reportArgumentType]
    """The distribution over path lengths of a full graph's walks from its logits to the token at `pos`."""
    shares, state = graph.shares, graph.start / graph.start.sum()
    token = np.array([n.kind is NodeKind.TOKEN and n.pos == pos for n in graph.nodes])
    chosen = np.array([n.kind is NodeKind.FEATURE and (n.layer, n.index) in middle for n in graph.nodes])
    not_bias = ~graph.mask(NodeKind.BIAS)
    steps, errors, through = {}, 0.0, 0.0
    for step in range(1, graph.n_layers + 2):
        state = (state @ shares) * not_bias
        steps[step] = float(state[token].sum())
        errors += float(state[graph.mask(NodeKind.ERROR)].sum())
        through += float(state[chosen].sum())
    return Walk(steps, errors, through)


class States:
    """The features of every state in one set of dictionaries, from one-hop sentences about its cities."""

    def __init__(self, model: ReplacementModel, seed: int) -> None:
        self.model = model
        task = load_task("two-hop", model.model, 2 * len(CITIES), seed, cities=CITIES, templates=ONE_HOP)
        prompts: list[Prompt] = []
        self.states: list[str] = []
        self.texts: list[str] = []
        for pair in task.tokens(model.model):
            prompts += pair.prompts()
            examples = [task.examples[i] for i in pair.index.tolist()]
            self.states += [example.facts["state"] for example in examples]
            self.texts += [example.clean for example in examples]
        self.read: dict[str, Activations] = {place: activations_at(model, prompts, place) for place, _ in _PLACES}

    def features(self, state: str, city: str = "") -> list[FeatureGroup]:
        """What tells the state's cities, but one, from other states' at each place: early at the city, then at END."""
        named = zip(self.states, self.texts, strict=True)
        own = torch.tensor([of == state and (not city or city not in text) for of, text in named])
        others = torch.tensor([of != state for of in self.states])
        quarter = max(1, self.model.model.n_layers // 4)
        layers = {"city": range(quarter), "END": range(quarter, 2 * quarter)}
        return [
            contrast(self.model, self.read[place], own, others, at=place, layers=layers[place], k=k)
            for place, k in _PLACES
        ]

    def firing(self) -> list[torch.Tensor]:
        """The features that fire on these sentences: what controls are drawn from."""
        every = torch.ones(len(self.states), dtype=torch.bool)
        return list((torch.stack([read.rate(every) for read in self.read.values()]) > 0).any(0))


@torch.no_grad()
def middle_step(model: ReplacementModel, task: Task, states: States, seed: int = 0) -> dict[str, float]:
    """Share of rightly answered prompts whose answer moves, or becomes another state's capital, by each change."""
    library, firing, rng = Library(model), states.firing(), np.random.default_rng(seed)
    capital = {
        state.name: model.model.token_id(" " + state.capital) for state in STATES if _single(model, state.capital)
    }
    rows, asked = [], []
    for pair in task.tokens(model.model):
        for i, prompt in enumerate(pair.prompts()):
            example, recording = task.examples[int(pair.index[i])], library[prompt]
            own, right = example.facts["state"], int(pair.answers[i][0])
            known = [name for name in capital if name != own and name in states.states]
            other = known[rng.integers(len(known))]
            if int(recording.trace.logits[-1].argmax()) != right:
                continue
            mine, new = states.features(own, _city(example.clean)), states.features(other)
            changes = {
                "suppressed": [suppress(recording, group) for group in mine],
                "inverted": [suppress(recording, group, -0.75) for group in mine],
                "swapped": [
                    swap(recording, group, by, factor=_FACTOR, strength=_STRENGTH)
                    for group, by in zip(mine, new, strict=True)
                ],
            }
            draw = torch.Generator().manual_seed(seed + i)
            for name, made in changes.items():
                rows.append((recording, [change.intervention() for change in made]))
                asked.append((name, right, capital[other]))
                rows.append((recording, [change.control(model, draw, firing).intervention() for change in made]))
                asked.append((f"{name}, control", right, capital[other]))
    if not rows:
        return {}
    answers = torch.zeros(len(rows), dtype=torch.long)
    for length in {len(recording) for recording, _ in rows}:
        here = [i for i, (recording, _) in enumerate(rows) if len(recording) == length]
        chunks = run_alternatives(model, [rows[i] for i in here], "model", library=library)
        answers[here] = torch.cat([chunk.logits[:, -1].argmax(-1) for chunk in chunks]).cpu()
    found: dict[str, list[tuple[bool, bool]]] = {}
    for (name, right, new), answer in zip(asked, answers.tolist(), strict=True):
        found.setdefault(name, []).append((answer != right, answer == new))
    moved = {f"{name}: answer moved": float(np.mean([m for m, _ in v])) for name, v in found.items()}
    swapped = {f"{n}: other capital": float(np.mean([o for _, o in v])) for n, v in found.items() if "swapped" in n}
    return moved | swapped


def cross_layer_audit(models: Mapping[str, ReplacementModel], *, n: int = 20, seed: int = 0) -> pd.DataFrame:
    """A row per figure, a column per set of dictionaries: lengths of paths to the city, and the middle step.

    `models` are one language model with several sets of transcoders ({"clt": …, "plt": …}).
    """
    columns = {}
    for name, model in models.items():
        task = load_task("two-hop", model.model, n, seed)
        states = States(model, seed)
        walks, errors, through = [], [], []
        for pair in task.tokens(model.model):
            for i in range(len(pair)):
                example, pos = task.examples[int(pair.index[i])], int(pair.roles["city"][i])
                graph = attribute(model, pair.clean[i], targets=LogitTargets([int(pair.answers[i][0])]))
                groups = states.features(example.facts["state"], _city(example.clean))
                middle = {(layer, index) for group in groups for layer, index in group.index.tolist()}
                found = walk(graph, pos, middle)
                walks.append(list(found.steps.values()))
                errors.append(found.to_errors)
                through.append(found.through)
        columns[name] = _lengths(np.array(walks), errors, through) | middle_step(model, task, states, seed)
    return pd.DataFrame(columns).rename_axis("figure").reset_index()


def _lengths(walks: np.ndarray, errors: Sequence[float], through: Sequence[float]) -> dict[str, float]:
    total = walks.sum(1)
    steps = np.arange(1, walks.shape[1] + 1)
    split = (walks / total[:, None]).mean(0)
    return {
        "walks that end at the city's token": float(total.mean()),
        "walks that end at error nodes": float(np.mean(errors)),
        "mean edges from the answer to the city": float(((walks @ steps) / total).mean()),
        "of these, no feature between": float(split[0]),
        "one feature between": float(split[1]),
        "two features or more between": float(split[2:].sum()),
        "features of the state passed per walk": float(np.mean(through)),
    }


def _city(text: str) -> str:
    """The city that a prompt names; the longest, where one name holds another."""
    return max((city for city in CITIES if city in text), key=len)


def _single(model: ReplacementModel, capital: str) -> bool:
    return len(model.model.to_tokens(" " + capital, bos=False)) == 1
