"""Claim: rules on the text around a token tell where most features fire, on text that they were not chosen on.

Shares are of the features that fire on 5 or more of the held-out tokens, with a balanced accuracy of .7 or more there;
the ledgers are those that `circuitsae features label` wrote beside the dictionaries. CPU-seconds are extrapolated: what
reading 8,000 tokens and labelling 40 features took here, times the tokens and features of the ledger.

    python benchmarks/labels.py --stories-plt RUN --stories-clt RUN

RUN: dictionaries of tinystories-656k (beside the repository, in ../shared) trained with

    circuitsae train ../shared/data/models/tinystories-656k --corpus ../shared/data/corpora/tiny_stories_944k.txt
        --features 1024 --tokens 1.5M --lr 0.00283 --kind plt --activation topk --k 16  # or --kind clt --target-l0 16

and then labelled with `circuitsae features label` on the same text.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import RESULTS, machine

from circuitsae import load_dictionaries, load_model
from circuitsae.features import Label, Ledger
from circuitsae.features.labels import LabelConfig, Occurrences, read_occurrences
from circuitsae.features.labels.label import FeatureLabels, share_labelled
from circuitsae.graph.supernodes import NAMELESS
from circuitsae.pocket import dictionary_folder
from circuitsae.pocket.corpus import CONTEXT, UNSEEN
from transcoders.files import write_file

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SHOWN, EXAMPLES, LENGTH, TIMED = 20, 3, 16, 40
TOKENS = 4_000


class Case(NamedTuple):
    """Dictionaries with a ledger."""

    name: str
    model: str | Path
    dictionaries: str | Path
    corpus: Any
    context: int


def measured(case: Case) -> tuple[list[list[str]], list[str]]:
    """The rows of the table, a layer each and all together, and the section with features drawn at random."""
    ledger = Ledger.load(dictionary_folder(case.dictionaries))
    start = time.process_time()
    model, dictionaries = load_model(case.model, device="cpu"), load_dictionaries(case.dictionaries, device="cpu")
    how: dict[str, Any] = {"tokens": TOKENS, "held_out": TOKENS, "context": case.context}
    found = read_occurrences(model, dictionaries, case.corpus, **how)
    read = (time.process_time() - start) / (found.search.n_counted + found.held_out.n_counted)
    scorer = FeatureLabels(found, LabelConfig(), "benchmarks/labels.py")
    rng = np.random.default_rng(0)
    start = time.process_time()
    for _ in range(TIMED):
        layer = int(rng.integers(found.n_layers))
        scorer.label(layer, int(rng.integers(found.n_features(layer))))
    each = (time.process_time() - start) / TIMED
    layers = ledger.provenance["layers"]
    total = sum(layer["features"] for layer in layers)
    seconds = read * (ledger.provenance["tokens"] + ledger.provenance["held_out"]) + each * total
    rows = [_row(case.name, str(number), [layer], "") for number, layer in enumerate(layers)]
    rows.append(_row(case.name, "all", layers, f"{seconds:.0f}"))
    return rows, _drawn(case, ledger, found)


def _row(name: str, layer: str, layers: list[dict[str, Any]], seconds: str) -> list[str]:
    share, median = share_labelled(layers), layers[0]["median"] if len(layers) == 1 else None
    counts = [f"{sum(each[key] for each in layers):,}" for key in ("features", "firing", "too_rare", "labelled")]
    return [name, layer, *counts, "" if share is None else f"{share:.1%}", f"{median:.3f}" if median else "", seconds]


def _drawn(case: Case, ledger: Ledger, found: Occurrences) -> list[str]:
    """Labelled features, drawn at random, each with held-out examples: what it fires on in bold."""
    labelled = [label for label in ledger.labels if label.source == "rules" and label.text not in NAMELESS]
    lines = [f"## {case.name}: {SHOWN} features at random", ""]
    for label in random.Random(0).sample(labelled, min(SHOWN, len(labelled))):
        lines += [f"* `{label.features[0]}` {_plain(label.display)}", *_examples(label, found)]
    return [*lines, ""]


def _examples(label: Label, found: Occurrences) -> list[str]:
    """Windows of the held-out part around some of the tokens that the feature fires on."""
    layer, feature = map(int, label.features[0].split("."))
    part = found.held_out
    fires = part.places(layer, feature)
    lines = []
    for place in np.random.default_rng(0).permutation(fires)[:EXAMPLES].tolist():
        row, pos = divmod(place, part.tokens.shape[1])
        first = max(0, min(pos - LENGTH // 2, part.tokens.shape[1] - LENGTH))
        text = [found.text_of[token] for token in part.tokens[row, first : first + LENGTH].tolist()]
        on = np.isin(place - pos + first + np.arange(len(text)), fires)
        shown = (f" **{_plain(t.strip())}**" if bold else _plain(t) for t, bold in zip(text, on, strict=True))
        lines.append("    * " + "".join(shown))
    return lines


def _plain(text: str) -> str:
    return "".join("⏎" if c == "\n" else f"\\{c}" if c in "*_`<>|[]" else c for c in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories-plt", type=Path)
    parser.add_argument("--stories-clt", type=Path)
    given = parser.parse_args()
    cases = [Case(f"pocket, {kind}", "pocket", f"pocket-{kind}", UNSEEN, CONTEXT) for kind in ("clt", "plt")]
    model, corpus = SHARED / "models" / "tinystories-656k", SHARED / "corpora" / "tiny_stories_944k.txt"
    for kind, folder in (("plt", given.stories_plt), ("clt", given.stories_clt)):
        if folder is not None:
            cases.append(Case(f"tinystories-656k, {kind}", model, folder, corpus, 128))
    cases.append(Case("pocket, sae", "pocket", "pocket-sae", UNSEEN, CONTEXT))
    rows, sections = [], []
    for case in cases:
        found, section = measured(case)
        rows += found
        sections += section
        print(case.name, found[-1], flush=True)
        _write(rows, sections)


def _write(rows: list[list[str]], sections: list[str]) -> None:
    columns = ["dictionaries", "layer", "features", "fire", "too rarely", "labelled", "share", "median", "CPU-seconds"]
    lines = ["# Labels by rules", "", *str(__doc__).strip().splitlines(), "", f"Machine: {machine()}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    write_file(RESULTS / "labels.md", "\n".join([*lines, "", *sections]))


if __name__ == "__main__":
    main()
