"""A question about a subject, whose corrupt prompt asks the same about another subject with as many tokens."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from circuitsae.tasks.task import Example
from circuitsae.tasks.wording import Lexicon, fill, pieces, slots
from transcoders.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What is asked of subjects, and the answer of each."""

    slot: str
    """Where the templates name the subject, and its role."""
    subjects: str
    """What the subjects are called in messages."""
    answers: Mapping[str, str]
    """Of each subject, without a leading space."""
    templates: Sequence[str]
    name: str = ""
    """Begins the name of the examples' template, where a task has several relations."""
    lead: str = " "
    """What the answer's token begins with; nothing after a quotation mark."""

    def __post_init__(self) -> None:
        if bad := [template for template in self.templates if slots(template) != [self.slot]]:
            raise InputError(f"The template {bad[0]!r} does not have the slot {{{self.slot}}} exactly once.")

    def answerable(self, lexicon: Lexicon, kind: str) -> dict[str, str]:
        """The subjects whose answers, a `kind` of words, are one token each.

        Raises `InputError` where these are fewer than two answers.
        """
        known = lexicon.single(kind, None, list(self.answers.values()), before=(self.lead,), at_least=2)
        return {subject: answer for subject, answer in self.answers.items() if answer in known}


def recall(lexicon: Lexicon, rng: random.Random, relation: Relation) -> Iterator[Example]:
    """Examples without an end, every subject as often as the others; the corrupt prompt's answer is the wrong one.

    Subjects without a counterpart, of as many tokens and with another answer, are refused.
    Raises `InputError` where fewer than two subjects are left.
    """
    partners = _partners(lexicon, relation)
    order = sorted(partners)
    while True:
        rng.shuffle(order)
        for subject in order:
            number = rng.randrange(len(relation.templates))
            yield _example(relation, number, subject, rng.choice(partners[subject]))


def _partners(lexicon: Lexicon, relation: Relation) -> dict[str, list[str]]:
    """For each subject those of another answer and of the same number of tokens, within a text and at its start."""
    answers = relation.answers
    inside = pieces(lexicon.model, [" " + subject for subject in answers])
    first = pieces(lexicon.model, list(answers))
    by_length: dict[tuple[int, int], list[str]] = defaultdict(list)
    length = {subject: (len(a), len(b)) for subject, a, b in zip(answers, inside, first, strict=True)}
    for subject in answers:
        by_length[length[subject]].append(subject)
    partners = {s: [other for other in by_length[length[s]] if answers[other] != answers[s]] for s in answers}
    alone = [subject for subject in answers if not partners[subject]]
    kept = lexicon.keep(relation.subjects, [s for s in answers if partners[s]], alone, at_least=2)
    return {subject: partners[subject] for subject in kept}


def _example(relation: Relation, number: int, subject: str, other: str) -> Example:
    template, answers = relation.templates[number], relation.answers
    clean, spans = fill(template, {relation.slot: subject})
    corrupt, _ = fill(template, {relation.slot: other})
    return Example(
        clean=clean,
        corrupt=corrupt,
        answers=(relation.lead + answers[subject],),
        wrong=(relation.lead + answers[other],),
        roles={relation.slot: spans[relation.slot][0]},
        template=f"{relation.name} {number}".strip(),
    )
