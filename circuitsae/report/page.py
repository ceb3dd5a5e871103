"""One graph, one HTML file: the files of `static/`, plotly.js and the data, put together and written at once."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from circuitsae.graph.supernodes import CardsLike
from circuitsae.report.beside import Kind, ways_from
from circuitsae.report.cards import LedgerLike
from circuitsae.report.claims import ValidationLike
from circuitsae.report.data import GraphLike, opening, page_data
from circuitsae.report.packing import packed
from circuitsae.report.text import shorten, visible
from transcoders.errors import InputError
from transcoders.files import write_file
from transcoders.plotly_bundle import BUNDLE_FILE, BUNDLE_URL, basic_bundle
from transcoders.token_text import join_tokens

PlotlyJS = Literal["inline", "cdn", "directory"]
"""Where the page finds plotly.js: in itself (works offline), on cdn.plot.ly, or in a file beside it."""

# Later files use what earlier ones put on `window.viewer`.
_SCRIPTS = (
    *(
        "format",
        "dom",
        "verdicts",
        "data",
        "claims",
        "compare",
        "comparepanel",
        "pictures",
        "state",
        "persistence",
        "groups",
        "neuronpedia",
        "hash",
    ),
    *("folding", "layout", "strands", "geometry", "labels", "overlay", "edges", "traces", "plot"),
    *("superlayout", "supergraph", "bench"),
    *("ways", "questions", "header", "card", "notes", "edgetest", "scatter", "commands"),
    *("panel", "list", "controls", "filters", "picture", "export", "print", "keyboard", "embedded", "main"),
)
_SERVING = ("serve", "outcome")
"""Before the last of them, where there is a server."""
_STYLES = (
    *("base", "page", "header", "menu", "bench", "suggestions", "panel", "questions"),
    *("claims", "card", "compare", "serve", "print"),
)
_SPECIAL = re.compile(r"<[^<>\s]{1,40}>")
_PLACE_HOLDER = re.compile(r"<!--\{(\w+)\}-->|/\*\{(\w+)\}\*/")


def write_html(
    graph: GraphLike,
    path: str | Path,
    *,
    validation: ValidationLike | pd.DataFrame | None = None,
    cards: CardsLike | None = None,
    ledger: LedgerLike | None = None,
    supernodes: Sequence[Any] | None = None,
    opened: Mapping[str, Any] | None = None,
    plotlyjs: PlotlyJS = "inline",
    title: str | None = None,
    folder: str | Path | None = None,
) -> Path:
    """Write the interactive page of `graph` to `path` and return the path.

    The page is one file that opens from disk with the network unplugged, unless `plotlyjs` says otherwise. The file
    appears under its name only when it is complete.

    Args:
        graph: what to draw.
        path: the file to write.
        validation: what was measured on the edges it names, claim by claim; it takes the place of what the graph holds.
        cards: feature cards; those of the graph's features go into the page.
        ledger: labels of features, each shown with its evidence and as a hypothesis until a causal test supports it.
        supernodes: suggested groups for the reader to accept, rename, split or dismiss: mappings or objects with
            `name`, `members` (node ids), `reason` and `score`.
        opened: what the page opens with, in place of what an imported file had: `groups`, a mapping from names to ids
            of nodes, `pinned`, ids of other nodes, `note`, a text on the whole, and `notes`, texts by the id of their
            node; each may be left out.
        plotlyjs: where the page finds plotly.js.
        title: of the page; the prompt and the model by default.
        folder: where the graph is saved, as the commands on the page are to name it.

    Raises:
        InputError: an unknown `plotlyjs`, a graph whose tables lack columns or name unknown nodes, a suggested group
            or `opened` with a node that is not in the graph, or a card whose lists do not fit together.
    """
    return write_page(
        document(
            graph, validation=validation, cards=cards, ledger=ledger, supernodes=supernodes, opened=opened, title=title,
            folder=folder,
        ), path, plotlyjs,
    )  # fmt: skip


def document(
    graph: GraphLike,
    *,
    validation: ValidationLike | pd.DataFrame | None = None,
    opened: Mapping[str, Any] | None = None,
    title: str | None = None,
    **given: Any,
) -> dict[str, Any]:
    """What the page of a graph shows; arguments as in `write_html`."""
    data = page_data(graph, validation, **given)
    if opened is not None:
        data["opened"] = opening(opened, data["nodes"]["id"])
    return data | {"title": title or _default_title(graph)}


def write_page(data: dict[str, Any], path: str | Path, plotlyjs: PlotlyJS = "inline") -> Path:
    """Write the viewer with `data`, the document that it shows; see `write_html`."""
    if plotlyjs not in get_args(PlotlyJS):
        raise InputError(f"plotlyjs={plotlyjs!r} is not known; use one of {', '.join(map(repr, get_args(PlotlyJS)))}.")
    path = Path(path)
    page = assemble(data | {"ways": [*ways_from(path), *data.get("ways", ())]}, plotlyjs)
    if plotlyjs == "directory":
        write_file(path.parent / BUNDLE_FILE, basic_bundle())
    write_file(path, page)
    return path


def prompt_title(tokens: Sequence[str]) -> str:
    """A prompt as pages are called: short, and without the special token that it begins with."""
    words = tokens[1:] if len(tokens) > 1 and _SPECIAL.fullmatch(tokens[0]) else tokens
    return shorten(visible(join_tokens(words).strip()), 60)


def _default_title(graph: GraphLike) -> str:
    prompt = prompt_title(graph.tokens)
    model = graph.provenance.get("model")
    return f"{prompt} — {model}" if model else prompt or "Attribution graph"


def assemble(data: dict[str, Any], plotlyjs: PlotlyJS = "inline", *, asks: str = "'none'") -> str:
    """The text of the viewer with `data`; see `write_page`. `asks`: whom the page may ask, as its policy names them."""
    names = _SCRIPTS if data.get("serving") is None else (*_SCRIPTS[:-1], *_SERVING, _SCRIPTS[-1])
    viewer = "\n".join(read_static(f"js/{name}.js") for name in names)
    plotly_tag, plotly_source = _plotly(plotlyjs)
    # plotly.js sets styles on its elements.
    rules = policy(plotly_source, hash_source(viewer), styles="'unsafe-inline'", asks=asks)
    parts = {
        "head": page_head(
            data["title"], rules, read_styles(*_STYLES), "comparison" if data.get("comparison") else "graph"
        ),
        "data": json_for_script(packed(data)),
        "plotly": plotly_tag,
        "viewer": f"<script>{viewer}</script>",
    }
    return fill_template("template.html", parts)


def fill_template(name: str, parts: Mapping[str, str]) -> str:
    """A file of `static/` with its place holders, `<!--{name}-->` and `/*{name}*/`, filled.

    In one pass, so that nothing inside a part is taken for a place holder.
    """
    return _PLACE_HOLDER.sub(lambda found: parts[found[1] or found[2]], read_static(name))


def page_head(title: str, rules: str, style: str, kind: Kind) -> str:
    """The head that all pages have: what it is, title, Content-Security-Policy and style sheet."""
    return fill_template("head.html", {"title": html.escape(title), "policy": rules, "style": style, "kind": kind})


def json_for_script(data: Any) -> str:
    """JSON that cannot end the script element around it, whatever its strings say."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly(plotlyjs: PlotlyJS) -> tuple[str, str]:
    """The script element that brings plotly.js, and the source expression that allows it."""
    source = basic_bundle()
    match plotlyjs:
        case "inline":
            return f"<script>{source}</script>", hash_source(source)
        case "cdn":
            integrity = hash_source(source).strip("'")
            return f'<script src="{BUNDLE_URL}" integrity="{integrity}" crossorigin="anonymous"></script>', BUNDLE_URL
        case "directory":
            return f'<script src="{BUNDLE_FILE}"></script>', "'self'"


def policy(*scripts: str, styles: str, asks: str = "'none'") -> str:
    """Nothing may be loaded or sent but to whom it `asks`, and only the named scripts and styles count."""
    connections = "" if asks == "'none'" else f"connect-src {asks}; "
    return (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src {styles}; {connections}"
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def hash_source(script: str) -> str:
    """The source expression that lets a policy allow this script or style sheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def read_styles(*names: str) -> str:
    """Style sheets of `static/css`, one after the other."""
    return "\n".join(read_static(f"css/{name}.css") for name in names)


def read_static(name: str) -> str:
    """A file of `static/`; scripts and style sheets as pages hold them, without indentation and lines of comment.

    That is a sixth of their length. No text in them may run over the end of a line.
    """
    text = resources.files("circuitsae.report").joinpath("static", name).read_text(encoding="utf-8")
    if not name.endswith((".js", ".css")):
        return text
    lines = map(str.strip, text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))
