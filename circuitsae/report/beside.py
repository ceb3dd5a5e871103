"""Ways from one page to another: pages that lie beside a file, as the links that it holds.

Every page says in its head what it is, so that only pages of ours are linked to.
"""

import html
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypedDict
from urllib.parse import quote

Kind = Literal["graph", "comparison", "graphs", "features", "card", "report"]
"""What a page is: of one graph, of two, the index of a folder, all features, some feature cards, a document."""

_KIND = re.compile(rb'<meta name="generator" content="circuitsae (\w+)" />')
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_HEAD = 4096
_UP = 3
"""An index lists graphs so many folders below it."""


class Way(TypedDict):
    """A link to another page."""

    href: str
    text: str


def kind_of(page: Path) -> str | None:
    """What the page in a file is; None where there is no file or it is no page of ours."""
    found = _KIND.search(_head(page))
    return found[1].decode() if found else None


def ways_from(page: str | Path) -> list[Way]:
    """Links from a page that is written to `page`: to the index that its folder belongs to, features, the report.

    Only pages that are there already are linked to, by addresses relative to the page.
    """
    page = Path(os.path.abspath(page))
    folders = [page.parent, *page.parent.parents][: _UP + 1]
    wanted = [("graphs", "All graphs", [folder / "index.html" for folder in folders])]
    wanted += [("features", "All features", [folder / "features" / "index.html" for folder in folders])]
    wanted += [("report", "Report", [page.parent / "report.html"])]
    ways = []
    for kind, text, places in wanted:
        there = next((place for place in places if place != page and kind_of(place) == kind), None)
        if there is not None:
            ways.append(way_to(there, page, text))
    return ways


def pages_of(folder: str | Path) -> list[Way]:
    """Links from the index of a folder: to comparisons and reports that lie in it, by their titles, and to features."""
    index = Path(os.path.abspath(folder)) / "index.html"
    ways = [way_to(page, index, _title(page)) for page in sorted(index.parent.glob("*.html")) if _is_listed(page)]
    return ways + [way for way in ways_from(index) if way["text"] == "All features"]


def pages_there(targets: Iterable[tuple[str, Path | None]], page: str | Path) -> list[Way]:
    """Links from `page` to those of some named pages that are there."""
    return [way_to(Path(target), page, text) for text, target in targets if target is not None and target.is_file()]


def way_to(target: Path, page: str | Path, text: str) -> Way:
    """A link from a page to a file, relative to the page's folder."""
    return {"href": quote(Path(os.path.relpath(target, Path(page).parent)).as_posix()), "text": text}


def _is_listed(page: Path) -> bool:
    return kind_of(page) in {"comparison", "report"}


def _title(page: Path) -> str:
    found = _TITLE.search(_head(page).decode(errors="replace"))
    return html.unescape(found[1]) if found else page.name


def _head(page: Path) -> bytes:
    try:
        with page.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""
