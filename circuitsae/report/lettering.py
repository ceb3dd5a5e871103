"""How wide text is, and where it breaks, without a font at hand: the advance widths of DejaVu Sans.

A picture is laid out before it is known what draws it. DejaVu Sans is wider than Arial, Helvetica and Liberation Sans,
so what fits here fits there as well.
"""

import re
import unicodedata

from circuitsae.report.text import printable

_REGULAR = {
    0.29: "'ijlIJ", 0.32: " \u00a0,.", 0.36: "/:;\\|f-", 0.4: "()[]t!", 0.42: "r", 0.5: '"*_`', 0.53: "sz?", 0.56: "cL",
    0.6: "FkvxyP", 0.64: "TYaoeESbdghnpqu$0123456789{}", 0.7: "KAVBRXZC", 0.77: "UHNDG&", 0.82: "wOQ",
    0.87: "#+<=>^~M→✓⇄○↵−", 1.0: "%mW@…",
}  # fmt: skip
_EM = {character: em for em, characters in _REGULAR.items() for character in characters}
_BOLD, _BOLD_LEAST = 1.16, 0.36
"""Of bold letters: how much wider they are, and the narrowest."""
_WIDEST = 1.1
"""Of whatever is not ASCII."""
_NOT_XML = re.compile("[\ufffe\uffff]|[\U0001fffe\U0001ffff]")
_KEPT = re.compile(r"(\d(?= %)|\bat(?= \S)|(?= ·)) ")
"""Spaces at which no line breaks: of "12 %" and "at END"."""
ELLIPSIS = "…"


def clean(text: str) -> str:
    """Text that any renderer, XML included, takes: controls, marks of direction and noncharacters made visible."""
    return _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", printable(text))


def width(text: str, size: float, *, bold: bool = False) -> float:
    """Points that a line of text takes at most, at a size in points."""
    ems = [_EM[c] if c in _EM else _other(c) for c in text]
    return float(size * sum([max(em * _BOLD, _BOLD_LEAST) for em in ems] if bold else ems))


def _other(character: str) -> float:
    return 0.0 if unicodedata.combining(character) or character == "\u200d" else _WIDEST


def wrapped(text: str, size: float, most: float, *, lines: int, bold: bool = False) -> list[str]:
    """At most so many lines, each at most `most` points wide; what does not fit ends in an ellipsis.

    Lines break at spaces, and inside a word only where it is wider than a line.
    """
    made = [""]
    for word in _KEPT.sub("\\1\u00a0", " ".join(text.split())).split(" "):
        tried = f"{made[-1]} {word}".strip()
        if width(tried, size, bold=bold) <= most:
            made[-1] = tried
            continue
        pieces = _pieces(word, size, most, bold)
        made = [*made, *pieces] if made[-1] else pieces
        if len(made) > lines:
            break
    if len(made) > lines:
        made = [*made[: lines - 1], fitting(f"{made[lines - 1]}{ELLIPSIS}", size, most, bold=bold)]
    return [line.replace("\u00a0", " ") for line in made]


def _pieces(word: str, size: float, most: float, bold: bool) -> list[str]:
    """A word in parts that are narrow enough."""
    made = [""]
    for character in word:
        if made[-1] and width(made[-1] + character, size, bold=bold) > most:
            made.append("")
        made[-1] += character
    return made


def fitting(text: str, size: float, most: float, *, bold: bool = False) -> str:
    """A line cut to a width, with an ellipsis where something is cut."""
    if width(text, size, bold=bold) <= most:
        return text
    kept = text.rstrip(ELLIPSIS)
    while len(kept) > 1 and width(kept + ELLIPSIS, size, bold=bold) > most:
        kept = kept[:-1]
    return kept + ELLIPSIS
