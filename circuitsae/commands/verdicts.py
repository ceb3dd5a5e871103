"""`circuitsae verdicts`: the edges of another tool's graph tested, and the verdicts written into its own file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import tyro

from circuitsae.commands.graphs import Claim
from circuitsae.commands.shared import (
    Bos,
    ChoiceOptions,
    Choices,
    Dtype,
    WeightOptions,
    Weights,
    Wide,
    load_replacement,
    say,
    say_next,
)
from circuitsae.tables import open_console
from transcoders.errors import InputError
from transcoders.files import lasting

if TYPE_CHECKING:
    from circuitsae.validation import Validation


def verdicts(
    file: tyro.conf.Positional[Path],
    /,
    *,
    model: str,
    dictionaries: str | None = None,
    out: Path | None = None,
    edges: tuple[str, ...] = (),
    claims: tuple[Claim, ...] = (),
    controls: int = 200,
    delta: float = 0.05,
    tolerance: float = 0.1,
    seed: int = 0,
    bos: Bos = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    wide: Wide = False,
    weights: WeightOptions = Weights(),
    choices: ChoiceOptions = Choices(),
) -> None:
    """Test the edges of a graph that Neuronpedia or circuit-tracer made, and write the verdicts into its JSON.

    The prompt is traced again with the model and the dictionaries that are named; a graph of others is refused. All
    that the file says stays; what was found is under keys that other tools pass over, and `import` shows it.

    Args:
        file: The JSON of one graph.
        model: The model that the graph is of: a hub name, a local Hugging Face folder, or "pocket".
        dictionaries: The dictionaries that it was made with: a folder or hub name; the pocket model has its own.
        out: The file to write; default the name of the file with .verdicts before .json.
        edges: Which edges to test: a count, a share of the influence (80%), a class (feature→logit) or an edge by our
            ids ("0.153@8 → 1.2@9"); repeat it for several. Default 100.
        claims: What is read into an edge; repeat it for several. Default all three.
        controls: At most this many writers without an edge into the target are removed for comparison.
        delta: Effects below this share of a target's scale count for none.
        tolerance: How far activations (share of their sum) and probabilities may differ, and how many of the features
            may be silent, before the graph counts as another's.
        seed: Of the controls.
        bos: Begin the prompt with the beginning-of-text token, where the graph does not say its tokens.
        device: auto (a GPU, but the CPU for what is faster there: see `doctor`), cpu, cuda, cuda:1 or mps.
        dtype: Precision of the model.
        weights: Which weights of the model.
        choices: Which of the dictionaries that the name offers.
    """
    from circuitsae.graph.exchange.verdicts import read_document, with_verdicts, write_document
    from circuitsae.validation.choice import parse_edges

    place, chosen = out or file.with_suffix(".verdicts.json"), parse_edges(edges or ["100"])
    if place.is_dir():
        raise InputError(f"--out {place} is a folder; give the name of a JSON file.")
    document, graph = read_document(file)

    from circuitsae.console import show_validation
    from circuitsae.sentences import of_verdicts
    from circuitsae.validation import matched, validate

    console = open_console(wide)
    loaded = load_replacement(model, dictionaries, device, dtype, bos, weights, choices)
    part, match = matched(loaded, graph, tolerance=tolerance)
    say(console, f"{match}.")
    settings: dict[str, Any] = {"claims": claims or get_args(Claim), "controls": controls, "delta": delta, "seed": seed}
    check = validate(loaded, part, edges=chosen, progress=True, **settings)
    tested = check.annotate(part)
    show_validation(console, check, tested)
    source = {"model": lasting(model), "dictionaries": dictionaries and lasting(dictionaries)}
    about = _about(check, source | weights.stated() | choices.stated(), settings, match.to_json(), loaded)
    path = write_document(with_verdicts(document, graph, tested, about), place)
    say(console, of_verdicts(check.edges), f"Written: {path.resolve()}")
    say_next(console, f"circuitsae import {path}")


def _about(
    check: "Validation", source: dict[str, Any], settings: dict[str, Any], match: dict[str, Any], loaded: Any
) -> dict[str, Any]:
    """What was tested with what, for the file."""
    from importlib.metadata import version

    from circuitsae.attribution.attribute import weights_of_dictionaries

    found = check.to_json()
    figures = {
        name: found[name]
        for name in ("format", "response", "errors", "verdicts", "share", "frozen_error", "logit_error")
    }
    made = {"fingerprint": loaded.model.fingerprint(), "dictionary_fingerprint": weights_of_dictionaries(loaded)}
    by = {"by": f"circuitsae {version('circuitsae')}", "source": source, "settings": settings}
    return by | made | {"match": match} | figures
