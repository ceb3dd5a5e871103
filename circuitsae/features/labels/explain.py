"""Labels of many features by a language model, each judged by the same model on held-out text."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from typing import Any

from circuitsae.features.cards import FeatureCards
from circuitsae.features.labels.answers import Answers, Cost
from circuitsae.features.labels.describing import ask_again, ask_for_label, excerpts_of, read_label
from circuitsae.features.labels.excerpts import Excerpt
from circuitsae.features.labels.explainers import Explainer, Messages
from circuitsae.features.labels.judging import Test, judge, questions
from circuitsae.features.ledger import Label, Ledger
from transcoders.errors import InputError
from transcoders.progress import progress_bar
from transcoders.training.stopping import stop_requests

Place = tuple[int, int]
"""Layer and number of a feature."""
HeldOut = Callable[[int, int], Sequence[Excerpt]]
"""Held-out texts of a feature, by its layer and number: some that it fires in, and some that it does not."""
TESTS: tuple[Test, ...] = ("detection", "fuzzing")
ROOM = 600
"""Tokens that the answer with a label may take: some models think aloud first."""
_SAID, _JUDGED = 60, 4
"""Tokens of an answer, as they are estimated: with a label, and for each text that is judged."""
_LETTERS = 4
"""Of a token, as they are estimated."""


@dataclass(frozen=True)
class Explained:
    """What came of it."""

    labels: Mapping[Place, Label]
    """With the rows `detection` and `fuzzing`, as far as there were held-out texts of either kind."""
    unread: tuple[Place, ...] = ()
    """Features for which the model twice gave no answer of the form asked for."""
    cost: Cost = field(default_factory=Cost)

    def added_to(self, ledger: Ledger) -> Ledger:
        """A ledger with these labels in the place of earlier ones of the same model and feature; all others stay."""
        new = list(self.labels.values())
        taken = {(label.source, label.features) for label in new}
        kept = [label for label in ledger.labels if (label.source, label.features) not in taken]
        return replace(ledger, labels=[*kept, *new])


def choose_features(
    cards: FeatureCards,
    names: Sequence[Place] = (),
    *,
    most: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Place]:
    """The features that were named, or those that ever fire: of some layers, and at most so many, drawn at random.

    Raises `InputError` for a feature that the cards have not, or that never fires, and where none is left.
    """
    if names:
        for layer, feature in names:
            card = cards.card(layer, feature)
            if card is None or card.dead:
                said = "is not there" if card is None else "never fired while its card was collected"
                raise InputError(f"Feature {layer}.{feature} {said}; name others.")
        return list(dict.fromkeys(names))
    frame = cards.frame()
    alive = frame[~frame["dead"] & (True if layers is None else frame["layer"].isin(layers))]
    found = list(zip(alive["layer"].tolist(), alive["feature"].tolist(), strict=True))
    if not found:
        raise InputError("No feature of these layers ever fires; choose others.")
    if most is not None and most < len(found):
        found = sorted(random.Random(seed).sample(found, most))
    return found


def explain(
    explainer: Explainer,
    cards: FeatureCards,
    features: Sequence[Place],
    held_out: HeldOut,
    *,
    tests: Sequence[Test] = TESTS,
    seed: int = 0,
    command: str = "",
    progress: bool = False,
) -> Explained:
    """Ask for a label of each feature from the examples of its card, and judge it on held-out texts.

    With `Answers` as the explainer, a run that is ended, by Ctrl-C, SIGTERM or an address that answers no more, goes on
    where it was when it is started again.
    """
    labels: dict[Place, Label] = {}
    unread: list[Place] = []

    def one(place: Place) -> Label | None:
        text = _label_of(explainer, cards, place)
        return None if text is None else _judged(explainer, place, text, held_out, tests, seed, command)

    with stop_requests() as stop, progress_bar(shown=progress) as bar:
        task = bar.add_task("explaining", total=len(features))
        for done, (place, label) in enumerate(_in_turn(one, features, explainer.at_once, lambda: stop.number), 1):
            if label is None:
                unread.append(place)
            else:
                labels[place] = label
            bar.update(task, completed=done)
        if stop.number is not None and (done := len(labels) + len(unread)) < len(features):
            raise stop.stopped(
                f"Stopped after {done:,} of {len(features):,} features; the answers are kept, and the same command "
                "goes on."
            )
    order = [place for place in features if place in labels]
    cost = explainer.cost if isinstance(explainer, Answers) else Cost()
    return Explained({place: labels[place] for place in order}, tuple(sorted(unread)), cost)


def plan(
    explainer: Answers,
    cards: FeatureCards,
    features: Sequence[Place],
    held_out: HeldOut,
    *,
    tests: Sequence[Test] = TESTS,
    seed: int = 0,
) -> Cost:
    """What `explain` would ask that is not answered yet, and nothing is asked: calls, and tokens at four letters each.

    Where an answer is still to come, the label that is judged is taken to be as long as a long one.
    """
    cost = Cost()

    def count(messages: Messages, most: int, said: int) -> str | None:
        nonlocal cost
        if (known := explainer.known(messages, most)) is not None:
            cost += Cost(kept=1)
            return known.text
        letters = sum(len(each["content"]) for each in messages)
        cost += Cost(1, round(letters / _LETTERS), said)
        return None

    for place in features:
        answer = count(_question(cards, place), ROOM, _SAID)
        label = (read_label(answer) if answer is not None else None) or "x" * 80
        for test in tests:
            for question in questions(label, test, held_out(*place), seed=seed):
                count(question.messages, question.room, _JUDGED * len(question.truth))
    return cost


def _question(cards: FeatureCards, place: Place) -> Messages:
    card = cards.card(*place)
    assert card is not None
    return ask_for_label(excerpts_of(card), [each["token"] for each in card.top_logits])


def _label_of(explainer: Explainer, cards: FeatureCards, place: Place) -> str | None:
    """The label; where the answer cannot be read, it is asked for once more."""
    messages = _question(cards, place)
    answer = explainer.answer(messages, ROOM).text
    if (label := read_label(answer)) is not None:
        return label
    return read_label(explainer.answer(ask_again(messages, answer), ROOM).text)


def _judged(
    explainer: Explainer, place: Place, text: str, held_out: HeldOut, tests: Sequence[Test], seed: int, command: str
) -> Label:
    label, excerpts = Label(text, (f"{place[0]}.{place[1]}",), source=explainer.name), held_out(*place)
    found = [judge(explainer, text, test, excerpts, seed=seed) for test in tests]
    return label.with_rows(*(one.row(explainer.name, command) for one in found if one.yes + one.no + one.unread))


def _in_turn(
    work: Callable[[Place], Any], places: Sequence[Place], at_once: int, stopped: Callable[[], object]
) -> Iterator[tuple[Place, Any]]:
    """The results as they come, of so many at a time; those under way are waited for where it stops or one fails."""
    left = iter(places)
    with ThreadPoolExecutor(at_once) as pool:
        running: dict[Future[Any], Place] = {}
        while True:
            while len(running) < at_once and stopped() is None and (place := next(left, None)) is not None:
                running[pool.submit(work, place)] = place
            if not running:
                return
            for future in wait_for(running, timeout=1.0, return_when="FIRST_COMPLETED").done:
                yield running.pop(future), future.result()
