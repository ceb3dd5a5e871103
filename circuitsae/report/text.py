"""Tokens are untrusted text: how they are made visible, and how they are kept from being read as markup."""

import unicodedata

_ISOLATE, _POP = "\u2068", "\u2069"
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MOST_CHARACTERS = 200
"""Of one token: a page repeats its tokens thousands of times, and a tokenizer may hold one of any length."""
_NAMED = {"\n": "↵", "\r": "␍", "\t": "⇥"}


def visible(token: str, most: int | None = MOST_CHARACTERS) -> str:
    """A token as a reader should see it: outer spaces, line ends, controls and the empty string get a visible form.

    Of a longer one `most` characters are shown (None: all), and its length.
    """
    if not token:
        return "∅"
    if most is not None:
        token = cut(token, most)
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" "))
    right = 0 if not inner else len(token) - len(token.rstrip(" "))
    return "·" * left + "".join(_visible_character(c) for c in inner) + "·" * right


def printable(text: str) -> str:
    """Running text: spaces stay, line ends and controls get a visible form."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character in _BIDI_CONTROLS or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}:
        return f"\\u{ord(character):04x}"
    return character


def cut(token: str, most: int = MOST_CHARACTERS) -> str:
    """A token of at most `most` characters as it is; of a longer one its beginning and its length."""
    return token if len(token) <= most else f"{token[:most]}… ({len(token):,} characters)"


def shorten(text: str, width: int = 14) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def plotly_text(text: str) -> str:
    """Text that plotly.js shows literally: its labels read a subset of HTML, and neighbours must not be reordered."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_ISOLATE}{escaped}{_POP}"
