"""Rules in a few English words."""

from circuitsae.features.labels.rules import Condition, Rule
from circuitsae.features.labels.surroundings import BREAK, NAME, PIECE

LENGTH = 40
"""Characters that a label should not exceed; a node of a graph has room for so many."""
_VALUES = (10, 4, 3, 2, 1)
_LONG = 16

_NOUNS = {
    "number": "numbers",
    "number of one digit": "numbers of one digit",
    "number of two digits": "numbers of two digits",
    "number of four digits": "numbers of four digits",
    "punctuation mark": "punctuation marks",
    "capitalised word": "capitalised words",
    NAME: "name-like words",
    "word in capitals": "words in capitals",
    "lower-case word": "lower-case words",
    PIECE: "pieces that continue words",
    BREAK: "line breaks",
}
_ONE = {NAME: "name-like word"}
_WORDS = {
    "previous": "after {}",
    "two back": "two after {}",
    "three back": "three after {}",
    "next": "before {}",
    "copied": "what {} followed before",
    "sentence has": "with {} earlier in the sentence",
    "text has": "with {} earlier in the text",
    "previous class": "after a {}",
    "next class": "before a {}",
    "sentence has class": "with a {} earlier in the sentence",
}
_REPEATS = {
    "seen before": "seen before in the text",
    "second time": "for the second time",
    "third time or later": "for the third time or later",
    "after a word seen before": "after a word seen before",
    "pair seen before": "in a pair of words seen before",
    "next seen before": "before a word seen before",
    "next pair seen before": "before what followed it before",
}


def say(rule: Rule, *, length: int = LENGTH) -> str:
    """A rule in as many of its words as fit in `length` characters, `…` for the others: `“John”, “Mary” after “and”`.

    At least one word of each condition is said, so that a rule of two may take more.
    """
    return next((said for n in _VALUES if len(said := _said(rule, n)) <= length), _said(rule, 1))


def _said(rule: Rule, values: int) -> str:
    if rule.joined == "or":
        return " or ".join(("not " if c.negated else "") + _phrase(c, values) for c in rule.conditions)
    asserted = [c for c in rule.conditions if not c.negated]
    denied = " or ".join(_phrase(c, values) for c in rule.conditions if c.negated)
    # What the token is comes before where it stands.
    asserted.sort(key=lambda c: {"token": 0, "class": 1}.get(c.attribute, 2))
    phrases = [_phrase(c, values) for c in asserted]
    if not phrases:
        return f"everywhere but {denied}"
    nouns = sum(c.attribute in ("token", "class") for c in asserted)
    said = (" among " if nouns == 2 else " " if nouns == 1 else ", ").join(phrases)
    return f"{said}, but not {denied}" if denied else said


def _phrase(condition: Condition, values: int) -> str:
    """One condition, without its denial."""
    names = condition.values
    match condition.attribute:
        case "token":
            return _quoted(names, values)
        case "class":
            return _listed([_NOUNS.get(name, name.replace("word", "words")) for name in names], values)
        case "place":
            return _listed(names, values)
        case "repeats":
            return _listed([_REPEATS.get(name, name) for name in names], values)
        case "previous class" | "next class" | "sentence has class":
            return _WORDS[condition.attribute].format(_listed([_ONE.get(name, name) for name in names], values))
        case attribute:
            return _WORDS[attribute].format(_quoted(names, values))


def _quoted(words: tuple[str, ...], values: int) -> str:
    return _listed([f"“{_shown(word)}”" for word in words], values)


def _listed(words: list[str] | tuple[str, ...], values: int) -> str:
    return ", ".join(words[:values]) + (" …" if len(words) > values else "")


def _shown(word: str) -> str:
    """A word with its spaces made visible, cut where it is long."""
    word = word.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") if not word.strip() else word
    return word if len(word) <= _LONG else word[: _LONG - 1] + "…"
