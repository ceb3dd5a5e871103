"""Commands that repeat in a terminal or in Python what a page shows: kept once for all of its nodes and edges.

A page puts what is changed between the two halves of a command: ids of nodes that it has checked, and numbers. Whatever
else a graph says, which a stranger may have written, is quoted here.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitsae.graph.like import GraphLike

GRAPH_FOLDER, DICTIONARIES = "GRAPH_FOLDER", "DICTIONARIES"
"""What a command says where the graph does not say it."""
LONGEST_PROMPT = 20_000
"""Characters: systems bound what a command line takes, and a page would hold it twice."""
_HEAD = "import circuitsae as cs\n"
_CHANGES = "from circuitsae.interventions import Intervention, Replace, Scale, Zero, parse_target\n"
_WEIGHTS = ("revision", "adapter")
_CHOICES = ("sae_id", "layers", "site", "width", "l0", "variant")
_DTYPES = ("float64", "bfloat16")
_LAYERS = re.compile(r"\d{1,5}(?:[-–]\d{1,5})?(?:,\d{1,5}(?:[-–]\d{1,5})?)*")

Halves = tuple[str, str]
"""What stands before and after what is changed or tested."""


def commands_data(graph: GraphLike, folder: str | Path | None = None) -> dict[str, dict[str, Halves]] | None:
    """How a change of the graph's nodes, `intervene`, and a test of its edges, `validate`, are written.

    Each as `shell` and `python`, in halves. `intervene`: between them come options (` --feature 2.713@5 --zero`), or in
    Python a list of interventions; `validate`: an edge (`2.713@5 → 3.1@5`). What no shell can be told is left out: a
    prompt with NUL, or a very long one. `folder`: where the graph is, as its user writes it. None for a graph that
    names no model.
    """
    given = graph.provenance
    source = given.get("source")
    pairs = source.items() if isinstance(source, Mapping) else ()
    named = {key: value for key, value in pairs if isinstance(value, str) and value}
    model = named.get("model") or given.get("model")
    if not isinstance(model, str) or not model:
        return None
    own = named.get("dictionaries") or ("pocket" if model == "pocket" else DICTIONARIES)
    place = GRAPH_FOLDER if folder is None else str(folder)
    loading = _python_loading(model, own, named, _dtype(given), _bos(given))
    found = {"validate": _validate(place, loading)}
    prompt = given.get("prompt")
    if isinstance(prompt, str) and len(prompt) <= LONGEST_PROMPT:
        found["intervene"] = _intervene(prompt, _options(model, own, named, _dtype(given), _bos(given)), loading)
    return found


def quote(text: str) -> str | None:
    """A word for a shell: on one line and as it looks, whatever it holds; None for what no shell can be told.

    What does not print (line ends, controls, marks of direction) is written as bytes, for bash and zsh.
    """
    if text.isprintable():
        return shlex.quote(text)
    try:
        content = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    if 0 in content:
        return None
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in character.encode())


def _intervene(prompt: str, options: str | None, loading: str) -> dict[str, Halves]:
    python = (
        f"{_HEAD}{_CHANGES}\n{loading}changes = ",
        f"\noutcome = cs.intervene(model, {_literal(prompt)}, changes)\nprint(outcome.top())",
    )
    word = quote(prompt)
    if word is None or options is None:
        return {"python": python}
    if prompt.startswith("-"):  # no option
        return {"shell": ("circuitsae intervene", f"{options} -- {word}"), "python": python}
    return {"shell": (f"circuitsae intervene {word}", options), "python": python}


def _validate(folder: str, loading: str) -> dict[str, Halves]:
    lines = f"{_HEAD}\n{loading}graph = cs.load_graph({_literal(folder)})\ncheck = cs.validate(model, graph, edges="
    python = (f'{lines}"', '")\nprint(check.edges.T)')
    word = quote(f"./{folder}" if folder.startswith("-") else folder)
    return (
        {"python": python}
        if word is None
        else {"shell": (f'circuitsae validate {word} --edges "', '"'), "python": python}
    )


def _options(
    model: str, dictionaries: str, named: Mapping[str, str], dtype: str | None, bos: bool | None
) -> str | None:
    """What `circuitsae intervene` loads."""
    values = {"model": model, "dictionaries": dictionaries}
    values |= {name: named[name] for name in (*_WEIGHTS, *_CHOICES) if name in named}
    values |= {} if dtype is None else {"dtype": dtype}
    words = [_option(name.replace("_", "-"), value) for name, value in values.items()]
    if None in words:
        return None
    flags = [] if bos is None else ["--bos" if bos else "--no-bos"]
    return "".join(f" {word}" for word in [*words, *flags])


def _option(name: str, value: str) -> str | None:
    """An option's value that begins with a dash is no other option."""
    if value.startswith("-"):
        return quote(f"--{name}={value}")
    word = quote(value)
    return None if word is None else f"--{name} {word}"


def _python_loading(
    model: str, dictionaries: str, named: Mapping[str, str], dtype: str | None, bos: bool | None
) -> str:
    how = [f"{name}={_literal(named[name])}" for name in _WEIGHTS if name in named]
    how += [] if dtype is None else [f'dtype="{dtype}"']
    wanted = [_wanted(name, named[name]) for name in _CHOICES if name in named]
    begins = [] if bos is None else [f"bos={bos}"]
    language_model = ", ".join([_literal(model), *how])
    sets = ", ".join([_literal(dictionaries), *wanted])
    given = ", ".join([f"cs.load_model({language_model})", f"cs.load_dictionaries({sets})", *begins])
    return f"model = cs.ReplacementModel({given})\n"


def _wanted(name: str, value: str) -> str:
    """A choice as `load_dictionaries` takes it: layers are a list, the L0 is a number."""
    if name == "layers" and _LAYERS.fullmatch(value):
        ends = [part.replace("–", "-").partition("-") for part in value.split(",")]
        parts = [f"*range({int(low)}, {int(high) + 1})" if high else str(int(low)) for low, _, high in ends]
        return f"layers=[{', '.join(parts)}]"
    if name == "l0" and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return f"l0={value}"
    return f"{name}={_literal(value)}"


def _literal(text: str) -> str:
    """A text in Python, in double quotes where that needs no escapes."""
    written = repr(text)
    plain = written[0] == "'" and '"' not in written and "\\" not in written
    return f'"{written[1:-1]}"' if plain else written


def _dtype(provenance: Mapping[str, Any]) -> str | None:
    """The precision, where it is not what commands take by default."""
    dtype = provenance.get("dtype")
    return dtype if dtype in _DTYPES else None


def _bos(provenance: Mapping[str, Any]) -> bool | None:
    """Whether the prompt begins with BOS, where that is not how the dictionaries were trained."""
    stated, trained = provenance.get("bos"), provenance.get("dictionaries")
    usual = trained.get("bos") if isinstance(trained, Mapping) else None
    return stated if isinstance(stated, bool) and stated != usual else None
