"""All features of a dictionary as static pages: a list with search and filters, and a card for each feature.

The pages open from disk with the network unplugged. A page cannot read other files there, so the data of each is in
itself: the list holds a line per feature (a page per layer where there are many), and cards come in blocks.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from circuitsae.report.beside import Way, way_to, ways_from
from circuitsae.report.cards import card_data
from circuitsae.report.page import (
    fill_template,
    hash_source,
    json_for_script,
    page_head,
    policy,
    read_static,
    read_styles,
)
from circuitsae.report.text import visible
from transcoders.files import write_file

PER_PAGE = 64
"""Cards of a page."""
LISTED_TOGETHER = 20_000
"""Features up to which one page lists all layers."""
INDEX = "index.html"
_COMMON = ("js/format.js", "js/dom.js")
_PEAKS, _RAISES = 4, 3


@runtime_checkable
class CardLike(Protocol):
    """One card, as JSON values."""

    def as_dict(self) -> Mapping[str, Any]: ...


@runtime_checkable
class CardSet(Protocol):
    """The cards of a dictionary, as `circuitsae.features.FeatureCards`."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def widths(self) -> Sequence[int]: ...

    def __iter__(self) -> Iterator[tuple[int, int]]: ...

    def card(self, layer: int, feature: int, /) -> CardLike | None: ...


def write_browser(cards: CardSet, folder: str | Path, *, title: str | None = None) -> Path:
    """Write the pages of all features to a folder and return its `index.html`.

    Each page is written whole or not at all. Tokens and labels are shown as text, whatever they say.
    """
    folder = Path(folder)
    title = title or _default_title(cards.manifest)
    together = sum(cards.widths) <= LISTED_TOGETHER
    lists = [INDEX] if together else [_list_name(layer) for layer in range(len(cards.widths))]
    for name, layers in zip(lists, [None] if together else range(len(cards.widths)), strict=True):
        places = [place for place in cards if layers is None or place[0] == layers]
        listed = _Listed()
        for (layer, block), members in groupby(places, key=lambda place: (place[0], place[1] // PER_PAGE)):
            found = [card_json(cards, *place) for place in members]
            listed.add(found)
            data = {"title": title, "cards": found, "per_page": PER_PAGE, "widths": list(cards.widths), "back": name}
            write_file(folder / "cards" / f"{layer}-{block}.html", _card_page(data))
        ways = ways_from(folder / name) if together else [way_to(folder / INDEX, folder / name, "All layers")]
        data = {"title": title, "about": _about(cards.manifest), "per_page": PER_PAGE, "ways": ways, **listed.data()}
        write_file(folder / name, _list_page(data))
    if not together:
        write_file(folder / INDEX, _contents(title, cards, lists, ways_from(folder / INDEX)))
    return folder / INDEX


def card_json(cards: CardSet, layer: int, feature: int) -> dict[str, Any]:
    """A card as pages embed it."""
    card = cards.card(layer, feature)
    return card_data({"layer": layer, "feature": feature} if card is None else card.as_dict())


class _Listed:
    """A line per feature, in columns; every token once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._statuses: dict[str, int] = {"": 0}
        names = ("layer", "feature", "rate", "max", "label", "status", "tokens", "peaks", "raises")
        self._columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, cards: Sequence[Mapping[str, Any]]) -> None:
        for card in cards:
            label = card.get("label") or {}
            examples = card.get("examples", ())
            fired = [t for e in examples for t, a in zip(e["tokens"], e["activations"], strict=True) if a > 0]
            peaks = [e["tokens"][e["peak"]] for e in examples if e["stratum"] == "top"]
            line = {
                "layer": card["layer"],
                "feature": card["feature"],
                "rate": card.get("firing_rate") or 0,
                "max": card.get("max_activation") or 0,
                "label": label.get("display", ""),
                "status": self._statuses.setdefault(label.get("status", ""), len(self._statuses)),
                "tokens": sorted(set(self._tokens(fired))),
                "peaks": self._tokens(peaks)[:_PEAKS],
                "raises": self._tokens([row["token"] for row in card.get("top_logits", ())[:_RAISES]]),
            }
            for name, value in line.items():
                self._columns[name].append(value)

    def _tokens(self, tokens: Sequence[str]) -> list[int]:
        return [self._numbers.setdefault(visible(token), len(self._numbers)) for token in dict.fromkeys(tokens)]

    def data(self) -> dict[str, Any]:
        return {"features": self._columns, "vocabulary": list(self._numbers), "statuses": list(self._statuses)}


def _list_page(data: Mapping[str, Any]) -> str:
    return _page("list.html", data, (*_COMMON, "js/theme.js", "js/ways.js", "browser/list.js"))


def _card_page(data: Mapping[str, Any]) -> str:
    return _page("card.html", data, (*_COMMON, "js/card.js", "js/theme.js", "browser/card.js"))


def _page(template: str, data: Mapping[str, Any], scripts: Sequence[str], **parts: str) -> str:
    script = "\n".join(map(read_static, scripts))
    parts |= {"data": json_for_script(data), "scripts": f"<script>{script}</script>"}
    return _filled(template, data["title"], hash_source(script), parts)


def _contents(title: str, cards: CardSet, lists: Sequence[str], ways: Sequence[Way]) -> str:
    """The first page where every layer has its own list."""
    links = "\n".join(
        f'<li><a href="{name}">Layer {layer}</a> <span class="hint">{width:,} features</span></li>'
        for layer, (name, width) in enumerate(zip(lists, cards.widths, strict=True))
    )
    scripts = (*_COMMON, "js/theme.js", "js/ways.js", "browser/contents.js")
    parts = {"about": html.escape(_about(cards.manifest)), "links": links}
    return _page("contents.html", {"title": title, "ways": list(ways)}, scripts, **parts)


def _filled(template: str, title: str, script: str, parts: Mapping[str, str]) -> str:
    style = read_styles("base", "page", "card", "paper") + read_static("browser/browser.css")
    kind = "card" if template == "card.html" else "features"
    head = page_head(title, policy(script, styles=hash_source(style)), style, kind)
    return fill_template(f"browser/{template}", {**parts, "head": head, "title": html.escape(title)})


def _list_name(layer: int) -> str:
    return f"layer-{layer}.html"


def _default_title(manifest: Mapping[str, Any]) -> str:
    return visible(f"Features of {manifest.get('model', 'a model')} ({manifest.get('kind', 'dictionaries')})")


def _about(manifest: Mapping[str, Any]) -> str:
    """Corpus, tokens and dead features in one line."""
    dead = manifest.get("dead")
    parts = [
        f"collected over {manifest.get('tokens_seen', 0):,} tokens of {visible(str(manifest.get('corpus', 'text')))}",
        f"dead by layer: {', '.join(map(str, dead))}" if dead else "",
    ]
    return " · ".join(part for part in parts if part)
