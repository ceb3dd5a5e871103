"""Which features of a circuit are about the unintended label: what people see of them, and three ways to judge."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from circuitsae.benchmark.data import read_records
from circuitsae.benchmark.layers import BenchmarkLayer, token_shares, weighted
from circuitsae.interventions import Feature, parse_target
from circuitsae.replacement import ReplacementModel
from circuitsae.report.text import visible
from circuitsae.shift.classifier import rows_and_exempt
from transcoders.errors import FileFormatError, InputError

SHOWN, CONTEXT = 20, 6
"""The strongest tokens that are looked at, and how many tokens before the very strongest one are shown."""
Spelled = dict[str, float]
"""The tokens among a feature's twenty strongest, with their shares of what it is active there; the largest first."""
_YES, _NO = ("yes", "y", "1", "true", "x"), ("no", "n", "0", "false", "")


@torch.no_grad()
def activations_by_text(
    model: ReplacementModel, features: Sequence[Feature], texts: Sequence[str]
) -> Float[np.ndarray, "text feature"]:
    """The mean of each feature over a text's tokens with features."""
    parts = [weighted(token_shares(without, None), a) for a, without, _ in _activations(model, features, texts)]
    return np.concatenate(parts)


def fires_on(model: ReplacementModel, features: Sequence[Feature], texts: Sequence[str]) -> list[tuple[Spelled, str]]:
    """What each feature fires on, and its strongest token with what comes before it."""
    places: list[list[tuple[float, int, int]]] = [[] for _ in features]
    rows: list[list[int]] = []
    for a, without, tokens in _activations(model, features, texts):
        value = a.masked_fill(without[..., None], 0).flatten(0, 1)
        top = value.topk(min(SHOWN, len(value)), dim=0)
        length = tokens.shape[1]
        for column, own in enumerate(places):
            found = zip(top.values[:, column].tolist(), top.indices[:, column].tolist(), strict=True)
            own += [(strength, len(rows) + i // length, i % length) for strength, i in found if strength > 0]
            own[:] = sorted(own, reverse=True)[:SHOWN]
        rows += tokens.tolist()
    return [_described(model, own, rows) for own in places]


def _activations(
    model: ReplacementModel, features: Sequence[Feature], texts: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each group of texts the activations `[row, pos, feature]`, where there are no features, and the tokens."""
    layers = sorted({feature.layer for feature in features})
    order = [number for layer in layers for number, f in enumerate(features) if f.layer == layer]
    back = torch.tensor(np.argsort(order), dtype=torch.long)
    for rows, without in rows_and_exempt(model, texts):
        at = model.model.activations(rows.tokens, {model.dictionaries.reads[layer] for layer in layers})
        found = [
            BenchmarkLayer(model.dictionaries, layer).activations(at[model.dictionaries.reads[layer]])[
                ..., [f.index for f in features if f.layer == layer]
            ]
            for layer in layers
        ]
        yield torch.cat(found, dim=-1)[..., back.to(without.device)], without, rows.tokens


def _described(
    model: ReplacementModel, places: Sequence[tuple[float, int, int]], rows: Sequence[Sequence[int]]
) -> tuple[Spelled, str]:
    if not places:
        return {}, ""
    total, parts = sum(strength for strength, _, _ in places), defaultdict[str, float](float)
    for strength, row, pos in places:
        parts[model.model.token_string(rows[row][pos])] += strength / total
    _, row, pos = places[0]
    context = model.model.token_strings(torch.tensor(rows[row][max(model.first, pos - CONTEXT) : pos + 1]))
    spelled = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return spelled, f"{''.join(context[:-1])}»{context[-1]}«".strip()


def tells(a: Float[np.ndarray, "text feature"], y: Bool[np.ndarray, "text"]) -> Float[np.ndarray, "feature"]:
    """`|2 AUC − 1|`: how well each feature alone tells the texts of a label from the others; 0 not at all, 1 always."""
    yes, no = int(y.sum()), int((~y).sum())
    if not yes or not no:
        raise InputError("What a feature tells of a label needs texts with it and without it.")
    area = (rankdata(a, axis=0)[y].sum(axis=0) - yes * (yes + 1) / 2) / (yes * no)
    return np.abs(2 * area - 1)


def judge_by_rule(
    intended: Float[np.ndarray, "feature"], unintended: Float[np.ndarray, "feature"], margin: float
) -> list[bool]:
    """About the unintended label: what `tells` more of it than of the intended one, by more than `margin`."""
    return (unintended - intended > margin).tolist()


def judge_by_words(spelled: Sequence[Spelled], words: Sequence[str], share: float = 0.5) -> list[bool]:
    """About the unintended label: what fires on some words with at least a `share` of its strongest activations."""
    known = {word.strip().casefold() for word in words}
    on = [sum(part for token, part in each.items() if token.strip().casefold() in known) for each in spelled]
    return [bool(part and part >= share) for part in on]


def described(
    model: ReplacementModel, features: Sequence[Feature], texts: Sequence[str]
) -> tuple[list[Spelled], list[str], list[str]]:
    """What each feature fires on, the same as a line to read, and the strongest token in its context."""
    found = fires_on(model, features, texts)
    lines = [", ".join(f"{visible(token)} {part:.0%}" for token, part in list(each.items())[:6]) for each, _ in found]
    return [each for each, _ in found], lines, [context for _, context in found]


def read_judged(path: Path | str) -> list[Feature]:
    """The features that a file says to ablate: those with yes under `ablate` in a table as `shift` writes it.

    A file of other endings than .csv and .jsonl has a feature such as 2.713 on each line. Raises `FileFormatError` for
    what is neither yes nor no, and for error nodes, which nobody can judge.
    """
    path = Path(path)
    if path.suffix in (".csv", ".jsonl"):
        records = read_records(path, ("id",))
        if not all("ablate" in record for record in records):
            raise FileFormatError(f"{path} has no field `ablate`; mark there the features to take out with yes.")
        chosen = []
        for number, record in enumerate(records, 1):
            said = record["ablate"].strip().casefold()
            if said not in _YES + _NO:
                raise FileFormatError(
                    f"Row {number} of {path} says {record['ablate']!r} under `ablate`; write yes or no."
                )
            chosen += [record["id"]] if said in _YES else []
    else:
        if not path.is_file():
            raise FileFormatError(f"There is no file {path}; give the table of features that `shift` wrote, or a list.")
        chosen = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    return [_feature(name, path) for name in dict.fromkeys(chosen)]


def _feature(name: str, path: Path) -> Feature:
    try:
        node = parse_target(name)
    except InputError:
        node = None
    if not isinstance(node, Feature) or node.at is not None:
        raise FileFormatError(f"{path} marks {name!r}, which is no feature; only features such as 2.713 can be judged.")
    return node
